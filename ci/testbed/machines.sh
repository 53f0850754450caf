#!/bin/bash
# machines.sh LOWER LAYER WORK: installs into LAYER, above the root file system LOWER, what a cluster of virtual
# machines has beside: QEMU, two kernels, NFS. To be run in a mount namespace of its own. This file is the whole
# recipe: the cache is named by its hash and that of the root file system's.
set -euo pipefail

lower=$1 layer=$2 work=$3
packages=(
	libnl-route-3-200/forky                          # as old as the libnl that CRIU came with
	qemu-system-x86 virtiofsd                        # run outside, with the hosts' directories as their disks
	kmod                                             # modules, in the virtual machines
	nfs-common nfs-ganesha nfs-ganesha-vfs           # the home: a server that needs nothing of this kernel
)

mkdir -p "$layer" "$work/work" "$work/root"
root=$work/root
mount -t overlay -o "lowerdir=$lower,upperdir=$layer,workdir=$work/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/var/lib/apt/lists"
mount -t tmpfs tmpfs "$root/var/cache/apt"
mkdir -p "$root/var/cache/apt/archives/partial"
cat /etc/resolv.conf >"$root/etc/resolv.conf"
# The caller has this machine's own apt settings in APT_CONFIG.
cp "$APT_CONFIG" "$root/tmp/apt.conf"
run() {
	chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
		APT_CONFIG=/tmp/apt.conf DEBIAN_FRONTEND=noninteractive "$@"
}
run apt-get -q update
run apt-get -q install --yes --no-install-recommends "${packages[@]}"

# Only the kernels' files: their packages would have an initrd made, and boot loaders looked for. Root comes by
# virtiofs, whose driver is built in.
mkdir -p "$root/usr/lib/outlast-kernels" "$root/usr/lib/modules"
for release in trixie forky; do
	mkdir "$root/tmp/$release"
	# Of the packages that it needs those which hold files of its own: their names end in its version.
	mapfile -t packages < <(
		run apt-get install --dry-run --no-install-recommends "linux-image-cloud-amd64/$release" |
			sed -nE 's/^Inst (linux-[a-z]+-[0-9][^ ]*-cloud-amd64) .*/\1/p'
	)
	run env -C "/tmp/$release" apt-get -o APT::Sandbox::User=root download "${packages[@]}"
	for package in "$root/tmp/$release"/*.deb; do
		run dpkg-deb -x "/tmp/$release/${package##*/}" "/tmp/$release/files"
	done
	files=$root/tmp/$release/files
	[ -d "$files/usr/lib/modules" ] || mv "$files/lib" "$files/usr/lib"
	version=$(basename "$files"/usr/lib/modules/*)
	mv "$(find "$files" -name 'vmlinuz*' -type f)" "$root/usr/lib/outlast-kernels/$release"
	mv "$files/usr/lib/modules/$version" "$root/usr/lib/modules/"
	run depmod "$version"
	rm -r "$root/tmp/$release"
done
rm -f "$layer/etc/resolv.conf"
