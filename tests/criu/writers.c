/* writers MIB THREADS: each thread writes generation after generation over its own pages, at full speed, and all
 * pages of one are of two generations at most, the newer ones first. At SIGUSR1 each thread says whether
 * that is so: "thread N whole", or "thread N torn". The lines go to standard output, after "ready". */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, STEP = 64 };

static volatile sig_atomic_t asked;
static size_t pages; /* of a thread */
static char *memory;

static void ask(int number)
{
	(void) number;
	asked++;
}

static void *write_on(void *argument)
{
	const long self = (long) argument;
	volatile uint64_t *words = (void *) (memory + (size_t) self * pages * PAGE);
	uint64_t generation = 1;
	size_t at = 0;
	int answered = 0;

	for (;;) {
		for (size_t i = 0; i < WORDS; i += STEP)
			words[at * WORDS + i] = generation;
		if (++at == pages) {
			at = 0;
			generation++;
		}
		if (asked == answered)
			continue;
		answered = asked;
		size_t torn = 0;
		for (size_t page = 0; page < pages; page++) {
			for (size_t i = 0; i < WORDS; i += STEP)
				torn += words[page * WORDS + i] != (page < at ? generation : generation - 1);
		}
		printf("thread %ld %s\n", self, torn ? "torn" : "whole");
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	const size_t size = strtoul(argv[1], NULL, 10) << 20;
	const long threads = strtol(argv[2], NULL, 10);

	pages = size / PAGE / (size_t) threads;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGUSR1, ask);
	for (long i = 0; i < threads; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, write_on, (void *) i) != 0)
			return 1;
	}
	printf("ready\n");
	for (;;)
		pause();
}
