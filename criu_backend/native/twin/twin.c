/* SPDX-License-Identifier: GPL-2.0-only
 *
 * outlast-twin.so: lets an unmodified CRIU make a forked checkpoint.
 *
 * It is both a plugin of CRIU (--libdir) and preloaded into it (LD_PRELOAD).
 *
 * 1. When the tree is frozen the plugin has every process make a copy-on-write twin (inject.c), as many at a time as
 *    there are processors, and writes them down in the image directory's file "twins": lines "PID TWIN BEAT USECS", where TWIN is 0 for a process
 *    that has none, BEAT the hexadecimal address of the counter by which the twin is kept alive, and USECS how
 *    long the copying took. All PIDs are those of CRIU's own PID namespace. A line of one number, the last,
 *    says for how many microseconds the tree has stood still.
 * 2. CRIU asks the kernel which pages there are by ioctl(PAGEMAP_SCAN), which is answered here: private memory
 *    that the twin holds looks empty. So CRIU writes everything but that, and lets the job run on.
 *
 * 3. What else CRIU asks that needs a walk through all page tables is answered from what was seen before the
 *    freezing of the tree whose root is $OUTLAST_TWIN_ROOT (predict.c).
 * 4. When the twins are made, the process that listens on the unix socket $OUTLAST_NOTIFY is told, as the action script
 *    tells it of a plain dump. It does its part while CRIU does the rest, and answers with a byte,
 *    without which the tree is not let go.
 *
 * With $OUTLAST_TWIN_MEND set none of this is done, but what a CRIU that was killed may have left undone: the job's
 * root takes orphans again.
 *
 * The pages are read from the twins afterwards. Where a process could be given no twin nothing of it is
 * hidden, and CRIU dumps it as it always does. */
#define _GNU_SOURCE
#include "plugin.h"
#include "predict.h"
#include "twin.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/prctl.h>
#include <linux/ptrace.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct twin *twins;
static bool made;
static int record = -1;
static int listener = -1;
static struct timespec frozen;
static bool dumping;
static int awake = -1;

void say(const char *format, ...)
{
	char text[512];
	va_list values;

	va_start(values, format);
	vsnprintf(text, sizeof(text), format, values);
	va_end(values);
	if (print_on_level != NULL)
		print_on_level(LOG_WARNING, "Warn  (outlast-twin): %s\n", text);
}

/* A process stops for CRIU some 25 times, and each time one processor wakes another. To wake one that has gone idle takes
 * many times as long as what it is woken for, above all in a virtual machine; and while the tree is frozen most are
 * idle. The kernel forgets the wish with the file. Source: Documentation/power/pm_qos_interface.rst. */
void keep_processors_awake(void)
{
	const int32_t latency_usecs = 0;

	if (!dumping || awake >= 0)
		return;
	awake = open("/dev/cpu_dma_latency", O_WRONLY | O_CLOEXEC);
	if (awake >= 0 && write(awake, &latency_usecs, sizeof(latency_usecs)) < 0)
		say("/dev/cpu_dma_latency: %s", strerror(errno));
}

static bool write_down(pid_t pid, const struct order *order)
{
	char line[128];
	int length = snprintf(line, sizeof(line), "%d %d %lx %u\n", pid, order->twin, order->beat, order->fork_usecs);

	return write(record, line, (size_t) length) == length;
}

static pid_t parent_of(pid_t pid)
{
	char path[64], text[512];
	pid_t parent = -1;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	if (length > 0) {
		text[length] = '\0';
		const char *name_end = strrchr(text, ')');
		if (name_end == NULL || sscanf(name_end + 1, " %*c %d", &parent) != 1)
			parent = -1;
	}
	return parent;
}

/* Kills a twin that is still stopped. Whose child it is learns of its end. */
static void discard(pid_t twin)
{
	int status;

	kill(twin, SIGKILL);
	while (waitpid(twin, &status, __WALL) == twin && !WIFEXITED(status) && !WIFSIGNALED(status))
		;
}

/* Of the process's private memory, hides only what the twin holds. MADV_DONTFORK has it missing there and
 * MADV_WIPEONFORK empty; huge pages of hugetlbfs may be taken from the twin by the process's next write. */
