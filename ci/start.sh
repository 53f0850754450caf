#!/bin/bash
# start.sh MODULE [ARGUMENT...]: becomes `python -m MODULE` as root, with a Python of 3.11 or later that sees
# this checkout and the standard library only; installs one where there is none. --help needs no root.
set -euo pipefail

checkout=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
module=$1
name=${module##*.}
shift

help=
for word; do
	case $word in
	-h | --help | --list) help=yes ;;
	esac
done
if [ "$EUID" -ne 0 ] && [ -z "$help" ]; then
	printf '%s: %s\n' "$name" "it starts a cluster in namespaces of its own, for which it must be root" \
		"$name" "use sudo" >&2
	exit 1
fi

find_python() {
	for python in /usr/bin/python3 "$(command -v python3)"; do
		[ -x "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
	done
	return 1
}

if ! find_python; then
	echo "$name: installing python3" >&2
	export DEBIAN_FRONTEND=noninteractive
	{ apt-get -q update && apt-get -q install --yes --no-install-recommends python3; } >&2 </dev/null || true
	find_python || {
		echo "$name: Python 3.11 or later is needed" >&2
		exit 1
	}
fi
cache=${OUTLAST_CACHE:-/var/cache/outlast}
unset PYTHONHOME
umask 022
PYTHONPATH=$checkout exec "$python" -s -S -P -X pycache_prefix="$cache/pycache" -m "$module" "$@"
