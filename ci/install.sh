#!/bin/bash
# install.sh [PACKAGE...]: installs the Debian packages that the tests need and that are missing, and those that
# are named. No service is started by that: sshd is needed as a program, not on this machine's port 22.
set -euo pipefail

packages=(
	python3 python3-venv gcc libc6-dev make git openssh-client openssh-server openssh-sftp-server shellcheck
	"$@"
)
policy=/usr/sbin/policy-rc.d

missing=()
for package in "${packages[@]}"; do
	status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || status=
	[ "$status" = installed ] || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

echo "test: installing ${missing[*]}" >&2
log=$(mktemp)
own_policy=
finish() {
	local code=$?
	[ -z "$own_policy" ] || rm -f "$policy"
	[ "$code" -eq 0 ] || {
		tail -n 20 "$log"
		echo "test: apt-get: the packages could not be installed; install them by hand: ${missing[*]}"
	} >&2
	rm -f "$log"
	exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# One that is there already is the administrator's own word.
if [ ! -e "$policy" ]; then
	own_policy=yes
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q update >"$log" 2>&1 </dev/null
apt-get -q install --yes --no-install-recommends "${missing[@]}" >>"$log" 2>&1 </dev/null
if [[ " ${missing[*]} " = *' openssh-server '* ]] && command -v systemctl >/dev/null; then
	# Nor at the next boot.
	systemctl --quiet disable ssh.service ssh.socket >>"$log" 2>&1 || true
fi
