/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Two questions of CRIU's that have the kernel walk all page tables of the frozen process, which takes as long as
 * copying them, are answered from what was seen shortly before:
 *
 * - /proc/PID/smaps, of which CRIU only wants each mapping's VmFlags. The mappings themselves are read anew, from
 *   /proc/PID/maps, which costs nothing, and every line of it must be as it was. That the flags have not
 *   changed is verified in the twin, by whoever reads its pages: they are written down for that.
 * - Where there are guard regions. If there were none, there are said to be none, and that is verified alike.
 *
 * So no answer is trusted: where one was wrong the checkpoint is given up. */
#define _GNU_SOURCE
#include "predict.h"

#include "plugin.h"
#include "twin.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PAGE_IS_GUARD
#define PAGE_IS_GUARD (1 << 8)
#endif

static struct prediction *predictions;

/* Reads the whole of a file of /proc. */
static char *slurp(const char *path)
{
	size_t room = 1 << 16, length = 0;
	char *text = malloc(room);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t count = -1;

	while (fd >= 0 && text != NULL && (count = read(fd, text + length, room - length - 1)) > 0) {
		length += (size_t) count;
		if (room - length < 4096) {
			char *more = realloc(text, room *= 2);
			if (more == NULL)
				free(text);
			text = more;
		}
	}
	if (fd >= 0)
		close(fd);
	if (count < 0 || text == NULL) {
		free(text);
		return NULL;
	}
	text[length] = '\0';
	return text;
}

static bool has_guards(pid_t pid)
{
	char path[64];
	struct page_region region;
	struct pm_scan_arg arguments = {
		.size = sizeof(arguments),
		.end = 0x7ffffffff000,
		.vec = (uintptr_t) &region,
		.vec_len = 1,
		.max_pages = 1,
		.category_mask = PAGE_IS_GUARD,
		.return_mask = PAGE_IS_GUARD,
	};

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	/* On an error, as of a kernel that knows of none, CRIU is left to find out. */
	long found = fd < 0 ? -1 : syscall(SYS_ioctl, fd, PAGEMAP_SCAN, &arguments);
	if (fd >= 0)
		close(fd);
	return found != 0;
}

/* Keeps of smaps each mapping's first line and its flags, one after the other. */
static char *condense(char *smaps)
{
	char *out = smaps, *next;

	for (char *line = smaps; *line != '\0'; line = next) {
		next = strchrnul(line, '\n');
		if (*next != '\0')
			next++;
		/* A mapping's line begins with its address, in small hexadecimal digits; all others are names. */
		bool first = (*line >= '0' && *line <= '9') || (*line >= 'a' && *line <= 'f');
		if (first || strncmp(line, "VmFlags:", 8) == 0) {
			memmove(out, line, (size_t) (next - line));
			out += next - line;
		}
	}
	*out = '\0';
	return smaps;
}

void predict(pid_t pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
	char *smaps = slurp(path);
	struct prediction *prediction = smaps == NULL ? NULL : calloc(1, sizeof(*prediction));
	if (prediction == NULL) {
		free(smaps);
		return;
	}
	prediction->pid = pid;
	prediction->smaps = condense(smaps);
	prediction->no_guards = !has_guards(pid);
	prediction->next = predictions;
	predictions = prediction;
}

struct prediction *prediction_of(pid_t pid)
{
	struct prediction *prediction = predictions;

	while (prediction != NULL && prediction->pid != pid)
		prediction = prediction->next;
	return prediction;
}

void forget_predictions(void)
{
	while (predictions != NULL) {
		struct prediction *next = predictions->next;
		free(predictions->smaps);
		free(predictions);
		predictions = next;
	}
}

static unsigned long locked_kib(pid_t pid)
{
	char path[64], line[256];
	unsigned long size = 0;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	FILE *file = fopen(path, "re");
	while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
		if (sscanf(line, "VmLck: %lu", &size) == 1)
			break;
	}
	if (file != NULL)
		fclose(file);
	return size;
}

/* Whether the mappings are those that were predicted, line by line; locking, which no twin inherits, as a sum. */
static bool still_holds(const struct prediction *prediction)
{
	char path[64];
	unsigned long start, end, locked = 0;
	const char *at = prediction->smaps;
	bool same = true;

	snprintf(path, sizeof(path), "/proc/%d/maps", prediction->pid);
	char *maps = slurp(path);
	for (char *line = maps; line != NULL && *line != '\0' && same;) {
		size_t length = (size_t) (strchrnul(line, '\n') - line) + 1;
		const char *flags = at + length;
		same = strncmp(line, at, length) == 0 && strncmp(flags, "VmFlags:", 8) == 0;
		if (!same)
			break;
		at = strchrnul(flags, '\n');
		const char *lock = memmem(flags, (size_t) (at - flags), " lo", 3);
		if (lock != NULL && sscanf(line, "%lx-%lx", &start, &end) == 2)
			locked += (end - start) / 1024;
		at += *at == '\n';
		line += length;
	}
	same = same && maps != NULL && *at == '\0' && locked == locked_kib(prediction->pid);
	free(maps);
	return same;
}

int open_predicted(struct prediction *prediction)
{
	char name[64];
	size_t length = strlen(prediction->smaps);

	if (!still_holds(prediction))
		return -1;
	/* For whoever verifies it. */
	snprintf(name, sizeof(name), "predicted-%d", prediction->pid);
	int fd = openat(criu_get_image_dir(), name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0 && (write(fd, prediction->smaps, length) != (ssize_t) length || lseek(fd, 0, SEEK_SET) != 0)) {
		close(fd);
		fd = -1;
	}
	prediction->written = fd >= 0;
	return fd;
}

bool is_about_guards(const struct pm_scan_arg *arguments)
{
	return arguments->category_mask == PAGE_IS_GUARD;
}