static void hide(struct twin *twin)
{
	struct layout held, *hidden = &twin->hidden;
	char path[64];
	size_t at = 0, kept = 0;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", twin->pid);
	int mine = open(path, O_RDONLY | O_CLOEXEC);
	snprintf(path, sizeof(path), "/proc/%d/pagemap", twin->twin);
	int theirs = open(path, O_RDONLY | O_CLOEXEC);
	if (mine >= 0 && theirs >= 0 && layout_read(&held, twin->twin)) {
		for (size_t i = 0; i < hidden->count; i++) {
			const struct range range = hidden->ranges[i];
			while (at < held.count && held.ranges[at].start < range.start)
				at++;
			bool same = at < held.count && held.ranges[at].start == range.start &&
				    held.ranges[at].end == range.end;
			if (same && (has_pages(theirs, &range) || !has_pages(mine, &range)))
				hidden->ranges[kept++] = range;
		}
		layout_free(&held);
	}
	hidden->count = kept;
	if (mine >= 0)
		close(mine);
	if (theirs >= 0)
		close(theirs);
}

/* A process whose twin is being made. */
struct making {
	struct layout layout;
	struct order order;
	struct work work;
	const char *problem;
};

/* Those that are being made, a ring; on each processor one can be. */
static struct making *making;
static unsigned places, oldest, under_way;

/* Starts on the twin of one process. *first* is the tree's root. */
static void begin_twin(struct making *one, pid_t pid, bool first)
{
	memset(one, 0, sizeof(*one));
	one->order.fork = true;
	one->work.pid = pid;
	one->work.memory = -1;
	if (first) {
		/* The root takes its tree's orphans, and must not have the twins: see finish_root(). */
		one->order.call = SYS_prctl;
		one->order.arguments[0] = PR_SET_CHILD_SUBREAPER;
	}
	if (!layout_read(&one->layout, pid))
		one->problem = "its memory map cannot be read";
	else
		one->problem = begin_work(&one->work, pid, &one->layout.vdso, &one->order);
}

/* Ends what begin_twin() began; returns the twin, of which hide() is due, or says why there is none. */
static struct twin *end_twin(struct making *one)
{
	struct order *order = &one->order;
	const pid_t pid = one->work.pid;
	char path[64];
	const char *problem = end_work(&one->work, one->problem, order);
	struct twin *twin = calloc(1, sizeof(*twin));
	if (problem == NULL && order->twin != 0 && parent_of(order->twin) != 1) {
		pid_t parent = parent_of(order->twin);
		discard(order->twin);
		struct layout other;
		struct order reap = { .call = SYS_wait4, .arguments = { order->twin, 0, __WALL, 0 } };
		/* An ancestor's own twin is made already. */
		if (layout_read(&other, parent)) {
			inject(parent, &other.vdso, &reap);
			layout_free(&other);
		}
		order->twin = 0;
		problem = "another process of the job takes orphans";
	}
	if (problem == NULL && order->twin != 0 && (twin == NULL || !write_down(pid, order))) {
		discard(order->twin);
		order->twin = 0;
		problem = "it could not be written down";
	}
	if (problem == NULL && order->twin != 0) {
		twin->pid = pid;
		twin->twin = order->twin;
		/* The first to go when memory is short. */
		snprintf(path, sizeof(path), "/proc/%d/oom_score_adj", order->twin);
		int fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd < 0 || write(fd, "1000", 4) != 4)
			say("%s: %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
		syscall(SYS_ptrace, PTRACE_DETACH, (long) order->twin, NULL, NULL);
		twin->hidden = one->layout;
		twin->next = twins;
		twins = twin;
		return twin;
	}
	say("%d has no twin: %s", pid, problem != NULL ? problem : "it made none");
	order->twin = 0;
	order->beat = 0;
	write_down(pid, order);
	free(twin);
	layout_free(&one->layout);
	return NULL;
}

static struct twin *end_oldest(void)
{
	struct twin *twin = end_twin(&making[oldest]);

	oldest = (oldest + 1) % places;
	under_way--;
	return twin;
}

/* The children of a process, behind each other and then 0. To be freed. */
static pid_t *children_of(pid_t pid)
{
	char path[300];
	struct dirent *entry;
	size_t count = 0, room = 16;
	pid_t *found = calloc(room, sizeof(*found));

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	DIR *tasks = opendir(path);
	while (found != NULL && tasks != NULL && (entry = readdir(tasks)) != NULL) {
		snprintf(path, sizeof(path), "/proc/%d/task/%s/children", pid, entry->d_name);
		FILE *children = entry->d_name[0] == '.' ? NULL : fopen(path, "re");
		while (found != NULL && children != NULL && fscanf(children, "%d", &found[count]) == 1) {
			if (++count == room) {
				pid_t *more = reallocarray(found, room *= 2, sizeof(*found));
				if (more == NULL)
					free(found);
				found = more;
			}
		}
		if (children != NULL)
			fclose(children);
	}
	if (tasks != NULL)
		closedir(tasks);
	if (found != NULL)
		found[count] = 0;
	return found;
}

/* Calls *act* with a process and with all below it, parents first. What *act* adds to the tree is passed over. */
static void for_tree(pid_t pid, void (*act)(pid_t pid))
{
	pid_t *children = children_of(pid);

	act(pid);
	for (size_t i = 0; children != NULL && children[i] != 0; i++)
		for_tree(children[i], act);
	free(children);
}

