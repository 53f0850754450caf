/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OUTLAST_CAPSULE_H
#define OUTLAST_CAPSULE_H

#include <stdbool.h>
#include <sys/resource.h>
#include <sys/types.h>

#define MAX_GROUPS 65536

/* What the kernel says of the process that stands in the job's place, read once, applied in two halves. */
struct context {
	pid_t pid;
	uid_t uid;
	gid_t gid;
	gid_t *groups;
	int n_groups;
	mode_t umask;
	bool no_new_privs;
	unsigned long long bounding_set;
	struct rlimit limits[RLIM_NLIMITS];
	bool has_limit[RLIM_NLIMITS];
	char *cwd;
};

/* Prints "error TEXT" on the report descriptor and ends this process. */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Reads the context of process PID; ends the program when it cannot. */
void context_read(struct context *context, pid_t pid);

/* Enters PID's cgroups, CPU set, priorities and its namespaces other than PID's own IPC: what init and
 * all its children inherit. */
void context_join(const struct context *context);

/* Takes PID's limits and credentials, working directory and umask: the job's own part, no way back. */
void context_become(const struct context *context);

/* Enters those namespaces of process PID that differ from this process's own. */
void join_namespaces(pid_t pid, const char *const *names);

#endif
