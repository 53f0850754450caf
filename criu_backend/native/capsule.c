/* SPDX-License-Identifier: Apache-2.0
 *
 * outlast-capsule: a job in its own PID, mount and IPC namespaces, under a mini-init that is PID 1.
 *
 *   outlast-capsule start --peer PID --pidfd FD --status FD --report FD --state FD --program FD [--no-filter]
 *   outlast-capsule restore (the same) --last-pid N [--pager FD --pages FD]
 *       Takes the context of process PID and makes a capsule in it. "start" runs the program as PID's
 *       user with this process's descriptors 0-2; "restore" runs the program (CRIU) as root, with
 *       /dev/null as 0-2 and this process's descriptors 0-2 as 10-12, and adopts what it restored.
 *       With a pager (CRIU's lazy-pages daemon, a program like the other), that runs beside the restored tree
 *       until it has given it all its pages: it gets the descriptor of --pages as 13, and writes to 14 when it is
 *       ready, which the first program can read from its own 14. Should it fail, everything in the capsule ends at
 *       once, since pages that it has not given would be read as zeros.
 *   outlast-capsule enter PID -- PROGRAM [ARGUMENT...]
 *       Runs PROGRAM inside the capsule whose init is PID (as this PID namespace numbers it); ends with its
 *       exit code. Signals other than SIGKILL are ignored: a CRIU that is killed may kill the job.
 *   CRTOOLS_SCRIPT_ACTION=... outlast-capsule
 *       CRIU's action script: at "post-dump", with the job still standing, tells the process that listens
 *       on the unix socket $OUTLAST_NOTIFY, and waits for its consent.
 *
 * Descriptors: pidfd is of the peer; status is a SOCK_SEQPACKET pair to the peer (in: int32 signal to send to
 * the job; out: int32 wait status of the job; its end means that the peer is gone, and the job with it);
 * report is one end of a stream socket pair and takes lines: "init PID", upon which it must be answered with a
 * byte before anything of the job runs, then "ready NSPID", or "error TEXT"; state is a directory, in which
 * "exit" (the wait status) is written when the job has ended, and "asked-to-end" before the job is sent SIGTERM
 * or SIGINT; program is a file of NUL-terminated strings: the count of arguments, the arguments, the environment.
 *
 * CRIU runs inside the two namespaces (PID and mount), so its images hold neither, and the PIDs that it
 * restores cannot be taken. Native code, since PID 1 should cost a job neither an interpreter's memory nor
 * its start-up time, and Python 3.11 has no setns(). */
#define _GNU_SOURCE
#include "capsule.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/kcmp.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sysexits.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * The job's first PID is above that of the few processes that start before it, and another one for each job on a node:
 * programs name their files in /tmp after their PIDs (mpirun, and every script with $$), and jobs share that.
 */
#define FIRST_JOB_PID 1000
#define FIRST_JOB_PIDS 10000
#define FAR_APART 7919
#define INHERITED_STDIO 10
#define PAGES_FD 13
#define READY_FD 14
#define FIRST_FREE_FD 16
#define NO_PERMISSION 126
#define NOT_FOUND 127

struct options {
	bool restore;
	bool filter;
	pid_t peer;
	int pidfd, status, report, state, program, pager, pages;
	long last_pid;
};

struct program {
	char **arguments;
	char **environment;
};

static int report_fd = STDERR_FILENO;
static pid_t pager;
static const char *report_prefix = "error ";

