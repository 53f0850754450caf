/* SPDX-License-Identifier: Apache-2.0
 *
 * outlast-guard: stops a capsule's job when nobody has said for too long that it may run.
 *
 *   outlast-guard INIT START PEER DIRECTORY
 *
 * INIT is the PID of the capsule's init, START its start time (clock ticks since boot, proc_pid_stat(5) field 22),
 * PEER the PID of the process in whose place the job runs, or 0. The guard reads deadlines from the FIFO
 * DIRECTORY/guard: int64, nanoseconds of CLOCK_BOOTTIME, 0 for none. When the newest is over it stops every
 * process of the capsule but the init (SIGSTOP), and the file DIRECTORY/frozen is there for as long as they
 * stand still; a deadline that lies ahead has them go on. It ends with the capsule.
 *
 * A process of its own, since the manager may be stopped, hang or die, and its clock with it; in C, since it
 * must neither allocate nor load anything when it is needed. Stopped processes can be killed, which those in a
 * frozen cgroup of version 1 cannot: the scheduler would take the node for broken. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* How soon a job is stopped again that somebody else let go on, and a dump is asked after. */
#define AGAIN_NS 100000000
#define LONGEST_KEPT 4096

static int directory = -1;
static struct stat capsule_ns;
static pid_t peer;
static pid_t kept[LONGEST_KEPT]; /* processes that stood still before they were stopped here */
static int kept_count;

