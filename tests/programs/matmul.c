/*
 * Matrix multiplication, again and again, with any number of threads. matmul.py gives the same checksums.
 *
 * The matrices hold whole numbers from -1024 to 1023 as doubles. Up to order 2048 every sum stays below 2^53,
 * so all arithmetic is exact: the check needs no tolerance, and no order of summing changes the result.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* So many rows of b are used for all rows of c before the next: 64 * 1500 doubles fit a second-level
 * cache. */
#define BLOCK 64

/* What the threads share. Each owns some rows of c; the barriers order everything else. */
struct product {
	uint64_t order, threads;
	double *a, *b, *c;
	pthread_barrier_t begin, end;
	bool stop;
};

struct worker {
	struct product *product;
	uint64_t number;
	pthread_t thread;
};

static void multiply_rows(const struct product *p, uint64_t first, uint64_t last)
{
	uint64_t order = p->order;

	memset(p->c + first * order, 0, (last - first) * order * sizeof(double));
	for (uint64_t block = 0; block < order; block += BLOCK) {
		uint64_t block_end = block + BLOCK < order ? block + BLOCK : order;
		for (uint64_t i = first; i < last; i++) {
			double *c = p->c + i * order;
			for (uint64_t k = block; k < block_end; k++) {
				double factor = p->a[i * order + k];
				const double *b = p->b + k * order;
				for (uint64_t j = 0; j < order; j++)
					c[j] += factor * b[j];
			}
		}
		if (first == 0 && workload_part_done != NULL)
			workload_part_done();
	}
}

static void multiply_share(const struct product *p, uint64_t number)
{
	multiply_rows(p, p->order * number / p->threads, p->order * (number + 1) / p->threads);
}

static void *work(void *argument)
{
	const struct worker *worker = argument;
	struct product *p = worker->product;

	for (;;) {
		pthread_barrier_wait(&p->begin);
		if (p->stop)
			return NULL;
		multiply_share(p, worker->number);
		pthread_barrier_wait(&p->end);
	}
}

/* The threads live as long as the program, so that a checkpoint at any moment finds them all. */
static struct worker *start_workers(const struct workload *w, struct product *p)
{
	struct worker *workers = workload_memory(w, p->threads, sizeof(*workers));

	pthread_barrier_init(&p->begin, NULL, (unsigned) p->threads);
	pthread_barrier_init(&p->end, NULL, (unsigned) p->threads);
	for (uint64_t i = 1; i < p->threads; i++) {
		workers[i] = (struct worker) {.product = p, .number = i};
		int error = pthread_create(&workers[i].thread, NULL, work, &workers[i]);
		if (error != 0) {
			fprintf(stderr, "%s: thread %llu: %s\n", w->name, (unsigned long long) i, strerror(error));
			exit(1);
		}
	}
	return workers;
}

static void stop_workers(struct product *p, struct worker *workers)
{
	p->stop = true;
	pthread_barrier_wait(&p->begin);
	for (uint64_t i = 1; i < p->threads; i++)
		pthread_join(workers[i].thread, NULL);
	free(workers);
}

static void make(double *matrix, uint64_t count, uint64_t seed)
{
	for (uint64_t i = 0; i < count; i++)
		matrix[i] = (double) (int64_t) (workload_draw(seed, i) >> 53) - 1024.0;
}

/* Set y to the product of matrix and x. */
static void apply(double *y, const double *matrix, const double *x, uint64_t order)
{
	for (uint64_t i = 0; i < order; i++) {
		y[i] = 0.0;
		for (uint64_t j = 0; j < order; j++)
			y[i] += matrix[i * order + j] * x[j];
	}
}

/* Freivalds' check: C x must be A (B x). Returns order, or the first row that is wrong. vectors is room for
 * four. No element of x is 0, so that a single wrong element of C is always found. */
static uint64_t check(const struct product *p, uint64_t seed, double *vectors)
{
	double *x = vectors, *bx = x + p->order, *abx = bx + p->order, *cx = abx + p->order;

	for (uint64_t i = 0; i < p->order; i++)
		x[i] = (double) (workload_draw(seed, i) >> 53 | 1);
	apply(bx, p->b, x, p->order);
	apply(abx, p->a, bx, p->order);
	apply(cx, p->c, x, p->order);
	for (uint64_t i = 0; i < p->order; i++)
		if (!(abx[i] == cx[i]))
			return i;
	return p->order;
}

int main(int argc, char **argv)
{
	struct workload w = {
		.name = "matmul",
		.size_name = "ORDER",
		.step_name = "repeat",
		.steps_name = "REPEATS",
		.size = 500,
		.size_min = 1,
		.size_max = 2048,
		.steps = 20,
		.threaded = true,
	};

	workload_parse(&w, argc, argv);
	uint64_t elements = w.size * w.size;
	struct product p = {.order = w.size, .threads = w.threads};
	p.a = workload_memory(&w, elements, sizeof(double));
	p.b = workload_memory(&w, elements, sizeof(double));
	p.c = workload_memory(&w, elements, sizeof(double));
	double *vectors = workload_memory(&w, 4 * w.size, sizeof(double));
	struct worker *workers = start_workers(&w, &p);
	uint64_t checksum = workload_start(&w);

	for (uint64_t repeat = 1; repeat <= w.steps; repeat++) {
		make(p.a, elements, workload_seed(checksum, repeat, 0));
		make(p.b, elements, workload_seed(checksum, repeat, 1));
		pthread_barrier_wait(&p.begin);
		multiply_share(&p, 0);
		pthread_barrier_wait(&p.end);
		if (repeat == w.spoil_at)
			p.c[elements / 2] += 1.0;
		uint64_t row = check(&p, workload_seed(checksum, repeat, 2), vectors);
		if (row < w.size)
			workload_check_failed(&w, repeat, "row %llu of the product is wrong",
					      (unsigned long long) row);
		checksum = workload_fold_doubles(checksum, p.c, elements);
		workload_step_done(&w, repeat, checksum);
	}
	stop_workers(&p, workers);
	free(vectors);
	free(p.c);
	free(p.b);
	free(p.a);
	return workload_end(&w, checksum);
}
