/*
 * sgd [ROWS]: linear regression by stochastic gradient descent, without end. ROWS (default 131072: 256 MiB) of
 * 256 doubles never change once they are made; the weights change at every row.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { COLUMNS = 256 };

static uint64_t state = 1;

/* SplitMix64, as a double in [-1, 1). */
static double draw(void)
{
	uint64_t z = state += 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return (double)((z ^ z >> 31) >> 11) * 0x1p-52 - 1.0;
}

int main(int argc, char **argv)
{
	size_t rows = argc > 1 ? strtoul(argv[1], NULL, 10) : 131072;
	double *data = malloc(rows * COLUMNS * sizeof *data);
	double *wanted = malloc(rows * sizeof *wanted);
	double weights[COLUMNS] = {0};
	if (!rows || !data || !wanted) {
		fprintf(stderr, "sgd: %zu rows: none, or too many for this machine\n", rows);
		return 1;
	}
	for (size_t row = 0; row < rows; row++) {
		double sum = 0.1 * draw();
		for (size_t i = 0; i < COLUMNS; i++) {
			data[row * COLUMNS + i] = draw();
			sum += data[row * COLUMNS + i] * (double)(i % 17);
		}
		wanted[row] = sum;
	}
	for (unsigned long epoch = 1;; epoch++) {
		double loss = 0;
		for (size_t n = 0; n < rows; n++) {
			const double *x = data + (size_t)((draw() + 1) / 2 * (double)rows) * COLUMNS;
			double error = -wanted[(size_t)(x - data) / COLUMNS];
			for (size_t i = 0; i < COLUMNS; i++)
				error += weights[i] * x[i];
			for (size_t i = 0; i < COLUMNS; i++)
				weights[i] -= 1e-4 * error * x[i];
			loss += error * error;
		}
		printf("epoch %lu loss %.17g\n", epoch, loss / (double)rows);
		fflush(stdout);
	}
}
