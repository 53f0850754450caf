/* LU factorization with partial pivoting, again and again. lu.py gives the same checksums. */
#include "workload.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

/* LAPACK's own test of its LU (xGET01, in the 1-norm) passes residuals below this. */
#define MAX_RESIDUAL 30.0

/* Fill row with row i of the matrix that seed stands for: order numbers from -1 to 1. */
static void make_row(double *row, uint64_t i, uint64_t order, uint64_t seed)
{
	for (uint64_t j = 0; j < order; j++)
		row[j] = (double) (workload_draw(seed, i * order + j) >> 11) * 0x1p-52 - 1.0;
}

static void swap_rows(double *a, double *b, uint64_t order)
{
	for (uint64_t j = 0; j < order; j++) {
		double kept = a[j];
		a[j] = b[j];
		b[j] = kept;
	}
}

/* Turn a into L (below the diagonal, its ones left out) and U, and say in row_of from which of a's rows each
 * came. Returns order, or the first column without a pivot. */
static uint64_t factorize(double *a, uint64_t *row_of, uint64_t order)
{
	for (uint64_t i = 0; i < order; i++)
		row_of[i] = i;
	for (uint64_t k = 0; k < order; k++) {
		uint64_t pivot = k;
		for (uint64_t i = k + 1; i < order; i++)
			if (fabs(a[i * order + k]) > fabs(a[pivot * order + k]))
				pivot = i;
		if (a[pivot * order + k] == 0.0)
			return k;
		if (pivot != k) {
			uint64_t kept = row_of[k];
			row_of[k] = row_of[pivot];
			row_of[pivot] = kept;
			swap_rows(a + k * order, a + pivot * order, order);
		}
		const double *top = a + k * order;
		for (uint64_t i = k + 1; i < order; i++) {
			double *row = a + i * order;
			double factor = row[k] / top[k];
			row[k] = factor;
			for (uint64_t j = k + 1; j < order; j++)
				row[j] -= factor * top[j];
		}
	}
	return order;
}

/* Return ||PA - LU|| / (order * epsilon * ||A||) in the infinity norm. A is made again from its seed, so that
 * only one matrix is kept. original and product are room for a row each. */
static double residual(const double *lu, const uint64_t *row_of, uint64_t order, uint64_t seed,
		       double *original, double *product)
{
	double worst = 0.0, norm = 0.0;

	for (uint64_t i = 0; i < order; i++) {
		const double *row = lu + i * order;
		double difference = 0.0, sum = 0.0;

		for (uint64_t j = 0; j < order; j++)
			product[j] = j < i ? 0.0 : row[j];
		for (uint64_t k = 0; k < i; k++)
			for (uint64_t j = k; j < order; j++)
				product[j] += row[k] * lu[k * order + j];
		make_row(original, row_of[i], order, seed);
		for (uint64_t j = 0; j < order; j++) {
			difference += fabs(original[j] - product[j]);
			sum += fabs(original[j]);
		}
		/* Written so that a NaN is kept. */
		worst = difference <= worst ? worst : difference;
		norm = sum <= norm ? norm : sum;
	}
	return worst / ((double) order * DBL_EPSILON * norm);
}

int main(int argc, char **argv)
{
	/* Order 400 makes a checkpoint image of about 1.3 MB. */
	struct workload w = {
		.name = "lu",
		.size_name = "ORDER",
		.step_name = "sweep",
		.steps_name = "SWEEPS",
		.size = 400,
		.size_min = 1,
		.size_max = 4096,
		.steps = 200,
	};

	workload_parse(&w, argc, argv);
	double *a = workload_memory(&w, w.size * w.size, sizeof(*a));
	double *original = workload_memory(&w, w.size, sizeof(*original));
	double *product = workload_memory(&w, w.size, sizeof(*product));
	uint64_t *row_of = workload_memory(&w, w.size, sizeof(*row_of));
	uint64_t checksum = workload_start(&w);

	for (uint64_t sweep = 1; sweep <= w.steps; sweep++) {
		uint64_t seed = workload_seed(checksum, sweep, 0);
		for (uint64_t i = 0; i < w.size; i++)
			make_row(a + i * w.size, i, w.size, seed);
		uint64_t column = factorize(a, row_of, w.size);
		if (column < w.size)
			workload_check_failed(&w, sweep, "column %llu has no pivot",
					      (unsigned long long) column);
		if (sweep == w.spoil_at)
			a[w.size * w.size / 2] += 1e-3;
		double ratio = residual(a, row_of, w.size, seed, original, product);
		if (!(ratio <= MAX_RESIDUAL))
			workload_check_failed(&w, sweep, "residual %.3g is above %g", ratio, MAX_RESIDUAL);
		for (uint64_t i = 0; i < w.size; i++)
			checksum = workload_fold(checksum, row_of[i]);
		checksum = workload_fold_doubles(checksum, a, w.size * w.size);
		workload_step_done(&w, sweep, checksum);
	}
	free(row_of);
	free(product);
	free(original);
	free(a);
	return workload_end(&w, checksum);
}
