/* The clocks that a program reads from its vDSO, without a system call, go as those of the kernel do. */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long long nanoseconds(const struct timespec *time)
{
	return time->tv_sec * 1000000000LL + time->tv_nsec;
}

/* The vDSO's time lies between two that the kernel tells, one before and one after. */
static int agree(clockid_t clock)
{
	struct timespec before, told, after;

	if (syscall(SYS_clock_gettime, clock, &before) != 0 || clock_gettime(clock, &told) != 0 ||
	    syscall(SYS_clock_gettime, clock, &after) != 0)
		return 0;
	return nanoseconds(&before) <= nanoseconds(&told) && nanoseconds(&told) <= nanoseconds(&after);
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	for (long n = 0; access("stop", F_OK) != 0; n++) {
		printf("tick %ld %s\n", n, agree(CLOCK_MONOTONIC) && agree(CLOCK_BOOTTIME) ? "ok" : "wrong");
		usleep(10000);
	}
	return 3;
}
