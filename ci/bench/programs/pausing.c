/* pausing MIB HUGE PROCESSES: so many processes with so much random memory each, in huge pages if HUGE is 1, that
 * each say "gap SECONDS" whenever they stood still for 3 ms or more, and at SIGUSR1 "fork SECONDS": what fork() took. The
 * first lines are "ready", one of each process. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20 };

static volatile sig_atomic_t asked;

static void ask(int number)
{
	(void) number;
	asked = 1;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double) time.tv_sec + (double) time.tv_nsec * 1e-9;
}

static void time_fork(void)
{
	double begin = now();
	pid_t child = fork();
	double end = now();

	if (child == 0)
		_exit(0);
	waitpid(child, NULL, 0);
	printf("fork %.6f\n", end - begin);
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	const size_t size = strtoul(argv[1], NULL, 10) << 20;
	const int huge = atoi(argv[2]), processes = atoi(argv[3]);

	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGUSR1, ask);
	for (int i = 1; i < processes; i++) {
		if (fork() == 0)
			break;
	}
	char *base = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (base == MAP_FAILED)
		return 1;
	uint64_t *words = (uint64_t *) (((uintptr_t) base + HUGE_PAGE - 1) & -(uintptr_t) HUGE_PAGE);
	madvise(words, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	uint64_t random = 88172645463325252ULL ^ (uint64_t) getpid();
	for (size_t i = 0; i < size / sizeof(*words); i++) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		words[i] = random;
	}
	printf("ready\n");
	for (double last = now();;) {
		/* Many processes must not be a load by themselves. */
		const struct timespec pause = { .tv_nsec = processes > 1 ? 5000000 : 200000 };
		nanosleep(&pause, NULL);
		double time = now(), gap = time - last - (double) pause.tv_nsec * 1e-9;
		if (gap >= 0.003)
			printf("gap %.6f\n", gap);
		last = time;
		if (asked) {
			asked = 0;
			time_fork();
			last = now();
		}
	}
}
