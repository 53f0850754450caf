/* Parent and child share memory, a semaphore and a queue of SysV; says "tick N ok" while all are there. */
#include <errno.h>
#include <stdio.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

int main(void)
{
	int private = shmget(IPC_PRIVATE, 8 << 20, IPC_CREAT | 0600), keyed = shmget(0x1234, 4096, IPC_CREAT | 0600);
	int semaphore = semget(IPC_PRIVATE, 2, IPC_CREAT | 0600), queue = msgget(IPC_PRIVATE, 0600 | IPC_CREAT);
	volatile long *one = shmat(private, NULL, 0), *two = shmat(keyed, NULL, 0);
	struct { long kind; char text[8]; } message = { 1, "hello" };

	setvbuf(stdout, NULL, _IOLBF, 0);
	msgsnd(queue, &message, sizeof(message.text), 0);
	one[1000] = 42;
	if (fork() == 0) {
		for (;;) {
			struct sembuf up = { 0, 1, 0 };
			two[0]++;
			one[0]++;
			semop(semaphore, &up, 1);
			usleep(10000);
		}
	}
	puts("ready");
	for (long n = 0; access("stop", F_OK) != 0; n++) {
		struct sembuf down = { 0, -1, 0 };
		struct msqid_ds facts;

		/* It is never restarted: see signal(7). */
		while (semop(semaphore, &down, 1) < 0 && errno == EINTR)
			;
		msgctl(queue, IPC_STAT, &facts);
		printf("tick %ld %s\n", n, one[0] > n && two[0] >= one[0] && one[1000] == 42 && facts.msg_qnum == 1
			? "ok" : "wrong");
	}
	return 3;
}
