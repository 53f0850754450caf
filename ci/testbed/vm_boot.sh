#!/bin/bash
# vm_boot.sh HOST ROLE ADDRESS CONSOLE-ADDRESS KERNEL MEMORY DIRECTORY LOWER: runs as PID 1 of a new host that is a
# virtual machine, in PID and mount namespaces of its own and in the switch's network; puts the host's file
# system together, serves it by virtiofs, and becomes QEMU.
set -euo pipefail

host=$1 role=$2 address=$3 console=$4 kernel=$5 memory=$6 directory=$7 lower=$8
tools=$directory/tools

mount -t overlay -o "lowerdir=$lower,upperdir=$directory/upper,workdir=$directory/work" overlay "$directory/root"
# virtiofsd and QEMU have a tree of their own, so that the host sees nothing of this machine through its disk.
mount -t overlay -o "lowerdir=$lower" overlay "$tools"
mount -t proc proc "$tools/proc"
mount --rbind /dev "$tools/dev"
mount -t tmpfs tmpfs "$tools/run"
mount -t tmpfs tmpfs "$tools/mnt"
mkdir "$tools/mnt/root"
mount --bind "$directory/root" "$tools/mnt/root"

# No more descriptors than it may have: by itself it asks for a million.
chroot "$tools" /usr/libexec/virtiofsd --socket-path /run/disk --shared-dir /mnt/root --sandbox none --cache always \
	--xattr --rlimit-nofile 0 --log-level error &
for ((tries = 500; tries > 0; tries--)); do
	[ ! -S "$tools/run/disk" ] || break
	sleep 0.02
done

# The hardware address is made of the network address, as that of a host in namespaces is.
hardware() { printf '02:00:%02x:%02x:%02x:%02x' "${1%%.*}" "$(cut -d. -f2 <<<"$1")" "$(cut -d. -f3 <<<"$1")" "${1##*.}"; }
# On a busy machine a kernel may find its timer dead and give up, and measures the processor's frequency wrongly: its
# clock would leave this machine's by seconds. Linux >= 6.19 asks for directory delegations, and NFS-Ganesha < 9.11 calls
# that an illegal operation instead of one that it has not: a directory now and then cannot be opened, EREMOTEIO
# (nfs-ganesha issue 1385).
words=(rootfstype=virtiofs root=root rw console=ttyS0 quiet panic=-1 no_timer_check notsc
	nfsv4.directory_delegations=0
	init=/usr/local/lib/testbed/vm_init.sh
	"testbed.host=$host" "testbed.role=$role" "testbed.address=$address" "testbed.console=$console")
exec chroot "$tools" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
	-machine q35 -accel tcg -cpu max -smp 1 -m "$memory" \
	-object "memory-backend-memfd,id=memory,size=$memory,share=on" -numa node,memdev=memory \
	-chardev socket,id=disk,path=/run/disk -device vhost-user-fs-pci,chardev=disk,tag=root \
	-netdev "tap,id=port,ifname=$host,script=no,downscript=no" \
	-device "virtio-net-pci,netdev=port,mac=$(hardware "$address")" \
	-netdev "tap,id=console,ifname=$host-console,script=no,downscript=no" \
	-device "virtio-net-pci,netdev=console,mac=$(hardware "$console")" \
	-object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng \
	-serial stdio -kernel "/usr/lib/outlast-kernels/$kernel" -append "${words[*]}" </dev/null
