/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Loaded into `criu restore`: makes the root of the restored tree a subreaper before there are orphans, and waits for the
 * lazy-pages daemon.
 *
 * CRIU gives the flag back too, but after the processes that stand in for dead session leaders have ended. A daemon
 * whose parents are gone would then be adopted by the capsule's init, and be in no later image of the tree.
 * $OUTLAST_ROOT is the root's PID; it leads a session, so it calls setsid() before it makes any other process.
 *
 * The daemon is started at the same time as CRIU, which connects to it at once. $OUTLAST_READY is a descriptor that can
 * be read from when the daemon listens, or has ended; then CRIU says so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

pid_t setsid(void)
{
	const char *root = getenv("OUTLAST_ROOT");

	if (root != NULL && getpid() == (pid_t) strtol(root, NULL, 10))
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	return (pid_t) syscall(SYS_setsid);
}

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
	const char *ready = getenv("OUTLAST_READY");
	char byte;

	if (ready != NULL && address->sa_family == AF_UNIX) {
		int daemon = (int) strtol(ready, NULL, 10);
		while (read(daemon, &byte, 1) < 0 && errno == EINTR)
			;
		close(daemon);
		unsetenv("OUTLAST_READY");
	}
	return (int) syscall(SYS_connect, fd, address, length);
}
