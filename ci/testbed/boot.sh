#!/bin/bash
# boot.sh HOST ROLE DIRECTORY LOWER SHARED HIERARCHY=CONTROLLERS...: runs as PID 1 of a new host, in
# namespaces of its own; makes the host's view of the world and becomes its init.
set -euo pipefail

host=$1 role=$2 directory=$3 lower=$4 shared=$5
shift 5
root=$directory/root

mount -t overlay -o "lowerdir=$lower,upperdir=$directory/upper,workdir=$directory/work" overlay "$root"
cd "$root"
mkdir -p shared oldroot
mount --bind "$shared" shared
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o nosuid,nodev,noexec sysfs sys

if [[ $# = 1 && $1 = *= ]]; then
	mount -t cgroup2 cgroup2 sys/fs/cgroup
else
	mount -t tmpfs -o mode=755,nosuid,nodev,noexec cgroup sys/fs/cgroup
	for hierarchy; do
		name=${hierarchy%%=*} controllers=${hierarchy#*=}
		mkdir "sys/fs/cgroup/$name"
		if [ -z "$controllers" ]; then
			mount -t cgroup2 cgroup2 "sys/fs/cgroup/$name"
			continue
		fi
		mount -t cgroup -o "$controllers" cgroup "sys/fs/cgroup/$name"
		for one in ${controllers//,/ }; do
			[ -e "sys/fs/cgroup/$one" ] || ln -s "$name" "sys/fs/cgroup/$one"
		done
	done
fi

mount -t tmpfs -o mode=755,nosuid dev dev
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
	IFS=: read -r name major minor <<<"$device"
	mknod -m 666 "dev/$name" c "$major" "$minor"
done
while read -r minor name; do
	[ "$name" != cpu_dma_latency ] || mknod -m 600 "dev/$name" c 10 "$minor"
done <proc/misc
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5,nosuid,noexec devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
mount -t mqueue -o nosuid,nodev,noexec mqueue dev/mqueue
ln -s /proc/self/fd dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${number%:*}" "dev/${number#*:}"; done
mount -t tmpfs -o mode=755,nosuid,nodev run run
mkdir run/lock run/outlast

hostname "$host"
pivot_root . oldroot
# shellcheck disable=SC2016  # expanded by the shell inside
exec chroot . /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
	/bin/bash -c 'umount -l /oldroot; cd /; exec tini -- bash /usr/local/lib/testbed/services.sh "$1"' - "$role"
