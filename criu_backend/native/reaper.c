/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Loaded into `criu restore`: makes the root of the restored tree a subreaper before there are orphans.
 *
 * CRIU gives the flag back too, but after the processes that stand in for dead session leaders have ended. A daemon
 * whose parents are gone would then be adopted by the capsule's init, and be in no later image of the tree.
 * $OUTLAST_ROOT is the root's PID; it leads a session, so it calls setsid() before it makes any other process.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

pid_t setsid(void)
{
	const char *root = getenv("OUTLAST_ROOT");

	if (root != NULL && getpid() == (pid_t) strtol(root, NULL, 10))
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	return (pid_t) syscall(SYS_setsid);
}
