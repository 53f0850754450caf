#!/bin/bash
# rootfs.sh build|fresh OUT MIRROR CONTROL [APT-OPTION...]: makes a Debian 13 in the directory OUT. "build" holds
# what packages are built and looked at with; "fresh" a bare system with what CONTROL, the packages' own list of
# what they need, names, and no more, so that a need that is not named there shows. This file is the whole
# recipe: the cache is named by its hash and CONTROL's.
set -euo pipefail

kind=$1 out=$2 mirror=$3 control=$4
shift 4

# The names in a field of CONTROL, of all packages in it, without versions, alternatives and what is built here.
named() {
	awk -v field="$1:" '
		/^[^ \t]/ { inside = ($1 == field); sub(/^[^ ]* */, "") }
		inside { print }' "$control" |
		tr ',' '\n' | sed -E 's/\|.*//; s/\([^)]*\)//; s/:any//; s/[[:space:]]//g' |
		grep -vE '^($|#|\$|outlast|liboutlast)' | sort -u
}

case $kind in
build)
	packages=(build-essential fakeroot lintian rpm systemd python3-build python3-venv python3-setuptools
		python3-wheel)
	mapfile -t -O "${#packages[@]}" packages < <(named Build-Depends)
	;;
fresh)
	packages=(systemd tini iproute2 python3-venv)
	mapfile -t -O "${#packages[@]}" packages < <(named Depends; named Recommends; named Pre-Depends)
	;;
esac

# As in ci/testbed/rootfs.sh: CRIU 4.1.1, which is Debian 13's, cannot dump inet sockets on Linux 6.16 and later.
from_forky='criu python3-pycriu libcompel1 libnet9 libnl-3-200'

options=()
for option; do options+=(--aptopt="$option"); done

# shellcheck disable=SC2016  # $1 is the new root and is expanded by the hooks' own shell
mmdebstrap --mode=root --variant=minbase --format=directory \
	--include="$(IFS=,; echo "${packages[*]}")" \
	--aptopt='Acquire::Languages "none"' \
	--aptopt='Acquire::Check-Valid-Until "false"' \
	--aptopt='Acquire::Retries "3"' \
	--aptopt='APT::Install-Recommends "false"' \
	"${options[@]}" \
	--dpkgopt='force-unsafe-io' \
	--setup-hook='mkdir -p "$1/usr/sbin" "$1/etc/apt/preferences.d"
		printf "#!/bin/sh\nexit 101\n" > "$1/usr/sbin/policy-rc.d"; chmod +x "$1/usr/sbin/policy-rc.d"
		printf "Package: %s\nPin: release n=forky\nPin-Priority: %s\n\n" "*" 50 "'"$from_forky"'" 990 \
			> "$1/etc/apt/preferences.d/forky"' \
	--customize-hook='rm -rf "$1/etc/resolv.conf" "$1/etc/hostname" "$1"/var/lib/apt/lists/* "$1/etc/apt/sources.list"
		rm -f "$1/etc/apt/preferences.d/forky"' \
	trixie "$out" "deb $mirror trixie main" "deb $mirror forky main"
