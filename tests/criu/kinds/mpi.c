/* Ranks of MPI add up vectors; rank 0 says "tick N ok" while the sums are right. */
#include <mpi.h>
#include <stdio.h>
#include <unistd.h>

static double values[1 << 14];

int main(int argc, char **argv)
{
	int rank, ranks, stop = 0;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (rank == 0)
		puts("ready");
	for (long n = 0; !stop; n++) {
		for (int k = 0; k < 1 << 14; k++)
			values[k] = (double) (rank + n);
		MPI_Allreduce(MPI_IN_PLACE, values, 1 << 14, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
		stop = access("stop", F_OK) == 0;
		MPI_Bcast(&stop, 1, MPI_INT, 0, MPI_COMM_WORLD);
		if (rank == 0)
			printf("tick %ld %s\n", n, values[5] == (double) (ranks * n + ranks * (ranks - 1) / 2) ? "ok" : "wrong");
		usleep(20000);
	}
	MPI_Finalize();
	return 0;
}
