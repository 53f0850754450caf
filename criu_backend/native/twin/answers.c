/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What CRIU is told in the place of the C library: by its names, since this library is preloaded. */
#define _GNU_SOURCE
#include "predict.h"
#include "twin.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/ptrace.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The twin of the process that an open file, or directory, of /proc is of: /proc/PID and *rest*. */
static const struct twin *twin_of_file(int fd, const char *rest)
{
	char path[64], link[64], expected[64];
	int pid;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	ssize_t length = readlink(path, link, sizeof(link) - 1);
	if (length < 0)
		return NULL;
	link[length] = '\0';
	if (sscanf(link, "/proc/%d", &pid) != 1)
		return NULL;
	snprintf(expected, sizeof(expected), "/proc/%d%s", pid, rest);
	if (strcmp(link, expected) != 0)
		return NULL;
	for (const struct twin *twin = twins; twin != NULL; twin = twin->next) {
		if (twin->pid == pid)
			return twin;
	}
	return NULL;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list values;
	const struct twin *twin;

	va_start(values, request);
	void *argument = va_arg(values, void *);
	va_end(values);
	if (request == PAGEMAP_SCAN && twins != NULL && (twin = twin_of_file(fd, "/pagemap")) != NULL) {
		struct pm_scan_arg *scan = argument;
		const struct prediction *prediction = prediction_of(twin->pid);
		if (is_about_pages(scan))
			return (int) scan_visible(fd, scan, &twin->hidden);
		if (is_about_guards(scan) && prediction != NULL && prediction->written && prediction->no_guards) {
			scan->walk_end = scan->end;
			return 0;
		}
	}
	return (int) syscall(SYS_ioctl, fd, request, argument);
}

bool answers_ptrace;

/* As in the C library, whose own is not declared here: its header cannot be had together with the kernel's. */
long ptrace(int request, ...)
{
	static long (*real)(int, ...);
	va_list values;

	va_start(values, request);
	const pid_t pid = va_arg(values, pid_t);
	void *address = va_arg(values, void *), *data = va_arg(values, void *);
	va_end(values);
	answers_ptrace = true;
	if (request == PTRACE_SEIZE)
		keep_processors_awake();
	if (real == NULL)
		*(void **) &real = dlsym(RTLD_NEXT, "ptrace");
	if (!settle_twins()) {
		errno = ECANCELED;
		return -1;
	}
	return real(request, pid, address, data);
}

static int open_at(int directory, const char *path, int flags, mode_t mode)
{
	const bool smaps = strcmp(path, "smaps") == 0;
	const struct twin *twin;

	if (smaps && !settle_twins()) {
		errno = ECANCELED;
		return -1;
	}
	if (twins != NULL && smaps && (twin = twin_of_file(directory, "")) != NULL) {
		struct prediction *prediction = prediction_of(twin->pid);
		int fd = prediction == NULL ? -1 : open_predicted(prediction);
		if (fd >= 0)
			return fd;
	}
	return (int) syscall(SYS_openat, directory, path, flags, mode);
}

int openat(int directory, const char *path, int flags, ...)
{
	va_list values;

	va_start(values, flags);
	mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(values, mode_t) : 0;
	va_end(values);
	return open_at(directory, path, flags, mode);
}

/* The same on a 64-bit system; CRIU is compiled to call this one. */
int openat64(int directory, const char *path, int flags, ...)
{
	va_list values;

	va_start(values, flags);
	mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(values, mode_t) : 0;
	va_end(values);
	return open_at(directory, path, flags | O_LARGEFILE, mode);
}
