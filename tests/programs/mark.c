/*
 * mark.c [PID]: an example of tckpt(): has the job of process PID, or its own, checkpointed without it noticing.
 *
 *     gcc -O2 -o mark mark.c -loutlast
 */
#include <outlast.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
	if (tckpt(argc > 1 ? atoi(argv[1]) : 0) == 0)
		return 0;
	fprintf(stderr, "mark: %s\n", outlast_error());
	return 1;
}
