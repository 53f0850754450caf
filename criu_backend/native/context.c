/* SPDX-License-Identifier: Apache-2.0
 *
 * The context of a process, taken from the kernel: a job that is started or restored for a process must
 * run in that process's cgroups, on its CPUs, within its limits and with its credentials. */
#define _GNU_SOURCE
#include "capsule.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define IOPRIO_WHO_PROCESS 1
#define MAX_CPUS 8192

/* /proc/PID/limits is readable where prlimit() on another user's process needs CAP_SYS_RESOURCE.
 * Source of the names: Linux, fs/proc/base.c, lnames[]. */
static const struct {
	const char *name;
	int resource;
} limit_names[] = {
	{ "Max cpu time", RLIMIT_CPU },
	{ "Max file size", RLIMIT_FSIZE },
	{ "Max data size", RLIMIT_DATA },
	{ "Max stack size", RLIMIT_STACK },
	{ "Max core file size", RLIMIT_CORE },
	{ "Max resident set", RLIMIT_RSS },
	{ "Max processes", RLIMIT_NPROC },
	{ "Max open files", RLIMIT_NOFILE },
	{ "Max locked memory", RLIMIT_MEMLOCK },
	{ "Max address space", RLIMIT_AS },
	{ "Max file locks", RLIMIT_LOCKS },
	{ "Max pending signals", RLIMIT_SIGPENDING },
	{ "Max msgqueue size", RLIMIT_MSGQUEUE },
	{ "Max nice priority", RLIMIT_NICE },
	{ "Max realtime priority", RLIMIT_RTPRIO },
	{ "Max realtime timeout", RLIMIT_RTTIME },
};

static FILE *open_proc(pid_t pid, const char *name)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	FILE *file = fopen(path, "re");
	if (file == NULL)
		die("%s: %s", path, strerror(errno));
	return file;
}

static rlim_t limit_value(const char *text)
{
	return strcmp(text, "unlimited") == 0 ? RLIM_INFINITY : strtoull(text, NULL, 10);
}

static void read_limits(struct context *context)
{
	FILE *file = open_proc(context->pid, "limits");
	char line[256], soft[32], hard[32];

	while (fgets(line, sizeof(line), file) != NULL) {
		for (size_t i = 0; i < sizeof(limit_names) / sizeof(*limit_names); i++) {
			size_t length = strlen(limit_names[i].name);
			if (strncmp(line, limit_names[i].name, length) != 0 ||
			    sscanf(line + length, "%31s %31s", soft, hard) != 2)
				continue;
			int resource = limit_names[i].resource;
			context->limits[resource].rlim_cur = limit_value(soft);
			context->limits[resource].rlim_max = limit_value(hard);
			context->has_limit[resource] = true;
		}
	}
	fclose(file);
}

static void read_groups(struct context *context, const char *text)
{
	char *end;

	context->groups = calloc(MAX_GROUPS, sizeof(gid_t));
	if (context->groups == NULL)
		die("out of memory");
	for (;;) {
		unsigned long group = strtoul(text, &end, 10);
		if (end == text || context->n_groups == MAX_GROUPS)
			return;
		context->groups[context->n_groups++] = (gid_t) group;
		text = end;
	}
}

static void read_status(struct context *context)
{
	FILE *file = open_proc(context->pid, "status");
	char *line = NULL;
	size_t size = 0;
	unsigned int effective, mask, flag;

	while (getline(&line, &size, file) >= 0) {
		if (sscanf(line, "Uid: %*u %u", &effective) == 1)
			context->uid = effective;
		else if (sscanf(line, "Gid: %*u %u", &effective) == 1)
			context->gid = effective;
		else if (sscanf(line, "Umask: %o", &mask) == 1)
			context->umask = mask;
		else if (sscanf(line, "NoNewPrivs: %u", &flag) == 1)
			context->no_new_privs = flag != 0;
		else if (strncmp(line, "CapBnd:", 7) == 0)
			context->bounding_set = strtoull(line + 7, NULL, 16);
		else if (strncmp(line, "Groups:", 7) == 0)
			read_groups(context, line + 7);
	}
	free(line);
	fclose(file);
}

void context_read(struct context *context, pid_t pid)
{
	char path[64], cwd[PATH_MAX];

	*context = (struct context){ .pid = pid, .uid = (uid_t) -1, .gid = (gid_t) -1 };
	read_status(context);
	if (context->uid == (uid_t) -1 || context->gid == (gid_t) -1)
		die("/proc/%d/status: no Uid or Gid", pid);
	read_limits(context);
	snprintf(path, sizeof(path), "/proc/%d/cwd", pid);
	ssize_t length = readlink(path, cwd, sizeof(cwd) - 1);
	if (length < 0)
		die("%s: %s", path, strerror(errno));
	cwd[length] = '\0';
	context->cwd = strdup(cwd);
}

/* Is WORD one of the comma-separated words of LIST? */
static bool has_word(const char *list, const char *word)
{
	size_t length = strlen(word);

	for (const char *at = list; (at = strstr(at, word)) != NULL; at += length) {
		if ((at == list || at[-1] == ',') && (at[length] == '\0' || at[length] == ','))
			return true;
	}
	return false;
}

/* Finds where this mount namespace shows the cgroup hierarchy that has CONTROLLER ("" is version 2).
 * Source of the line's form: proc_pid_mountinfo(5). */
