#!/bin/bash
# vm_init.sh: the first program of a host that is a virtual machine: what boot.sh does for one in namespaces,
# as far as a kernel of one's own leaves something to do.
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
declare -A is
for word in $(</proc/cmdline); do
	[[ $word != testbed.*=* ]] || is[${word%%=*}]=${word#*=}
done
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
[ -d /dev/pts ] || mkdir /dev/pts
mkdir -p /dev/shm /dev/mqueue
mount -t devpts -o ptmxmode=0666,mode=620,gid=5,nosuid,noexec devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
mount -t mqueue -o nosuid,nodev,noexec mqueue /dev/mqueue
mount -t tmpfs -o mode=755,nosuid,nodev run /run
mkdir -p /run/lock /run/outlast /run/rpcbind
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
mount -t tmpfs -o mode=1777,nosuid,nodev tmp /tmp
hostname "${is[testbed.host]}"

# CRIU asks the kernel for sockets of each kind before modules can be loaded by themselves for it.
modprobe -a virtio_net virtio_rng nfsv4 nf_tables inet_diag tcp_diag udp_diag raw_diag unix_diag af_packet_diag \
	netlink_diag tun || true

# eth0 is the cluster's network, eth1 the operator's way in, which no cut cable closes.
ip -batch - <<-END
	link set lo up
	address add ${is[testbed.address]}/24 dev eth0
	link set eth0 up
	address add ${is[testbed.console]}/24 dev eth1
	link set eth1 up
END
mkdir -p /run/sshd
/usr/sbin/sshd -f /usr/local/lib/testbed/console_sshd_config -o "ListenAddress=${is[testbed.console]}"

mkdir -p /shared
for ((tries = 60; tries > 0; tries--)); do
	if mount -t nfs4 -o "$(</usr/local/lib/testbed/nfs_options)" ctl:/shared /shared; then break; fi
	sleep 0.5
done
exec tini -- bash /usr/local/lib/testbed/services.sh "${is[testbed.role]}"
