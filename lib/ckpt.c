/*
 * outlast_ckpt(): asks the job's manager for a checkpoint, and learns on which side of it this process then is.
 *
 * While it waits there may be nothing that CRIU cannot dump, so no connection: it looks at symbolic links in the
 * directory that $OUTLAST_JOB names. One system call is one look, and leaves no file open. `run` there is another
 * text for each run of the job; `calls/N` is what became of this request. The other end: outlast/manager/_calls.py.
 */
#define _GNU_SOURCE
#include "outlast.h"
#include "private.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { TICKET = 64, REPLY = 4096, CONNECT_SECONDS = 10, EX_USAGE = 64 };
enum { FIRST_WAIT_NS = 1000000, LONGEST_WAIT_NS = 50000000, WITHOUT_NS = 2000000000, IDENTITY = 128 };

struct hook {
	void (*before)(void *data);
	void (*after)(int restored, void *data);
	void *data;
	struct hook *next, *previous;
};

struct region {
	char *begin;
	size_t length;
	struct region *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct hook *first_hook, *last_hook;
static struct region *regions;
static _Thread_local char error_text[REPLY];

int outlast_fail(const char *form, ...)
{
	va_list arguments;

	va_start(arguments, form);
	vsnprintf(error_text, sizeof(error_text), form, arguments);
	va_end(arguments);
	return -1;
}

void outlast_no_error(void)
{
	error_text[0] = '\0';
}

const char *outlast_error(void)
{
	return error_text;
}

/* Reads a link into text; returns whether there is one. */
static int read_link(const char *directory, const char *name, char *text, size_t size)
{
	char path[PATH_MAX];

	if (snprintf(path, sizeof(path), "%s/%s", directory, name) >= (int) sizeof(path))
		return 0;
	ssize_t length = readlink(path, text, size - 1);
	if (length < 0)
		return 0;
	text[length] = '\0';
	return 1;
}

/* Copies the text of one member of the reply, which the manager writes in one line; returns whether it is there. */
static int member(const char *reply, const char *name, char *text, size_t size)
{
	char key[32];
	size_t length = 0;

	snprintf(key, sizeof(key), "\"%s\": \"", name);
	const char *at = strstr(reply, key);
	if (at == NULL)
		return 0;
	for (at += strlen(key); *at != '\0' && *at != '"' && length + 1 < size; at++) {
		if (*at == '\\' && at[1] != '\0')
			at++;
		text[length++] = *at;
	}
	text[length] = '\0';
	return 1;
}

/* Sends one request to the manager, and takes its answer. Returns 0, or -1 where there is none. */
static int converse(const char *directory, const char *request, char reply[REPLY])
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval patience = { .tv_sec = CONNECT_SECONDS };
	size_t length = 0;
	ssize_t count;

	if (snprintf(address.sun_path, sizeof(address.sun_path), "%s/manager.sock", directory) >=
	    (int) sizeof(address.sun_path))
		return outlast_fail("%s: too long a path", directory);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return outlast_fail("a socket: %s", strerror(errno));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connect(fd, (struct sockaddr *) &address, sizeof(address)) < 0 ||
	    send(fd, request, strlen(request), MSG_NOSIGNAL) != (ssize_t) strlen(request)) {
		int error = errno;

		close(fd);
		return outlast_fail("%s: %s", address.sun_path, strerror(error));
	}
	while (length < REPLY - 1 && (count = recv(fd, reply + length, REPLY - 1 - length, 0)) > 0)
		length += (size_t) count;
	close(fd);
	reply[length] = '\0';
	return 0;
}

/* Says what a reply that is no good says; returns -1. */
static int refused(const char *reply)
{
	char why[REPLY / 2];

	return outlast_fail("%s", member(reply, "error", why, sizeof(why)) ? why : "the job's manager gave no answer");
}

/* Asks the manager. Returns 1 with a ticket, 0 where this process is not of its job, -1 where it failed. */
static int ask(const char *directory, char run[TICKET], char number[TICKET])
{
	char reply[REPLY], ticket[2 * TICKET];

	if (converse(directory, "{\"op\": \"ckpt\"}\n", reply) < 0)
		return -1;
	if (strstr(reply, "\"ok\": true") != NULL && member(reply, "ckpt", ticket, sizeof(ticket)) &&
	    sscanf(ticket, "%63s %63s", run, number) == 2)
		return 1;
	const char *code = strstr(reply, "\"exit_code\": ");
	if (code != NULL && atoi(code + strlen("\"exit_code\": ")) == EX_USAGE)
		return 0;
	return refused(reply);
}