static void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void report(const char *format, ...)
{
	char line[8192];
	va_list values;

	va_start(values, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, values);
	va_end(values);
	if (length > (int) sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	/* Whoever made this capsule may be gone; the job does not need it. */
	if (write(report_fd, line, (size_t) length) < 0)
		errno = 0;
}

void die(const char *format, ...)
{
	char text[8000];
	va_list values;

	va_start(values, format);
	vsnprintf(text, sizeof(text), format, values);
	va_end(values);
	report("%s%s", report_prefix, text);
	_exit(EXIT_FAILURE);
}

static void write_file(int directory, const char *path, const char *text)
{
	int fd = openat(directory, path, O_WRONLY | O_CLOEXEC | O_CREAT | O_TRUNC, 0600);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die("%s: %s", path, strerror(errno));
	close(fd);
}

static struct program read_program(int fd)
{
	struct stat info;
	struct program program;

	if (fstat(fd, &info) < 0 || info.st_size == 0)
		die("the program is empty");
	char *text = malloc((size_t) info.st_size);
	if (text == NULL || pread(fd, text, (size_t) info.st_size, 0) != info.st_size ||
	    text[info.st_size - 1] != '\0')
		die("the program cannot be read");
	size_t count = 0;
	for (off_t i = 0; i < info.st_size; i++)
		count += text[i] == '\0';
	char **strings = calloc(count + 2, sizeof(char *));
	if (strings == NULL)
		die("out of memory");
	size_t arguments = strtoul(text, NULL, 10);
	if (arguments == 0 || arguments >= count)
		die("the program has no arguments");
	char *at = text + strlen(text) + 1;
	program.arguments = strings;
	program.environment = strings + arguments + 1;
	for (size_t i = 0; i + 1 < count; i++) {
		strings[i < arguments ? i : i + 1] = at;
		at += strlen(at) + 1;
	}
	return program;
}

/* What CRIU cannot dump and programs can do without: io_uring (libuv) and MPTCP (Go's listeners) are answered
 * as an old kernel would answer. */
static void install_filter(void)
{
#if defined(__x86_64__)
	const unsigned int arch = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
	const unsigned int arch = AUDIT_ARCH_AARCH64;
#else
	return;
#endif
	enum { MPTCP = 262 };
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, arch, 0, 7),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MPTCP, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPROTONOSUPPORT),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { .len = sizeof(code) / sizeof(*code), .filter = code };

	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) < 0)
		die("seccomp filter: %s", strerror(errno));
}

/* Descriptors 0-2 belong to mounts of the namespace outside, which CRIU cannot look up from inside: open
 * the same files again by name. Two descriptors that share one open file go on sharing it. */
static void reopen_stdio(void)
{
	int reopened[3] = { -1, -1, -1 };

	for (int fd = 0; fd < 3; fd++) {
		struct stat old, new;
		char link[32], path[PATH_MAX];
		if (fstat(fd, &old) < 0 || !(S_ISREG(old.st_mode) || S_ISCHR(old.st_mode)) || isatty(fd))
			continue;
		for (int other = 0; other < fd && reopened[fd] < 0; other++) {
			if (reopened[other] >= 0 &&
			    syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, fd, other) == 0)
				reopened[fd] = reopened[other];
		}
		if (reopened[fd] >= 0)
			continue;
		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		ssize_t length = readlink(link, path, sizeof(path) - 1);
		if (length < 0)
			continue;
		path[length] = '\0';
		int flags = fcntl(fd, F_GETFL) & ~(O_CREAT | O_EXCL | O_TRUNC);
		int opened = open(path, flags | O_NOCTTY | O_CLOEXEC);
		if (opened < 0)
			continue;
		bool same = fstat(opened, &new) == 0 &&
			    (S_ISCHR(old.st_mode) ? S_ISCHR(new.st_mode) && new.st_rdev == old.st_rdev
						  : new.st_ino == old.st_ino && new.st_dev == old.st_dev);
		if (!same) {
			close(opened);
			continue;
		}
		if (S_ISREG(old.st_mode))
			lseek(opened, lseek(fd, 0, SEEK_CUR), SEEK_SET);
		reopened[fd] = opened;
	}
	for (int fd = 0; fd < 3; fd++) {
		if (reopened[fd] >= 0)
			dup2(reopened[fd], fd);
	}
}