static bool find_hierarchy(const char *controller, char *point, char *root)
{
	FILE *file = open_proc(getpid(), "mountinfo");
	char *line = NULL;
	size_t size = 0;
	bool found = false;

	while (!found && getline(&line, &size, file) >= 0) {
		char type[64], options[1024];
		char *rest = strstr(line, " - ");
		if (rest == NULL || sscanf(rest, " - %63s %*s %1023s", type, options) != 2 ||
		    sscanf(line, "%*s %*s %*s %4095s %4095s", root, point) != 2)
			continue;
		found = *controller == '\0' ? strcmp(type, "cgroup2") == 0
					    : strcmp(type, "cgroup") == 0 && has_word(options, controller);
	}
	free(line);
	fclose(file);
	return found;
}

static void join_cgroup(const char *controllers, const char *path)
{
	char point[PATH_MAX], root[PATH_MAX], first[256];

	snprintf(first, sizeof(first), "%.*s", (int) strcspn(controllers, ","), controllers);
	/* A hierarchy that is mounted nowhere cannot be managed by the scheduler either. */
	if (!find_hierarchy(first, point, root))
		return;
	size_t length = strcmp(root, "/") == 0 ? 0 : strlen(root);
	if (strncmp(path, root, length) == 0)
		path += length;
	char *procs;
	if (asprintf(&procs, "%s%s/cgroup.procs", point, path) < 0)
		die("out of memory");
	int fd = open(procs, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		die("joining the cgroup %s: %s", procs, strerror(errno));
	close(fd);
	free(procs);
}

static void join_cgroups(pid_t pid)
{
	FILE *own = open_proc(getpid(), "cgroup"), *file = open_proc(pid, "cgroup");
	char *line = NULL, *mine = NULL;
	size_t size = 0, my_size = 0;

	while (getline(&line, &size, file) >= 0) {
		line[strcspn(line, "\n")] = '\0';
		bool same = false;
		rewind(own);
		while (!same && getline(&mine, &my_size, own) >= 0) {
			mine[strcspn(mine, "\n")] = '\0';
			same = strcmp(mine, line) == 0;
		}
		char *controllers = strchr(line, ':');
		char *path = controllers == NULL ? NULL : strchr(controllers + 1, ':');
		if (same || path == NULL)
			continue;
		*path++ = '\0';
		join_cgroup(controllers + 1, path);
	}
	free(line);
	free(mine);
	fclose(file);
	fclose(own);
}

static void join_scheduling(pid_t pid)
{
	cpu_set_t *cpus = CPU_ALLOC(MAX_CPUS);
	char path[64], text[32];

	if (cpus == NULL)
		die("out of memory");
	if (sched_getaffinity(pid, CPU_ALLOC_SIZE(MAX_CPUS), cpus) == 0)
		sched_setaffinity(0, CPU_ALLOC_SIZE(MAX_CPUS), cpus);
	CPU_FREE(cpus);
	errno = 0;
	int nice_value = getpriority(PRIO_PROCESS, (id_t) pid);
	if (errno == 0)
		setpriority(PRIO_PROCESS, 0, nice_value);
	long io_priority = syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, pid);
	if (io_priority > 0)
		syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, io_priority);
	snprintf(path, sizeof(path), "/proc/%d/oom_score_adj", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text));
	if (fd >= 0)
		close(fd);
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	/* Lowering it needs CAP_SYS_RESOURCE; where that is missing the job is only likelier to be chosen. */
	if (fd >= 0 && length > 0 && write(fd, text, (size_t) length) < 0)
		errno = 0;
	if (fd >= 0)
		close(fd);
}

void join_namespaces(pid_t pid, const char *const *names)
{
	int fds[8];
	int count = 0;

	/* All are opened first: entering the mount namespace changes what /proc shows. */
	for (; names[count] != NULL; count++) {
		char path[64], own[64];
		struct stat theirs, ours;
		snprintf(path, sizeof(path), "/proc/%d/ns/%s", pid, names[count]);
		snprintf(own, sizeof(own), "/proc/self/ns/%s", names[count]);
		if (stat(path, &theirs) < 0)
			die("%s: %s", path, strerror(errno));
		bool same = stat(own, &ours) == 0 && ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev;
		fds[count] = same ? -1 : open(path, O_RDONLY | O_CLOEXEC);
		if (!same && fds[count] < 0)
			die("%s: %s", path, strerror(errno));
	}
	for (int i = 0; i < count; i++) {
		if (fds[i] >= 0 && setns(fds[i], 0) < 0)
			die("entering the %s namespace of process %d: %s", names[i], pid, strerror(errno));
		if (fds[i] >= 0)
			close(fds[i]);
	}
}

void context_join(const struct context *context)
{
	static const char *const names[] = { "net", "uts", "pid", "mnt", NULL };

	join_cgroups(context->pid);
	join_scheduling(context->pid);
	join_namespaces(context->pid, names);
}

void context_become(const struct context *context)
{
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		/* A hard limit above this process's own needs CAP_SYS_RESOURCE: then take what is allowed. */
		if (context->has_limit[i] && setrlimit(i, &context->limits[i]) < 0) {
			struct rlimit own;
			getrlimit(i, &own);
			if (context->limits[i].rlim_cur < own.rlim_max) {
				own.rlim_cur = context->limits[i].rlim_cur;
				setrlimit(i, &own);
			}
		}
	}
	for (int i = 0; i < 64; i++) {
		if ((context->bounding_set >> i & 1) == 0)
			prctl(PR_CAPBSET_DROP, i, 0, 0, 0);
	}
	if (setgroups((size_t) context->n_groups, context->groups) < 0 ||
	    setresgid(context->gid, context->gid, context->gid) < 0 ||
	    setresuid(context->uid, context->uid, context->uid) < 0)
		die("becoming user %u: %s", context->uid, strerror(errno));
	if (context->no_new_privs)
		prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	umask(context->umask);
	if (chdir(context->cwd) < 0)
		die("working directory %s: %s", context->cwd, strerror(errno));
}
