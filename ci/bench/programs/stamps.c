/* Preloaded into a program that flushes its output after each step, and perhaps calls workload_part_done() within: writes
 * into the file $STAMPS, when the program ends, at what time of CLOCK_MONOTONIC each step and part was done, in µs. A 64-bit
 * number is the first; 32-bit numbers follow, each to be added to those before it, with the highest bit set at a step's end. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1 << 16 };
#define STEP (UINT32_C(1) << 31)

static uint64_t first, last;
static uint32_t since[MOST]; /* only the pages that are used become part of a checkpoint */
static unsigned count;

static void stamp(uint32_t flag)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	const uint64_t now = (uint64_t) time.tv_sec * 1000000 + (uint64_t) time.tv_nsec / 1000;
	if (first == 0)
		first = now;
	else if (count < MOST)
		since[count++] = (uint32_t) (now - last) | flag;
	last = now;
}

int fflush(FILE *stream)
{
	static int (*real)(FILE *);

	if (real == NULL)
		*(void **) &real = dlsym(RTLD_NEXT, "fflush");
	stamp(STEP);
	return real(stream);
}

void workload_part_done(void)
{
	if (first != 0)
		stamp(0);
}

static void __attribute__((destructor)) keep(void)
{
	const char *path = getenv("STAMPS");
	const int fd = path == NULL ? -1 : open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || write(fd, &first, sizeof(first)) != sizeof(first) ||
	    write(fd, since, count * sizeof(*since)) != (ssize_t) (count * sizeof(*since)))
		perror("STAMPS");
	if (fd >= 0)
		close(fd);
}
