/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef OUTLAST_TWIN_H
#define OUTLAST_TWIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

struct range {
	uint64_t start, end;
};

/* The private memory of one process, in order of address; shared mappings and the kernel's own are left out. */
struct layout {
	struct range *ranges;
	size_t count;
	struct range vdso; /* empty: there is none */
};

/* A process of the job and its twin. *hidden* is what the twin surely holds, so CRIU need not. */
struct twin {
	pid_t pid, twin;
	struct layout hidden;
	struct twin *next;
};

/* The twins that have been made; NULL before and after a dump, and in every program but CRIU. */
extern struct twin *twins;

/* Waits until all twins are there and the processes stand still again, as CRIU may think they do all the time. False: CRIU
 * must give the dump up, and has been told why. */
bool settle_twins(void);

/* Has no processor go to sleep from now on, until the dump is done. Where that cannot be had nothing is changed. */
void keep_processors_awake(void);

/* CRIU's calls of ptrace() come to this library, which settles the twins before the first that follows on their making. */
extern bool answers_ptrace;

/* What to have a stopped process do; see inject(). */
struct order {
	bool fork;	     /* make a twin */
	long call;	     /* a system call to make first, 0 for none */
	long arguments[4];   /* its arguments */
	pid_t twin;	     /* out: the twin, stopped and traced by this process, to be killed if that ends; or 0 */
	uint64_t beat;	     /* out: the address of the twin's counter */
	unsigned fork_usecs; /* out: how long the copying took */
};

/* Reads /proc/PID/maps. Returns false, and says so, when it cannot. */
bool layout_read(struct layout *layout, pid_t pid);
void layout_free(struct layout *layout);

/* A process at work on an order. */
struct work {
	pid_t pid, helper;
	int memory;
	uint64_t room, mask;
	struct user_regs_struct registers; /* what it is to go on with */
	long options;
	uint64_t begin;		    /* when the copying began, in µs */
	bool started, entered, done; /* entered: it is within a system call */
	int masked;		     /* how often it has set its signal mask */
};

/* Has process PID, which this process traces and which is stopped by PTRACE_INTERRUPT, carry out *order*,
 * and stop again as it was. Returns NULL, or the reason why the process could not be made to; then, too, it is
 * stopped as it was, unless it was killed. */
const char *inject(pid_t pid, const struct range *vdso, struct order *order);

/* The same in two halves, which several processes may be between at a time: after the first each copies its
 * memory by itself. *problem* is what the first half returned; the second is due in any case. */
const char *begin_work(struct work *work, pid_t pid, const struct range *vdso, struct order *order);
const char *end_work(struct work *work, const char *problem, struct order *order);

/* Whether CRIU's question about the pages of a process, in *arguments* of ioctl(*fd*, PAGEMAP_SCAN), is one
 * that *hidden* has an answer to; then *result* is that of the ioctl. */
struct pm_scan_arg;
bool is_about_pages(const struct pm_scan_arg *arguments);
long scan_visible(int fd, struct pm_scan_arg *arguments, const struct layout *hidden);

/* Whether some private page of the range is in memory or swapped out; false, too, where that cannot be told. */
bool has_pages(int pagemap, const struct range *range);

/* A line in CRIU's log. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
