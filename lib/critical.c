/*
 * Critical data: the memory and files that a program names, saved to a file of its own and loaded by another process.
 *
 * The file: "OUTLASTC", then of each of them its id and length (int64, uint64) and its bytes, by growing id, then an end (an
 * id of INT64_MIN) and the FNV-1a hash of all before it, 64 bits. All numbers are the machine's own.
 */
#define _GNU_SOURCE
#include "outlast.h"
#include "private.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct head {
	int64_t id;
	uint64_t length;
};

struct part {
	int id;
	char *path; /* of a file; NULL: it is memory */
	void *address;
	size_t length;
	void (*restored)(void *data);
	void *data;
	struct part *next;
};

static const char magic[8] = { 'O', 'U', 'T', 'L', 'A', 'S', 'T', 'C' };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct part *parts; /* by growing id */

static uint64_t hash(uint64_t before, const void *data, size_t length)
{
	const unsigned char *bytes = data;

	for (size_t i = 0; i < length; i++)
		before = (before ^ bytes[i]) * 0x100000001b3;
	return before;
}

/* Puts a part into its place in the list, or in the place of one with its id. Takes over its path. */
static int enter(struct part fresh)
{
	struct part **at, *part;

	outlast_no_error();
	pthread_mutex_lock(&lock);
	for (at = &parts; *at != NULL && (*at)->id < fresh.id; at = &(*at)->next)
		;
	part = *at;
	if (part == NULL || part->id != fresh.id) {
		part = calloc(1, sizeof(*part));
		if (part == NULL) {
			pthread_mutex_unlock(&lock);
			free(fresh.path);
			return outlast_fail("no memory");
		}
		part->next = *at;
		*at = part;
	}
	fresh.next = part->next;
	free(part->path);
	*part = fresh;
	pthread_mutex_unlock(&lock);
	return 0;
}

int outlast_protect(int id, void *address, size_t length, void (*restored)(void *data), void *data)
{
	return enter((struct part) { id, NULL, address, length, restored, data, NULL });
}

int outlast_protect_file(int id, const char *path, void (*restored)(void *data), void *data)
{
	char *copy = strdup(path);

	return copy == NULL ? outlast_fail("no memory") :
			      enter((struct part) { id, copy, NULL, 0, restored, data, NULL });
}

int outlast_unprotect(int id)
{
	outlast_no_error();
	pthread_mutex_lock(&lock);
	for (struct part **at = &parts; *at != NULL; at = &(*at)->next) {
		if ((*at)->id == id) {
			struct part *gone = *at;

			*at = gone->next;
			pthread_mutex_unlock(&lock);
			free(gone->path);
			free(gone);
			return 0;
		}
	}
	pthread_mutex_unlock(&lock);
	return outlast_fail("nothing is protected as %d", id);
}

/* Writes and hashes; returns 0, or -1 with errno. */
static int put(FILE *file, uint64_t *sum, const void *data, size_t length)
{
	*sum = hash(*sum, data, length);
	return fwrite(data, 1, length, file) == length ? 0 : -1;
}

/* Writes a whole file as it is now, behind its head; returns 0, or -1 with errno. */
static int put_file(FILE *file, uint64_t *sum, const struct part *part)
{
	static char buffer[1 << 16]; /* the lock is held */
	struct stat facts;
	FILE *source = fopen(part->path, "re");

	if (source == NULL)
		return -1;
	int bad = fstat(fileno(source), &facts);
	uint64_t left = bad ? 0 : (uint64_t) facts.st_size;
	struct head head = { part->id, left };

	bad = bad || put(file, sum, &head, sizeof(head));
	while (!bad && left > 0) {
		size_t count = fread(buffer, 1, left < sizeof(buffer) ? left : sizeof(buffer), source);

		if (count == 0)
			errno = EIO; /* it became shorter meanwhile */
		bad = count == 0 || put(file, sum, buffer, count);
		left -= count;
	}
	int error = errno;
	fclose(source);
	errno = error;
	return bad ? -1 : 0;
}

static int write_all(FILE *file, const char **what)
{
	uint64_t sum = 0xcbf29ce484222325;
	struct head end = { INT64_MIN, 0 };
	int bad = put(file, &sum, magic, sizeof(magic));

	for (struct part *part = parts; part != NULL && !bad; part = part->next) {
		struct head head = { part->id, part->length };

		bad = part->path != NULL ? put_file(file, &sum, part) :
			put(file, &sum, &head, sizeof(head)) || put(file, &sum, part->address, part->length);
		if (bad && part->path != NULL)
			*what = part->path;
	}
	if (!bad)
		bad = put(file, &sum, &end, sizeof(end)) || fwrite(&sum, sizeof(sum), 1, file) != 1;
	return bad || fflush(file) != 0 || fsync(fileno(file)) != 0 ? -1 : 0;
}

