/*
 * steps.c COUNT [include]: an example of checkpoints at the program's own points. Does COUNT steps of work, with a
 * checkpoint after each; says "step N", and "restored in step N" where it was. Its scratch memory, which is of no use
 * after a step, is in no checkpoint, unless it is asked to include it.
 *
 *     gcc -O2 -o steps steps.c -loutlast
 */
#include <outlast.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SCRATCH = 64 << 20 };

static void tell(int restored, void *name)
{
	if (restored)
		printf("%s: opened again\n", (const char *) name);
}

int main(int argc, char **argv)
{
	long count = argc > 1 ? strtol(argv[1], NULL, 10) : 10;
	char *scratch = malloc(SCRATCH);

	if (scratch == NULL)
		return 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	outlast_on_ckpt(NULL, tell, "connection");
	outlast_exclude(scratch, SCRATCH);
	if (argc > 2 && strcmp(argv[2], "include") == 0)
		outlast_include(scratch, SCRATCH);
	for (long step = 1; step <= count; step++) {
		for (long i = 0; i < SCRATCH; i++)
			scratch[i] = (char) (i * i * step >> 7);
		usleep(200000);
		printf("step %ld\n", step);
		int result = ckpt();
		if (result == 1)
			printf("restored in step %ld\n", step);
		else if (result < 0)
			fprintf(stderr, "no checkpoint: %s\n", outlast_error());
	}
	puts("done");
	return 0;
}
