/* Restartable sequences: glibc has registered them with the kernel, which must go on telling the CPU in use there. */
#define _GNU_SOURCE
#include <linux/rseq.h>
#include <sched.h>
#include <stdio.h>
#include <sys/rseq.h>
#include <unistd.h>

/* The CPU that the kernel wrote into this thread's area, and that a system call tells, are the same at one moment. */
static int agree(const volatile struct rseq *area)
{
	for (int tries = 0; tries < 1000; tries++) {
		unsigned int before = area->cpu_id, now = (unsigned int) sched_getcpu();
		unsigned int called;

		getcpu(&called, NULL);
		if (before == called && area->cpu_id == called && now == called)
			return 1;
	}
	return 0;
}

int main(void)
{
	const volatile struct rseq *area =
		(const volatile struct rseq *) ((char *) __builtin_thread_pointer() + __rseq_offset);

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts(__rseq_size > 0 ? "ready" : "glibc has not registered it");
	for (long n = 0; access("stop", F_OK) != 0; n++) {
		printf("tick %ld %s\n", n, __rseq_size > 0 && agree(area) ? "ok" : "wrong");
		usleep(10000);
	}
	return 3;
}
