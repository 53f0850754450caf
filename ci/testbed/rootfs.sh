#!/bin/bash
# rootfs.sh OUT.tar MIRROR [APT-OPTION...]: makes the root file system of the testbed's hosts, a Debian 13 in
# one run of mmdebstrap. This file is the whole recipe: the cache is named by its hash, so a change here
# builds anew.
set -euo pipefail

out=$1 mirror=$2
shift 2

packages=(
	slurmctld slurmd slurm-client munge                        # the scheduler
	openssh-server openssh-client openssh-sftp-server          # the store
	criu python3-pycriu nftables libnftables1                  # checkpoints
	python3 python3-paramiko python3-cryptography python3-zstandard python3-xxhash python3-numpy
	python3-aiohttp                                            # the launcher
	python3-pytest python3-pytest-timeout python3-hypothesis   # the tests that run inside a host
	gcc libc6-dev make libslurm-dev                            # the product's native parts
	iproute2 procps util-linux tini jq strace gdb-minimal
)

# CRIU 4.1.1, which is Debian 13's, cannot dump inet sockets on Linux 6.16 and later: take the next release's,
# and only what it needs. forky is a moving suite whose Release file runs out by this clock or the other,
# hence Check-Valid-Until.
from_forky='criu python3-pycriu libcompel1 libnet9 libnl-3-200'

options=()
for option; do options+=(--aptopt="$option"); done

# shellcheck disable=SC2016  # $1 is the new root and is expanded by the hooks' own shell
mmdebstrap --mode=root --variant=minbase --format=tar \
	--include="$(IFS=,; echo "${packages[*]}")" \
	--aptopt='Acquire::Languages "none"' \
	--aptopt='Acquire::Check-Valid-Until "false"' \
	--aptopt='Acquire::Retries "3"' \
	--aptopt='APT::Install-Recommends "false"' \
	"${options[@]}" \
	--dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' \
	--dpkgopt='path-exclude=/usr/share/info/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='force-unsafe-io' \
	--setup-hook='mkdir -p "$1/usr/sbin" "$1/etc/apt/preferences.d"
		printf "#!/bin/sh\nexit 101\n" > "$1/usr/sbin/policy-rc.d"; chmod +x "$1/usr/sbin/policy-rc.d"
		printf "Package: %s\nPin: release n=forky\nPin-Priority: %s\n\n" "*" 50 "'"$from_forky"'" 990 \
			> "$1/etc/apt/preferences.d/forky"' \
	--customize-hook='chroot "$1" groupadd -g 2000 alice
		chroot "$1" useradd -u 2000 -g 2000 -M -d /shared/alice -s /bin/bash alice
		chroot "$1" useradd -r -M -d / -s /usr/sbin/nologin -p "*" outlast
		rm -f "$1/etc/slurm/plugstack.conf" "$1/etc/munge/munge.key" "$1"/etc/ssh/ssh_host_*_key*
		rm -f "$1/etc/resolv.conf" "$1/etc/hostname"
		chroot "$1" python3 -c "import pycriu, paramiko, zstandard, xxhash, numpy, hypothesis"
		chroot "$1" criu --version' \
	trixie "$out" "deb $mirror trixie main" "deb $mirror forky main"
