#!/bin/bash
# in_root.sh LOWER SCRATCH SOURCE=TARGET... -- COMMAND...: runs a command in a root file system, which it sees
# as writable and leaves as it is; each SOURCE is seen at TARGET, as writable where TARGET ends in :rw. To be
# run in a mount namespace of its own, with whose end everything here is undone.
set -euo pipefail

lower=$1 scratch=$2
shift 2
mkdir -p "$scratch/upper" "$scratch/work" "$scratch/root"
root=$scratch/root
mount -t overlay -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
while [ "$1" != -- ]; do
	source=${1%=*} target=${1##*=}
	mkdir -p "$root${target%:rw}"
	mount --bind "$source" "$root${target%:rw}"
	[[ $target = *:rw ]] || mount -o remount,bind,ro "$root$target"
	shift
done
shift
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"