static pid_t root;

/* The processes copy their memory side by side, as many as there are processors. */
static void make_twin_of(pid_t pid)
{
	unsigned long nothing;

	/* What cannot be asked is not traced, and has ended. */
	if (syscall(SYS_ptrace, PTRACE_GETEVENTMSG, (long) pid, NULL, &nothing) < 0)
		return;
	struct twin *twin = under_way == places ? end_oldest() : NULL;
	begin_twin(&making[(oldest + under_way) % places], pid, pid == root);
	under_way++;
	if (twin != NULL)
		hide(twin);
}

/* Has the root take orphans again, as a job's root always does. If CRIU dies before this, the next dump does
 * it: see $OUTLAST_TWIN_MEND. */
static void finish_root(pid_t pid)
{
	struct layout layout;
	struct order order = { .call = SYS_prctl, .arguments = { PR_SET_CHILD_SUBREAPER, 1, 0, 0 } };

	if (!layout_read(&layout, pid))
		return;
	const char *problem = inject(pid, &layout.vdso, &order);
	if (problem != NULL)
		say("%d: %s", pid, problem);
	layout_free(&layout);
}

static bool tell_listener(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = getenv("OUTLAST_NOTIFY");

	if (path == NULL)
		return true;
	if (strlen(path) < sizeof(address.sun_path)) {
		strcpy(address.sun_path, path);
		listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (listener >= 0 && connect(listener, (struct sockaddr *) &address, sizeof(address)) == 0)
			return true;
	}
	say("whoever waits for the tree to be frozen cannot be told: %s", strerror(errno));
	return false;
}

bool settle_twins(void)
{
	if (making == NULL)
		return true;
	while (under_way > 0) {
		struct twin *twin = end_oldest();
		if (twin != NULL)
			hide(twin);
	}
	free(making);
	making = NULL;
	finish_root(root);
	return tell_listener();
}

/* CRIU calls this for each task of the frozen tree, the root first; all is done at the first call. */
static int on_frozen(int pid)
{
	if (made)
		return 0;
	made = true;
	keep_processors_awake();
	clock_gettime(CLOCK_MONOTONIC, &frozen);
	if (getenv("OUTLAST_TWIN_MEND") != NULL) {
		finish_root(pid);
		return 0;
	}
	record = openat(criu_get_image_dir(), "twins", O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0600);
	if (record < 0) {
		say("twins: %s", strerror(errno));
		return -1;
	}
	root = pid;
	places = (unsigned) sysconf(_SC_NPROCESSORS_ONLN) + 1;
	making = calloc(places, sizeof(*making));
	if (making == NULL)
		return -1;
	for_tree(pid, make_twin_of);
	/* CRIU has a millisecond's work before it turns to the processes, of which some copy their memory still. */
	return answers_ptrace || settle_twins() ? 0 : -1;
}

static int on_init(int stage)
{
	/* What CRIU starts has no need of this. */
	unsetenv("LD_PRELOAD");
	dumping = stage == STAGE_DUMP;
	made = !dumping;
	const char *expected = getenv("OUTLAST_TWIN_ROOT");
	if (dumping && expected != NULL)
		for_tree(atoi(expected), predict);
	return 0;
}

static void on_exit_(int stage, int error)
{
	struct timespec now;
	char answer;

	(void) stage;
	settle_twins();
	if (listener >= 0) {
		/* Its end, without an answer, is one: nobody needs the tree to stand still any more. */
		while (error == 0 && read(listener, &answer, 1) < 0 && errno == EINTR)
			;
		close(listener);
	}
	forget_predictions();
	if (record >= 0) {
		/* CRIU's own figure is wrong when it has served lazy pages. */
		clock_gettime(CLOCK_MONOTONIC, &now);
		dprintf(record, "%ld\n", (now.tv_sec - frozen.tv_sec) * 1000000 + (now.tv_nsec - frozen.tv_nsec) / 1000);
		close(record);
	}
	if (awake >= 0)
		close(awake);
	awake = -1;
	dumping = false;
	while (twins != NULL) {
		struct twin *twin = twins;
		twins = twin->next;
		if (error != 0)
			kill(twin->twin, SIGKILL);
		layout_free(&twin->hidden);
		free(twin);
	}
}

struct plugin CR_PLUGIN_DESC = {
	.name = "outlast-twin",
	.init = on_init,
	.exit = on_exit_,
	.version = PLUGIN_VERSION,
	.hook_count = HOOKS,
	.hooks = { [HOOK_CHECKPOINT_DEVICES] = (void *) on_frozen },
};
