#!/bin/sh
# dump.sh NAME COMMAND WARM COUNT GAP: starts COMMAND, and after WARM seconds dumps it COUNT times, GAP seconds
# apart, into images/NAME/1, 2, ... beside this file; then kills it.
set -eu
cd -- "$(dirname -- "$0")"
mkdir -p "images/$1"
# shellcheck disable=SC2086  # a command and its words
setsid $2 >"images/$1.out" 2>&1 </dev/null &
pid=$!
trap 'kill -9 $pid' EXIT
sleep "$3"
for number in $(seq "$4"); do
	mkdir "images/$1/$number"
	criu dump --tree "$pid" --images-dir "images/$1/$number" --log-file dump.log --leave-running >/dev/null ||
		{
			grep -m 1 Error "images/$1/$number/dump.log" >&2
			exit 1
		}
	rm "images/$1/$number/dump.log"
	sleep "$5"
done