static void die(const char *what)
{
	fprintf(stderr, "outlast-guard: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* Read /proc/PID/NAME as a string; -1 if there is none. */
static int read_proc(pid_t pid, const char *name, char *text, size_t size)
{
	char path[64];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	length = read(fd, text, size - 1);
	close(fd);
	if (length < 0)
		return -1;
	text[length] = '\0';
	return 0;
}

/* The state letter of PID, and where asked for its start time; 0 if it is gone. */
static char state_of(pid_t pid, unsigned long long *start)
{
	char text[1024], *end, state;
	int field;

	if (read_proc(pid, "stat", text, sizeof(text)) < 0 || !(end = strrchr(text, ')')) || !end[1])
		return 0;
	state = end[2];
	if (start) {
		end += 2;
		for (field = 3; field < 22 && end; field++)
			end = strchr(end + 1, ' ');
		if (!end || sscanf(end, "%llu", start) != 1)
			return 0;
	}
	return state;
}

static pid_t tracer_of(pid_t pid)
{
	char text[2048], *found;

	if (read_proc(pid, "status", text, sizeof(text)) < 0 || !(found = strstr(text, "\nTracerPid:")))
		return 0;
	return (pid_t)atoi(found + strlen("\nTracerPid:"));
}

/* Look at the capsule's processes: note those that stand still; return 1 if CRIU has hold of one. */
static int look(int note)
{
	char path[64], name[32];
	struct dirent *entry;
	struct stat ns;
	int dumped = 0;
	DIR *proc = opendir("/proc");

	if (!proc)
		return 0;
	while ((entry = readdir(proc))) {
		pid_t pid = (pid_t)atoi(entry->d_name), tracer;

		snprintf(path, sizeof(path), "/proc/%d/ns/pid", pid);
		if (pid <= 0 || stat(path, &ns) || ns.st_ino != capsule_ns.st_ino || ns.st_dev != capsule_ns.st_dev)
			continue;
		tracer = tracer_of(pid);
		if (tracer && !read_proc(tracer, "comm", name, sizeof(name)) && !strncmp(name, "criu", 4))
			dumped = 1;
		if (note && kept_count < LONGEST_KEPT && state_of(pid, NULL) == 'T')
			kept[kept_count++] = pid;
	}
	closedir(proc);
	return dumped;
}

/* Send SIGNAL to all processes of the capsule at once, but not to its init: kill(2), "pid equals -1". */
static void signal_all(int number)
{
	pid_t child = fork(); /* into the capsule's PID namespace: see main() */

	if (child == 0) {
		kill(-1, number);
		_exit(0);
	}
	while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
}

static void freeze_job(void)
{
	int mark;

	kept_count = 0;
	look(1);
	signal_all(SIGSTOP);
	mark = openat(directory, "frozen", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	if (mark >= 0)
		close(mark);
}

static void thaw_job(void)
{
	/* Whom the scheduler suspended, with the job's stand-in, the scheduler resumes. */
	if (!peer || state_of(peer, NULL) != 'T') {
		signal_all(SIGCONT);
		for (int i = 0; i < kept_count; i++)
			kill(kept[i], SIGSTOP);
	}
	unlinkat(directory, "frozen", 0);
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_BOOTTIME, &time);
	return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void arm(int timer, int64_t at)
{
	struct itimerspec when = { .it_value = { at / 1000000000, at % 1000000000 } };

	timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static int open_feed(void)
{
	int fd;

	unlinkat(directory, "guard.new", 0);
	if (mkfifoat(directory, "guard.new", 0600))
		die("guard.new");
	fd = openat(directory, "guard.new", O_RDWR | O_NONBLOCK | O_CLOEXEC); /* RDWR: never at its end */
	if (fd < 0 || renameat(directory, "guard.new", directory, "guard"))
		die("guard");
	return fd;
}

/* Whether DIRECTORY/guard is the FIFO read here. When a slow start had another guard started, that one put its
 * own in the place, it alone hears the manager, and this one would stop the job for good. */
static int in_charge(int feed)
{
	struct stat mine, named;

	return fstat(feed, &mine) || fstatat(directory, "guard", &named, 0) ||
	       (mine.st_ino == named.st_ino && mine.st_dev == named.st_dev);
}

int main(int argc, char **argv)
{
	unsigned long long start = 0;
	int64_t deadline = 0, fed;
	int frozen, pidfd, ns, feed, timer;
	struct pollfd ready[3];
	pid_t init;

	if (argc != 5) {
		fprintf(stderr, "usage: outlast-guard INIT START PEER DIRECTORY\n");
		return 64;
	}
	init = (pid_t)atoi(argv[1]);
	peer = (pid_t)atoi(argv[3]);
	directory = open(argv[4], O_DIRECTORY | O_CLOEXEC);
	if (directory < 0)
		die(argv[4]);
	pidfd = (int)syscall(SYS_pidfd_open, init, 0);
	if (pidfd < 0 || !state_of(init, &start) || start != strtoull(argv[2], NULL, 10)) {
		fprintf(stderr, "outlast-guard: process %d is no capsule's init any more\n", init);
		return 1;
	}
	{
		char path[64];

		snprintf(path, sizeof(path), "/proc/%d/ns/pid", init);
		ns = open(path, O_RDONLY | O_CLOEXEC);
	}
	/* This process stays where it is; its children are in the capsule's. */
	if (ns < 0 || fstat(ns, &capsule_ns) || setns(ns, CLONE_NEWPID))
		die("the capsule's PID namespace");
	close(ns);
	signal(SIGPIPE, SIG_IGN);
	mlockall(MCL_CURRENT | MCL_FUTURE);
	timer = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK);
	if (timer < 0)
		die("timer");
	frozen = !faccessat(directory, "frozen", F_OK, 0); /* by a guard that was killed */
	feed = open_feed();
	ready[0] = (struct pollfd){ .fd = pidfd, .events = POLLIN };
	ready[1] = (struct pollfd){ .fd = feed, .events = POLLIN };
	ready[2] = (struct pollfd){ .fd = timer, .events = POLLIN };
	for (;;) {
		if (poll(ready, 3, -1) < 0 && errno != EINTR)
			die("poll");
		if (ready[0].revents)
			break;
		while (read(feed, &fed, sizeof(fed)) == sizeof(fed))
			deadline = fed;
		if (ready[2].revents) {
			uint64_t count;

			if (read(timer, &count, sizeof(count)) < 0 && errno != EAGAIN)
				die("timer");
		}
		if (deadline == 0 || now() < deadline) {
			if (frozen && deadline) {
				thaw_job();
				frozen = 0;
			}
			arm(timer, deadline);
			continue;
		}
		if (!in_charge(feed))
			return 0;
		if (frozen)
			signal_all(SIGSTOP); /* in case somebody let it go on */
		else if (!look(0)) {
			/* While CRIU has hold of the job it stands still, and CRIU must not be stopped. */
			freeze_job();
			frozen = 1;
		}
		arm(timer, now() + AGAIN_NS / (frozen ? 1 : 10));
	}
	unlinkat(directory, "guard", 0);
	unlinkat(directory, "frozen", 0);
	return 0;
}