/* A text that tells one capsule from every other: when the host was booted, and when the capsule's init began. */
static void capsule(char *text, size_t size)
{
	char boot[64] = "", stat[512] = "";
	FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");

	if (file != NULL) {
		if (fgets(boot, sizeof(boot), file) == NULL)
			boot[0] = '\0';
		fclose(file);
	}
	if ((file = fopen("/proc/1/stat", "re")) != NULL) {
		if (fgets(stat, sizeof(stat), file) == NULL)
			stat[0] = '\0';
		fclose(file);
	}
	const char *begun = strrchr(stat, ')');
	for (int field = 2; begun != NULL && field < 22; field++)
		begun = strchr(begun + 1, ' ');
	snprintf(text, size, "%s %.20s", boot, begun != NULL ? begun : "");
}

/* Waits for what becomes of the request: 0, 1 or -1 as outlast_ckpt(). */
static int await(const char *directory, const char *run, const char *number, const char *before)
{
	struct timespec wait = { .tv_nsec = FIRST_WAIT_NS };
	char now[TICKET], said[REPLY], name[TICKET + 8], here_now[IDENTITY];
	long without = 0;

	snprintf(name, sizeof(name), "calls/%s", number);
	for (;;) {
		int here = read_link(directory, "run", now, sizeof(now));
		if (here && strcmp(now, run) != 0)
			return 1;
		/* Restored as another job, of which nobody here knows by the old name. */
		without = here ? 0 : without + wait.tv_nsec;
		if (without > WITHOUT_NS) {
			capsule(here_now, sizeof(here_now));
			if (strcmp(here_now, before) != 0)
				return 1;
			without = 0;
		}
		int answered = read_link(directory, name, said, sizeof(said));
		if (here && !(answered && strcmp(said, "pending") == 0) &&
		    read_link(directory, "run", now, sizeof(now)) && strcmp(now, run) == 0) {
			if (answered && strncmp(said, "done ", 5) == 0)
				return 0;
			return outlast_fail("%s", !answered ? "the job's manager does not know of it" :
					    strncmp(said, "failed ", 7) == 0 ? said + 7 : said);
		}
		nanosleep(&wait, NULL);
		if ((wait.tv_nsec *= 2) > LONGEST_WAIT_NS)
			wait.tv_nsec = LONGEST_WAIT_NS;
	}
}

/* Whether the manager in this directory knows the calling process as one of its job's. */
static int knows_me(const char *directory)
{
	char reply[REPLY];

	return converse(directory, "{\"op\": \"ckpt\", \"probe\": true}\n", reply) == 0 &&
	       strstr(reply, "\"ok\": true") != NULL;
}

/* The directory of this job's manager, in text; returns whether there is one. */
static int job_directory(char text[PATH_MAX])
{
	const char *named = getenv("OUTLAST_JOB");
	char run[TICKET];
	struct dirent *entry;
	int found = 0;

	if (named == NULL || snprintf(text, PATH_MAX, "%s", named) >= PATH_MAX)
		return 0;
	if (read_link(named, "run", run, sizeof(run)))
		return 1;
	/* Maybe the job was recovered under another name: then one of the managers here knows this process. */
	char *slash = strrchr(text, '/');
	if (slash == NULL)
		return 0;
	*slash = '\0';
	DIR *all = opendir(text);
	size_t length = (size_t) (slash - text);
	while (!found && all != NULL && (entry = readdir(all)) != NULL) {
		if (entry->d_type != DT_LNK ||
		    snprintf(text + length, PATH_MAX - length, "/%s", entry->d_name) >= (int) (PATH_MAX - length))
			continue;
		found = knows_me(text);
	}
	if (all != NULL)
		closedir(all);
	outlast_no_error();
	return found;
}

int outlast_active(void)
{
	char directory[PATH_MAX];

	return job_directory(directory);
}

