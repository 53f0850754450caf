/*
 * Critical data: the memory that a program names, saved to a file of its own and loaded by another process.
 *
 * The file: "OUTLASTC", then of each region its id and length (int64, uint64) and its bytes, by growing id, then an end (an
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

int outlast_protect(int id, void *address, size_t length, void (*restored)(void *data), void *data)
{
	struct part **at, *part;

	outlast_no_error();
	pthread_mutex_lock(&lock);
	for (at = &parts; *at != NULL && (*at)->id < id; at = &(*at)->next)
		;
	part = *at;
	if (part == NULL || part->id != id) {
		part = malloc(sizeof(*part));
		if (part == NULL) {
			pthread_mutex_unlock(&lock);
			return outlast_fail("no memory");
		}
		part->next = *at;
		*at = part;
	}
	*part = (struct part) { id, address, length, restored, data, part->next };
	pthread_mutex_unlock(&lock);
	return 0;
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

static int write_all(FILE *file)
{
	uint64_t sum = 0xcbf29ce484222325;
	struct head end = { INT64_MIN, 0 };
	int bad = put(file, &sum, magic, sizeof(magic));

	for (struct part *part = parts; part != NULL && !bad; part = part->next) {
		struct head head = { part->id, part->length };

		bad = put(file, &sum, &head, sizeof(head)) || put(file, &sum, part->address, part->length);
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
	int bad = write_all(file);
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
	return outlast_fail("%s: %s", part, strerror(error));
}

/* Goes through the file at data; with take, copies it into memory. Returns what is wrong with it, NULL if nothing. */
static const char *go_through(const char *data, size_t size, int take)
{
	size_t at = sizeof(magic);
	struct part *part = parts;
	uint64_t sum;

	if (size < at + sizeof(struct head) + sizeof(sum) || memcmp(data, magic, sizeof(magic)) != 0)
		return "it is no saved data";
	memcpy(&sum, data + size - sizeof(sum), sizeof(sum));
	if (!take && sum != hash(0xcbf29ce484222325, data, size - sizeof(sum)))
		return "it is damaged";
	for (;;) {
		struct head head;

		memcpy(&head, data + at, sizeof(head));
		at += sizeof(head);
		if (head.id == INT64_MIN)
			return part == NULL ? NULL : "it holds less than the program protects";
		if (part == NULL || part->id != head.id || part->length != head.length)
			return "what it holds is not what the program protects";
		if (take)
			memcpy(part->address, data + at, part->length);
		at += part->length;
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
	wrong = go_through(data, (size_t) facts.st_size, 0);
	if (wrong == NULL)
		go_through(data, (size_t) facts.st_size, 1);
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
