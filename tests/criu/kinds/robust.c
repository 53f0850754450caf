/* Parent and child count under a robust mutex in shared memory; says "tick N ok" while nobody loses it. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

struct shared {
	pthread_mutex_t mutex;
	long first, second;
};

int main(void)
{
	struct shared *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_mutexattr_t how;

	pthread_mutexattr_init(&how);
	pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&shared->mutex, &how);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (fork() == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;) {
			pthread_mutex_lock(&shared->mutex);
			shared->first++;
			shared->second++;
			pthread_mutex_unlock(&shared->mutex);
			usleep(500);
		}
	}
	puts("ready");
	for (long n = 0, last = -1; access("stop", F_OK) != 0; n++) {
		int error = 0, equal = 1, more = 0;

		/* The child may be let go later than this process. */
		for (int tries = 0; tries < 1000 && !more; tries++) {
			usleep(5000);
			error |= pthread_mutex_lock(&shared->mutex);
			equal &= shared->first == shared->second;
			more = shared->first > last;
			if (more)
				last = shared->first;
			pthread_mutex_unlock(&shared->mutex);
		}
		printf("tick %ld %s\n", n, !error && equal && more ? "ok" : "wrong");
	}
	return 3;
}
