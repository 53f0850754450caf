#!/bin/bash
# venv.sh [EXTRA...]: makes the virtual environment with Outlast's own dependencies and those of its tests, as
# setup.cfg names them, and with those of other extras, unless it is there; prints its directory. It is kept in $OUTLAST_CACHE under the hash of those
# names and of the Python version.
set -euo pipefail

checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cache=${OUTLAST_CACHE:-/var/cache/outlast}
python=/usr/bin/python3

# shellcheck disable=SC2016  # Python's text, not the shell's
requirements=$("$python" -I - "$checkout/setup.cfg" dev "$@" <<-'END'
	import configparser
	import sys

	setup = configparser.ConfigParser(interpolation=None)
	setup.read(sys.argv[1])
	extras = setup["options.extras_require"]
	for text in (setup["options"]["install_requires"], *map(extras.get, sys.argv[2:])):
	    print(*filter(None, map(str.strip, text.splitlines())), sep="\n")
	END
)
version=$("$python" -I -c 'import sys; print(sys.version)')
key=$(printf '%s\n' "$requirements" "$version" | sha256sum | cut -c1-12)
venv=$cache/venv-$key

mkdir -p "$cache"
exec 8>"$cache/venv.lock"
flock 8
# The mark is the last thing to be written: without it the environment is unfinished. It is not made under
# another name and renamed, since its programs hold its path.
if [ ! -e "$venv/complete" ]; then
	echo "test: installing Python packages into $venv" >&2
	rm -rf "$venv"
	"$python" -m venv "$venv" 8>&- >&2
	mapfile -t words <<<"$requirements"
	"$venv/bin/python" -m pip install -qq --disable-pip-version-check "${words[@]}" 8>&- >&2
	touch "$venv/complete"
	# An environment that nobody has used for a month is of an older setup.cfg or Python.
	find "$cache" -maxdepth 1 -name 'venv-*' -type d -mtime +30 ! -path "$venv" -exec rm -rf {} +
fi
touch "$venv"
echo "$venv"
