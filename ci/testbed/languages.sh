#!/bin/bash
# languages.sh LOWER LAYER WORK: installs into LAYER, above the root file system LOWER, what programs in other
# languages need: for the tests that the marker `long` names. To be run in a mount namespace of its own. This file
# is the whole recipe: the cache is named by its hash and that of the root file system's.
set -euo pipefail

lower=$1 layer=$2 work=$3
packages=(golang-go nodejs default-jdk-headless r-base-core openmpi-bin libopenmpi-dev parallel)

mkdir -p "$layer" "$work/work" "$work/root"
root=$work/root
mount -t overlay -o "lowerdir=$lower,upperdir=$layer,workdir=$work/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/var/lib/apt/lists"
mount -t tmpfs tmpfs "$root/var/cache/apt"
# This machine's way to its mirror: its names, and its apt settings, which the caller has in APT_CONFIG.
for name in resolv.conf hosts; do
	[ ! -e "/etc/$name" ] || {
		[ -e "$root/etc/$name" ] || touch "$root/etc/$name"
		mount --bind "/etc/$name" "$root/etc/$name"
	}
done
cp "$APT_CONFIG" "$root/tmp/apt.conf"
run() {
	chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
		APT_CONFIG=/tmp/apt.conf DEBIAN_FRONTEND=noninteractive "$@"
}
# Java's alternatives want their manual pages' directory, which dpkg leaves out.
mkdir -p "$root/usr/share/man/man1"
# One libnl is CRIU's, of the next release; what depends on it must be of that too.
printf 'Package: libnl-*\nPin: release n=forky\nPin-Priority: 990\n' >"$root/etc/apt/preferences.d/libnl"
run apt-get -q update
run apt-get -q install --yes --no-install-recommends "${packages[@]}"
for program in go node javac Rscript mpirun mpicc parallel; do
	run sh -c 'command -v "$1"' - "$program"
done
umount "$root/etc/resolv.conf" "$root/etc/hosts" || true
rm -f "$layer/etc/resolv.conf"
