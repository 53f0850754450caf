/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What memory a process has, and which of it is shown to CRIU. */
#define _GNU_SOURCE
#include "twin.h"

#include <errno.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

bool layout_read(struct layout *layout, pid_t pid)
{
	char path[64], *line = NULL;
	size_t length = 0, room = 0;
	bool whole = true;

	memset(layout, 0, sizeof(*layout));
	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return false;
	while (getline(&line, &length, file) > 0) {
		struct range range;
		char access[8];
		int name = 0;

		/* proc_pid_maps(5) */
		if (sscanf(line, "%lx-%lx %7s %*s %*s %*s %n", &range.start, &range.end, access, &name) < 3 || name == 0) {
			whole = false;
			break;
		}
		if (strncmp(line + name, "[vdso]", 6) == 0) {
			layout->vdso = range;
			continue;
		}
		if (access[3] != 'p' || strncmp(line + name, "[vvar", 5) == 0 ||
		    strncmp(line + name, "[vsyscall]", 10) == 0)
			continue;
		if (layout->count == room) {
			room = room != 0 ? 2 * room : 64;
			struct range *more = realloc(layout->ranges, room * sizeof(*more));
			if (more == NULL) {
				whole = false;
				break;
			}
			layout->ranges = more;
		}
		layout->ranges[layout->count++] = range;
	}
	free(line);
	fclose(file);
	if (!whole)
		layout_free(layout);
	return whole;
}

void layout_free(struct layout *layout)
{
	free(layout->ranges);
	memset(layout, 0, sizeof(*layout));
}

bool has_pages(int pagemap, const struct range *range)
{
	struct page_region region;
	/* The same question as CRIU's: what is in memory or swapped out, and neither a file's nor the zero page. */
	struct pm_scan_arg arguments = {
		.size = sizeof(arguments),
		.start = range->start,
		.end = range->end,
		.vec = (uintptr_t) &region,
		.vec_len = 1,
		.max_pages = 1,
		.category_inverted = PAGE_IS_PFNZERO | PAGE_IS_FILE,
		.category_mask = PAGE_IS_PFNZERO | PAGE_IS_FILE,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT,
	};

	return syscall(SYS_ioctl, pagemap, PAGEMAP_SCAN, &arguments) > 0;
}

bool is_about_pages(const struct pm_scan_arg *arguments)
{
	return (arguments->category_anyof_mask & PAGE_IS_PRESENT) != 0;
}

long scan_visible(int fd, struct pm_scan_arg *arguments, const struct layout *hidden)
{
	uint64_t at = arguments->start;
	size_t low = 0, high = hidden->count;
	long found = 0;

	/* The first range that ends behind the start. */
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (hidden->ranges[middle].end <= at)
			low = middle + 1;
		else
			high = middle;
	}
	while (at < arguments->end) {
		const struct range *next = low < hidden->count ? &hidden->ranges[low] : NULL;
		if (next != NULL && next->start <= at) {
			at = next->end;
			low++;
			continue;
		}
		struct pm_scan_arg part = *arguments;
		part.start = at;
		part.end = next != NULL && next->start < arguments->end ? next->start : arguments->end;
		part.vec = arguments->vec + (uint64_t) found * sizeof(struct page_region);
		part.vec_len = arguments->vec_len - (uint64_t) found;
		if (part.vec_len == 0) {
			arguments->walk_end = at;
			return found;
		}
		long more = syscall(SYS_ioctl, fd, PAGEMAP_SCAN, &part);
		if (more < 0)
			return -1;
		found += more;
		if (part.walk_end < part.end) {
			arguments->walk_end = part.walk_end;
			return found;
		}
		at = part.end;
	}
	arguments->walk_end = arguments->end;
	return found;
}
