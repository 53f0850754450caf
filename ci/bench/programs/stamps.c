/* Preloaded into a program that flushes its output after each step, and perhaps calls workload_part_done() within: writes
 * into the file $STAMPS, when the program ends, times in µs. Four 64-bit numbers are when it began and ended, for how long it
 * computed, and when the first step was done; 32-bit numbers follow, of each step and part that was done after it, to be
 * added to those before it, with the highest bit set at a step's end. All but the third are times of CLOCK_MONOTONIC. */
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

static uint64_t begin, first, last;
static uint32_t since[MOST]; /* only the pages that are used become part of a checkpoint */
static unsigned count;

static uint64_t read_clock(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return (uint64_t) time.tv_sec * 1000000 + (uint64_t) time.tv_nsec / 1000;
}

static void stamp(uint32_t flag)
{
	const uint64_t now = read_clock(CLOCK_MONOTONIC);

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

static void __attribute__((constructor)) start(void)
{
	begin = read_clock(CLOCK_MONOTONIC);
}

static void __attribute__((destructor)) keep(void)
{
	const uint64_t head[] = {begin, read_clock(CLOCK_MONOTONIC), read_clock(CLOCK_PROCESS_CPUTIME_ID), first};
	const char *path = getenv("STAMPS");
	const int fd = path == NULL ? -1 : open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || write(fd, head, sizeof(head)) != sizeof(head) ||
	    write(fd, since, count * sizeof(*since)) != (ssize_t) (count * sizeof(*since)))
		perror("STAMPS");
	if (fd >= 0)
		close(fd);
}