static void reset_signals(void)
{
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void run_job(const struct context *context, const struct program *program, bool filter)
{
	/* From here on an error is the job's own: it goes where the job's errors go. */
	report_fd = STDERR_FILENO;
	report_prefix = "outlast: ";
	/* Orphans stay below the job's root, and so in its images. */
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	if (unshare(CLONE_NEWIPC) < 0 || setsid() < 0)
		die("a new IPC namespace and session: %s", strerror(errno));
	if (filter)
		install_filter();
	context_become(context);
	reopen_stdio();
	reset_signals();
	close_range(3, ~0U, 0);
	environ = program->environment;
	execvp(program->arguments[0], program->arguments);
	int error = errno;
	dprintf(STDERR_FILENO, "outlast: %s: %s\n", program->arguments[0], strerror(error));
	_exit(error == ENOENT ? NOT_FOUND : NO_PERMISSION);
}

/* Starts the program that brings pages after the restore; returns a descriptor to read from when it is ready to. */
static int start_pager(const struct options *options)
{
	struct program program = read_program(options->pager);
	int ready[2];

	if (pipe2(ready, O_CLOEXEC) < 0)
		die("a pipe: %s", strerror(errno));
	pager = fork();
	if (pager == 0) {
		int devnull = fcntl(open("/dev/null", O_RDWR), F_DUPFD, FIRST_FREE_FD);
		int pages = fcntl(options->pages, F_DUPFD, FIRST_FREE_FD);
		int done = fcntl(ready[1], F_DUPFD, FIRST_FREE_FD);
		for (int fd = 0; fd < 3; fd++)
			dup2(devnull, fd);
		if (dup2(pages, PAGES_FD) < 0 || dup2(done, READY_FD) < 0)
			die("the pager's descriptors: %s", strerror(errno));
		close_range(3, PAGES_FD - 1, 0);
		close_range(READY_FD + 1, ~0U, 0);
		reset_signals();
		environ = program.environment;
		execvp(program.arguments[0], program.arguments);
		_exit(NOT_FOUND);
	}
	close(ready[1]);
	close(options->pages);
	if (pager < 0)
		die("starting the pager: %s", strerror(errno));
	return ready[0];
}

/* Runs CRIU; returns the PID, in this namespace, of the root of what it restored. */
static pid_t run_restore(const struct options *options, const struct program *program)
{
	char text[32];
	int status, ready = -1;

	snprintf(text, sizeof(text), "%ld", options->last_pid);
	write_file(AT_FDCWD, "/proc/sys/kernel/ns_last_pid", text);
	if (options->pager >= 0)
		ready = start_pager(options);
	pid_t criu = fork();
	if (criu == 0) {
		/* Out of the way of the descriptors that are about to be filled. */
		int devnull = fcntl(open("/dev/null", O_RDWR), F_DUPFD, FIRST_FREE_FD);
		int pager_ready = fcntl(ready, F_DUPFD, FIRST_FREE_FD);
		for (int fd = 0; fd < 3; fd++) {
			if (dup2(fd, INHERITED_STDIO + fd) < 0 || dup2(devnull, fd) < 0)
				die("descriptor %d: %s", fd, strerror(errno));
		}
		/* They start side by side: the library that is loaded into CRIU has it wait when it comes to need the pager. */
		if (pager_ready >= 0 && dup2(pager_ready, READY_FD) < 0)
			die("descriptor %d: %s", READY_FD, strerror(errno));
		close_range(3, INHERITED_STDIO - 1, 0);
		close_range(INHERITED_STDIO + 3, READY_FD - 1, 0);
		close_range(pager_ready >= 0 ? READY_FD + 1 : READY_FD, ~0U, 0);
		reset_signals();
		environ = program->environment;
		execvp(program->arguments[0], program->arguments);
		_exit(NOT_FOUND);
	}
	if (ready >= 0)
		close(ready);
	if (criu < 0 || waitpid(criu, &status, 0) != criu)
		die("starting CRIU: %s", strerror(errno));
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
		die("criu restore ended with status %d", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
	int fd = openat(options->state, "restored.pid", O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (length <= 0)
		die("criu restore left no PID");
	text[length] = '\0';
	close(fd);
	return (pid_t) strtol(text, NULL, 10);
}

static void job_ended(const struct options *options, int status)
{
	char text[32];
	int32_t message = status;

	/* Written first: once the scheduler hears of the end, it kills what is left, and this process with it. */
	snprintf(text, sizeof(text), "%d\n", status);
	write_file(options->state, "exit.new", text);
	renameat(options->state, "exit.new", options->state, "exit");
	send(options->status, &message, sizeof(message), MSG_NOSIGNAL);
	/* The kernel kills what the job left behind, as a scheduler does when a batch script has ended. */
	_exit(EXIT_SUCCESS);
}

static void reap(const struct options *options, pid_t job)
{
	int status;
	pid_t pid;

	/* Looked at first: what the job did after its pager had failed must not be taken for its work. */
	if (pager > 0 && waitpid(pager, &status, WNOHANG) == pager) {
		if (status != 0)
			_exit(EXIT_FAILURE);
		pager = 0;
	}
	while ((pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0) {
		if (pid == pager && status != 0)
			_exit(EXIT_FAILURE);
		if (pid == job)
			job_ended(options, status);
	}
}

/* Leave word that the job was asked to end: one that then ends well has not done its work. */
static void note_request(const struct options *options, int number)
{
	if (number != SIGTERM && number != SIGINT)
		return;
	int fd = openat(options->state, "asked-to-end", O_WRONLY | O_CLOEXEC | O_CREAT, 0600);
	if (fd >= 0)
		close(fd);
}

static void serve_job(const struct options *options, pid_t job, int signals)
{
	struct pollfd polled[] = { { options->status, POLLIN, 0 }, { signals, POLLIN, 0 } };
	struct signalfd_siginfo info;
	int32_t number;

	for (;;) {
		reap(options, job);
		if (poll(polled, 2, -1) < 0)
			continue;
		while (read(signals, &info, sizeof(info)) > 0)
			;
		if (polled[0].revents == 0)
			continue;
		ssize_t length = recv(options->status, &number, sizeof(number), MSG_DONTWAIT);
		if (length == (ssize_t) sizeof(number)) {
			note_request(options, number);
			kill(job, number);
		} else if (length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR))
			/* The peer is gone: the scheduler has killed the job. */
			_exit(EXIT_FAILURE);
	}
}

static void be_init(const struct options *options, const struct context *context, const struct program *program)
{
	sigset_t all;
	pid_t job;
	char consent;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	/* Even the shortest job is known before it runs: one that had ended unseen would be run again. */
	if (read(report_fd, &consent, 1) != 1)
		_exit(EXIT_FAILURE);
	int signals = signalfd(-1, &all, SFD_NONBLOCK | SFD_CLOEXEC);
	prctl(PR_SET_NAME, "outlast-init");
	setsid();
	if (signals < 0 || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 ||
	    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
		die("a new /proc: %s", strerror(errno));
	if (options->restore) {
		job = run_restore(options, program);
	} else {
		char text[32];
		long first = FIRST_JOB_PID + (long) options->peer * FAR_APART % FIRST_JOB_PIDS;
		snprintf(text, sizeof(text), "%ld", first - 1);
		write_file(AT_FDCWD, "/proc/sys/kernel/ns_last_pid", text);
		job = fork();
		if (job == 0)
			run_job(context, program, options->filter);
		if (job < 0)
			die("starting the job: %s", strerror(errno));
	}
	int devnull = open("/dev/null", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		dup2(devnull, fd);
	if (devnull > 2)
		close(devnull);
	if (chdir("/") < 0)
		die("/: %s", strerror(errno));
	report("ready %d", job);
	close(report_fd);
	report_fd = STDERR_FILENO;
	serve_job(options, job, signals);
}

static void make_capsule(struct options *options)
{
	struct context context;
	struct pollfd peer = { options->pidfd, POLLIN, 0 };
	struct program program = read_program(options->program);

	context_read(&context, options->peer);
	context_join(&context);
	/* While the peer lives its PID is not another's, so all of this was its own. */
	if (poll(&peer, 1, 0) != 0)
		die("process %d has ended", options->peer);
	if (unshare(CLONE_NEWPID | CLONE_NEWNS) < 0)
		die("new PID and mount namespaces: %s", strerror(errno));
	close(options->pidfd);
	pid_t init = fork();
	if (init < 0)
		die("starting init: %s", strerror(errno));
	if (init == 0)
		be_init(options, &context, &program);
	/* init has no need of this process: it answers to the peer, and whoever reaps orphans reaps it. */
	report("init %d", init);
	_exit(EXIT_SUCCESS);
}

static int enter(pid_t init, char **arguments)
{
	static const char *const names[] = { "net", "uts", "pid", "mnt", NULL };
	int status;

	for (int number = 1; number < NSIG; number++) {
		if (number != SIGCHLD)
			signal(number, SIG_IGN);
	}
	setsid();
	join_namespaces(init, names);
	if (chdir("/") < 0)
		die("/: %s", strerror(errno));
	pid_t pid = fork();
	if (pid == 0) {
		reset_signals();
		execvp(arguments[0], arguments);
		dprintf(STDERR_FILENO, "%s: %s\n", arguments[0], strerror(errno));
		_exit(NOT_FOUND);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		die("starting %s: %s", arguments[0], strerror(errno));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int notify(const char *action)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = getenv("OUTLAST_NOTIFY");
	char answer = '0';

	if (strcmp(action, "post-dump") != 0)
		return EXIT_SUCCESS;
	if (path == NULL || strlen(path) >= sizeof(address.sun_path))
		return EXIT_FAILURE;
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *) &address, sizeof(address)) < 0 ||
	    read(fd, &answer, 1) != 1)
		return EXIT_FAILURE;
	return answer == '1' ? EXIT_SUCCESS : EXIT_FAILURE;
}

static int usage(void)
{
	fputs("usage: outlast-capsule start|restore OPTIONS | enter PID -- PROGRAM...; 'outlast' runs it\n", stderr);
	return EX_USAGE;
}

int main(int argc, char **argv)
{
	static const struct option names[] = {
		{ "peer", required_argument, NULL, 'p' },   { "pidfd", required_argument, NULL, 'd' },
		{ "status", required_argument, NULL, 's' }, { "report", required_argument, NULL, 'r' },
		{ "state", required_argument, NULL, 't' },  { "program", required_argument, NULL, 'g' },
		{ "last-pid", required_argument, NULL, 'l' }, { "no-filter", no_argument, NULL, 'n' },
		{ "pager", required_argument, NULL, 'P' }, { "pages", required_argument, NULL, 'a' },
		{ NULL, 0, NULL, 0 },
	};
	struct options options = { .filter = true, .peer = 0, .pidfd = -1, .status = -1, .report = -1,
				   .state = -1, .program = -1, .pager = -1, .pages = -1 };
	const char *action = getenv("CRTOOLS_SCRIPT_ACTION");
	int name;

	if (argc == 1 && action != NULL)
		return notify(action);
	if (argc > 4 && strcmp(argv[1], "enter") == 0 && strcmp(argv[3], "--") == 0)
		return enter((pid_t) strtol(argv[2], NULL, 10), argv + 4);
	if (argc < 2 || (strcmp(argv[1], "start") != 0 && strcmp(argv[1], "restore") != 0))
		return usage();
	options.restore = strcmp(argv[1], "restore") == 0;
	while ((name = getopt_long(argc - 1, argv + 1, "", names, NULL)) != -1) {
		long value = optarg == NULL ? 0 : strtol(optarg, NULL, 10);
		switch (name) {
		case 'p': options.peer = (pid_t) value; break;
		case 'd': options.pidfd = (int) value; break;
		case 's': options.status = (int) value; break;
		case 'r': options.report = (int) value; break;
		case 't': options.state = (int) value; break;
		case 'g': options.program = (int) value; break;
		case 'l': options.last_pid = value; break;
		case 'n': options.filter = false; break;
		case 'P': options.pager = (int) value; break;
		case 'a': options.pages = (int) value; break;
		default: return usage();
		}
	}
	if (options.peer <= 0 || options.pidfd < 0 || options.status < 0 || options.report < 0 ||
	    options.state < 0 || options.program < 0)
		return usage();
	report_fd = options.report;
	make_capsule(&options);
	return EXIT_FAILURE;
}
