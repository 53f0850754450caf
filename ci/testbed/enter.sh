#!/bin/bash
# enter.sh STATE exec|user HOST COMMAND...: becomes the command inside a host of the testbed whose state
# directory is STATE, as root or as alice in her home with what a login would set. Passes stdio through and
# ends with the command's exit code, or with 125 if it cannot be started at all.
#
# This is in shell, and knows from files what it needs, since it is called in loops: it takes a hundredth of a
# second.
set -uo pipefail
umask 022

refuse() {
	printf 'testbed: %s\n' "$@" >&2
	exit 125
}

state=$1 verb=$2 host=${3:-} directory=$1/hosts/${3:-}
[ "$#" -ge 4 ] || refuse "$verb: give a host and a command" "as in 'scripts/testbed $verb n1 hostname'"
shift 3
[ -d "$state/hosts" ] || refuse "the testbed is not up" "run 'scripts/testbed up'"
[ -d "$directory/upper" ] || refuse "$host: no such host" "the hosts are in 'scripts/testbed status'"

off() { refuse "$host: the host is off" "run 'scripts/testbed start-node $host'"; }
{ read -r pid started <"$directory/pid"; } 2>/dev/null || off
{ read -r stat <"/proc/$pid/stat"; } 2>/dev/null || off
# proc(5): the fields after the name in parentheses begin with the state; start time is the 20th of them.
read -ra fields <<<"${stat##*) }"
[[ ${fields[19]} = "$started" && ${fields[0]} != [ZX] ]] || off

# What runs in a host must be in its cgroups, by which the testbed finds it.
while read -r file; do
	echo 0 >"$file" || refuse "$file: cannot join the host's cgroup"
done <"$directory/join"

# Files of the caller's own that are open beyond stdio are none of the host's; 255 is this script.
for file in /proc/self/fd/*; do
	number=${file##*/}
	[[ $number -le 2 || $number = 255 ]] || eval "exec $number>&-"
done

# If this ends early, such as by its caller's timeout, the command in the host must not live on.
become=(setpriv --pdeathsig KILL)
user=root home=/root
if [ "$verb" = user ]; then
	user=alice home=/shared/alice
	become+=(--reuid alice --regid alice --init-groups)
fi
# A virtual machine has no namespaces to enter; its operator's connection is kept open beside it.
if [ -d "$directory/tools" ]; then
	[ -S "/proc/$pid/root/run/console" ] || refuse "$host: the host is not booted yet" "wait some seconds"
	# Home is on NFS, where root may not even go: so first the user, then the directory.
	printf -v words '%q ' env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
		HOME="$home" USER="$user" LOGNAME="$user" SHELL=/bin/bash "${become[@]}" -- env -C "$home" "$@"
	exec -c nsenter --target "$pid" --mount --net --root -- /usr/bin/ssh -F none -T -S /run/console root@console "exec $words"
fi
exec -c nsenter --target "$pid" --mount --uts --ipc --net --pid --cgroup -- /usr/bin/env -C "$home" \
	PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 ${TERM:+"TERM=$TERM"} \
	HOME="$home" USER="$user" LOGNAME="$user" SHELL=/bin/bash "${become[@]}" -- "$@"
