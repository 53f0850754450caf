#!/bin/bash
# services.sh ROLE: starts what runs on a host of the testbed; the only child of the host's init.
set -uo pipefail

role=$1

as() { # as USER COMMAND...
	local user=$1
	shift
	setpriv --reuid "$user" --regid "$user" --init-groups "$@"
}

wait_for_network() {
	local tries
	for ((tries = 500; tries > 0; tries--)); do
		ip -4 -oneline address show dev eth0 2>/dev/null | grep -q ' 198\.18\.' && return
		sleep 0.02
	done
	echo "services.sh: eth0 has no address after 10 s" >&2
}

watcher() {
	install -d -o slurm -g slurm /run/outlast /var/log/outlast
	while :; do
		as slurm /usr/bin/outlast watcher >>/var/log/outlast/watcher.log 2>&1
		echo "testbed: the watcher ended with $?; starting it again" >>/var/log/outlast/watcher.log
		sleep 1
	done
}

install -d -o munge -g munge /run/munge
install -d -m 755 /run/sshd /run/outlast /var/log/outlast
[ -d /shared/alice ] || install -d -o alice -g alice /shared/alice || true
wait_for_network

case $role in
store)
	/usr/sbin/sshd -E /var/log/sshd.log
	;;
ctl)
	# The home of virtual machines, which cannot see this machine's directory as other hosts do.
	if [ -e /usr/local/lib/testbed/ganesha.conf ]; then
		install -d /run/ganesha
		ganesha.nfsd -f /usr/local/lib/testbed/ganesha.conf -L /var/log/nfs.log
	fi
	as munge munged
	install -d -o slurm -g slurm /var/spool/slurmctld /var/log/slurm
	slurmctld
	if [ -x /usr/bin/outlast ]; then watcher & fi
	;;
node)
	as munge munged
	install -d /var/spool/slurmd /var/log/slurm
	# On a virtual machine, whose first start of anything is slow, it would fall to the first job's prolog.
	if [ -e /usr/local/lib/testbed/ganesha.conf ] && [ -x /usr/bin/outlast ]; then
		outlast hook prolog --help >/dev/null
		python3 -c 'import outlast.manager._daemon'
	fi
	slurmd -c # as after any boot: docs/install.md
	;;
esac
exec sleep infinity
