/* A process whose first thread has ended, and which another one keeps alive. */
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static void *tick(void *unused)
{
	(void) unused;
	for (long n = 0; access("stop", F_OK) != 0; n++) {
		printf("tick %ld ok\n", n);
		usleep(10000);
	}
	_exit(3);
}

int main(void)
{
	pthread_t thread;

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	if (pthread_create(&thread, NULL, tick, NULL) != 0)
		return 1;
	pthread_exit(NULL);
}
