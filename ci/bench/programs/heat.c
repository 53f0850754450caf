/*
 * heat [SIDE]: the heat equation on a square plate, by Jacobi's method, without end. Two grids of SIDE * SIDE
 * doubles (default 4096: 268 MB) are written in turn; a hot square in the middle spreads over a cold plate.
 */
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
	size_t side = argc > 1 ? strtoul(argv[1], NULL, 10) : 4096;
	double *now = calloc(side * side, sizeof *now);
	double *next = calloc(side * side, sizeof *next);
	if (side < 8 || !now || !next) {
		fprintf(stderr, "heat: %zu: too small a side, or too large for this machine\n", side);
		return 1;
	}
	for (size_t y = 3 * side / 8; y < 5 * side / 8; y++)
		for (size_t x = 3 * side / 8; x < 5 * side / 8; x++)
			now[y * side + x] = 100.0 + 0.001 * (double)((x * 7 + y * 13) % 1000);
	for (unsigned long step = 1;; step++) {
		for (size_t y = 1; y + 1 < side; y++) {
			const double *row = now + y * side;
			for (size_t x = 1; x + 1 < side; x++)
				next[y * side + x] = 0.5 * row[x] + 0.125 * (row[x - 1] + row[x + 1] +
									     row[x - side] + row[x + side]);
		}
		double *old = now;
		now = next;
		next = old;
		printf("step %lu middle %.17g\n", step, now[side * side / 2 + side / 2]);
		fflush(stdout);
	}
}