int outlast_ckpt(void)
{
	char directory[PATH_MAX], run[TICKET], number[TICKET], before[IDENTITY];

	outlast_no_error();
	if (!job_directory(directory))
		return 0;
	for (struct hook *hook = last_hook; hook != NULL; hook = hook->previous) {
		if (hook->before != NULL)
			hook->before(hook->data);
	}
	for (struct region *region = regions; region != NULL; region = region->next)
		madvise(region->begin, region->length, MADV_DONTNEED);
	capsule(before, sizeof(before));
	int result = ask(directory, run, number);
	if (result == 1)
		result = await(directory, run, number, before);
	for (struct hook *hook = first_hook; hook != NULL; hook = hook->next) {
		if (hook->after != NULL)
			hook->after(result == 1, hook->data);
	}
	return result;
}

/* Reads $OUTLAST_JOB of another process, which only its user may; returns whether it has one. */
static int directory_of(pid_t pid, char *text, size_t size)
{
	static const char variable[] = "OUTLAST_JOB=";
	char path[64], *word = NULL;
	size_t room = 0;
	int found = 0;

	snprintf(path, sizeof(path), "/proc/%ld/environ", (long) pid);
	FILE *file = fopen(path, "re");
	if (file == NULL) {
		outlast_fail("process %ld: %s", (long) pid, strerror(errno));
		return 0;
	}
	while (!found && getdelim(&word, &room, '\0', file) > 0) {
		found = strncmp(word, variable, sizeof(variable) - 1) == 0;
		if (found)
			snprintf(text, size, "%s", word + sizeof(variable) - 1);
	}
	free(word);
	fclose(file);
	if (!found)
		outlast_fail("process %ld: it is not of a job that is checkpointed", (long) pid);
	return found;
}

int outlast_tckpt(pid_t pid)
{
	char directory[PATH_MAX], reply[REPLY];

	outlast_no_error();
	if (pid == 0) {
		if (!job_directory(directory))
			return outlast_fail("this process is not of a job that is checkpointed");
	} else if (!directory_of(pid, directory, sizeof(directory))) {
		return -1;
	}
	if (converse(directory, "{\"op\": \"checkpoint\"}\n", reply) < 0)
		return -1;
	return strstr(reply, "\"ok\": true") != NULL ? 0 : refused(reply);
}

int outlast_on_ckpt(void (*before)(void *data), void (*after)(int restored, void *data), void *data)
{
	struct hook *hook = malloc(sizeof(*hook));

	outlast_no_error();
	if (hook == NULL)
		return outlast_fail("no memory");
	*hook = (struct hook) { before, after, data, NULL, NULL };
	pthread_mutex_lock(&lock);
	hook->previous = last_hook;
	*(last_hook != NULL ? &last_hook->next : &first_hook) = hook;
	last_hook = hook;
	pthread_mutex_unlock(&lock);
	return 0;
}

/* The whole pages of a region; returns whether there are any. */
static int whole_pages(void *address, size_t length, char **begin, size_t *size)
{
	uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
	uintptr_t from = ((uintptr_t) address + page - 1) & ~(page - 1);
	uintptr_t to = ((uintptr_t) address + length) & ~(page - 1);

	*begin = (char *) from;
	*size = to > from ? to - from : 0;
	return to > from;
}

int outlast_exclude(void *address, size_t length)
{
	struct region *region = malloc(sizeof(*region));

	outlast_no_error();
	if (region == NULL)
		return outlast_fail("no memory");
	if (!whole_pages(address, length, &region->begin, &region->length)) {
		free(region);
		return 0;
	}
	pthread_mutex_lock(&lock);
	region->next = regions;
	regions = region;
	pthread_mutex_unlock(&lock);
	return 0;
}

int outlast_include(void *address, size_t length)
{
	char *begin;
	size_t size;

	outlast_no_error();
	if (!whole_pages(address, length, &begin, &size))
		return 0;
	pthread_mutex_lock(&lock);
	for (struct region **at = &regions; *at != NULL; at = &(*at)->next) {
		if ((*at)->begin == begin && (*at)->length == size) {
			struct region *gone = *at;

			*at = gone->next;
			pthread_mutex_unlock(&lock);
			free(gone);
			return 0;
		}
	}
	pthread_mutex_unlock(&lock);
	return outlast_fail("no such region was excluded");
}
