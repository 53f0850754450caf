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
		usleep(20000);
		int error = pthread_mutex_lock(&shared->mutex);
		printf("tick %ld %s\n", n, !error && shared->first == shared->second && shared->first > last ? "ok" : "wrong");
		last = shared->first;
		pthread_mutex_unlock(&shared->mutex);
	}
	return 3;
}