int outlast_save(const char *path)
{
	char part[PATH_MAX];

	outlast_no_error();
	if (snprintf(part, sizeof(part), "%s.part", path) >= (int) sizeof(part))
		return outlast_fail("%s: too long a path", path);
	FILE *file = fopen(part, "we");
	if (file == NULL)
		return outlast_fail("%s: %s", part, strerror(errno));
	pthread_mutex_lock(&lock);
	const char *what = part;
	int bad = write_all(file, &what);
	int error = errno;
	pthread_mutex_unlock(&lock);
	if (fclose(file) != 0 && !bad) {
		bad = -1;
		error = errno;
	}
	if (!bad && rename(part, path) < 0) {
		bad = -1;
		error = errno;
	}
	if (!bad)
		return 0;
	unlink(part);
	return outlast_fail("%s: %s", what, strerror(error));
}

/* Writes a protected file's bytes beside it, or puts what was written into its place; returns 0, or -1 with errno. */
static int stage(const struct part *part, const char *data, uint64_t length)
{
	char beside[PATH_MAX];

	if (snprintf(beside, sizeof(beside), "%s.part", part->path) >= (int) sizeof(beside)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	if (data == NULL)
		return rename(beside, part->path);
	FILE *file = fopen(beside, "we");
	if (file == NULL)
		return -1;
	int bad = fwrite(data, 1, length, file) != length || fflush(file) != 0 || fsync(fileno(file)) != 0;
	int error = errno;
	fclose(file);
	errno = error;
	return bad ? -1 : 0;
}

enum pass { CHECK, STAGE, TAKE };

/* Goes through the saved bytes at data once for each pass. Returns what is wrong with them, NULL if nothing. */
static const char *go_through(const char *data, size_t size, enum pass pass)
{
	size_t at = sizeof(magic);
	struct part *part = parts;
	uint64_t sum;

	if (size < at + sizeof(struct head) + sizeof(sum) || memcmp(data, magic, sizeof(magic)) != 0)
		return "it is no saved data";
	memcpy(&sum, data + size - sizeof(sum), sizeof(sum));
	if (pass == CHECK && sum != hash(0xcbf29ce484222325, data, size - sizeof(sum)))
		return "it is damaged";
	for (;;) {
		struct head head;

		memcpy(&head, data + at, sizeof(head));
		at += sizeof(head);
		if (head.id == INT64_MIN)
			return part == NULL ? NULL : "it holds less than the program protects";
		if (part == NULL || part->id != head.id || (part->path == NULL && part->length != head.length))
			return "what it holds is not what the program protects";
		if (pass == STAGE && part->path != NULL && stage(part, data + at, head.length) < 0)
			return strerror(errno);
		if (pass == TAKE && part->path != NULL && stage(part, NULL, 0) < 0)
			return strerror(errno);
		if (pass == TAKE && part->path == NULL)
			memcpy(part->address, data + at, part->length);
		at += head.length;
		part = part->next;
	}
}

int outlast_load(const char *path)
{
	const char *wrong;
	struct stat facts;

	outlast_no_error();
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return outlast_fail("%s: %s", path, strerror(errno));
	char *data = fstat(fd, &facts) < 0 || facts.st_size == 0 ? MAP_FAILED :
		mmap(NULL, (size_t) facts.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	if (data == MAP_FAILED)
		return outlast_fail("%s: it cannot be read, or is empty", path);
	pthread_mutex_lock(&lock);
	wrong = go_through(data, (size_t) facts.st_size, CHECK);
	if (wrong == NULL)
		wrong = go_through(data, (size_t) facts.st_size, STAGE);
	if (wrong == NULL)
		wrong = go_through(data, (size_t) facts.st_size, TAKE);
	pthread_mutex_unlock(&lock);
	munmap(data, (size_t) facts.st_size);
	if (wrong != NULL)
		return outlast_fail("%s: %s", path, wrong);
	for (struct part *part = parts; part != NULL; part = part->next) {
		if (part->restored != NULL)
			part->restored(part->data);
	}
	return 0;
}
