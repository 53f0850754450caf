/*
 * The cellular automaton Life (a cell is born with 3 neighbors, lives on with 2 or 3) on a torus of
 * SIZE x SIZE cells, a byte each. cellular.py counts in another way and gives the same checksums.
 */
#include "workload.h"

#include <stdlib.h>
#include <string.h>

/* SIZE + 2 rows of SIZE + 2 cells: the rim repeats the opposite side, so that no cell has a special case. */
struct grid {
	uint64_t size, stride;
	uint8_t *cells;
};

/* What one generation counted while it was computed. */
struct census {
	uint64_t births, deaths, neighbors;
};

static uint8_t *row_of(const struct grid *g, uint64_t row)
{
	return g->cells + (row + 1) * g->stride + 1;
}

static void wrap(struct grid *g)
{
	for (uint64_t row = 0; row < g->size; row++) {
		uint8_t *cells = row_of(g, row);
		cells[-1] = cells[g->size - 1];
		cells[g->size] = cells[0];
	}
	memcpy(g->cells, g->cells + g->size * g->stride, g->stride);
	memcpy(g->cells + (g->size + 1) * g->stride, g->cells + g->stride, g->stride);
}

static uint64_t population(const struct grid *g)
{
	uint64_t alive = 0;

	for (uint64_t row = 0; row < g->size; row++)
		for (uint64_t column = 0; column < g->size; column++)
			alive += row_of(g, row)[column];
	return alive;
}

static struct census advance(const struct grid *from, struct grid *to)
{
	struct census census = {0, 0, 0};

	for (uint64_t row = 0; row < from->size; row++) {
		const uint8_t *here = row_of(from, row), *up = here - from->stride, *down = here + from->stride;
		uint8_t *next = row_of(to, row);
		for (uint64_t column = 0; column < from->size; column++) {
			const uint8_t *u = up + column, *h = here + column, *d = down + column;
			unsigned count = u[-1] + u[0] + u[1] + h[-1] + h[1] + d[-1] + d[0] + d[1];
			next[column] = count == 3 || (count == 2 && *h);
			census.neighbors += count;
			census.births += next[column] & ~*h;
			census.deaths += *h & ~next[column];
		}
	}
	return census;
}

/* Fold the grid row by row, 64 cells a word, the leftmost in the lowest bit; a row begins with a new word. */
static uint64_t fold(uint64_t checksum, const struct grid *g)
{
	for (uint64_t row = 0; row < g->size; row++) {
		const uint8_t *cells = row_of(g, row);
		for (uint64_t column = 0; column < g->size; column += 64) {
			uint64_t word = 0;
			for (uint64_t bit = 0; bit < 64 && column + bit < g->size; bit++)
				word |= (uint64_t) cells[column + bit] << bit;
			checksum = workload_fold(checksum, word);
		}
	}
	return checksum;
}

static struct grid make(const struct workload *w)
{
	struct grid g = {.size = w->size, .stride = w->size + 2};

	g.cells = workload_memory(w, g.stride * g.stride, 1);
	return g;
}

int main(int argc, char **argv)
{
	struct workload w = {
		.name = "cellular",
		.size_name = "SIZE",
		.step_name = "generation",
		.steps_name = "GENERATIONS",
		.size = 1024,
		.size_min = 3, /* on a smaller torus a cell would be its own neighbor */
		.size_max = 16384,
		.steps = 1000,
	};

	workload_parse(&w, argc, argv);
	struct grid old = make(&w), new = make(&w);
	uint64_t checksum = workload_start(&w);
	uint64_t seed = workload_seed(checksum, 0, 0);

	for (uint64_t row = 0; row < w.size; row++)
		for (uint64_t column = 0; column < w.size; column++)
			row_of(&old, row)[column] = workload_draw(seed, row * w.size + column) >> 63;
	uint64_t alive = population(&old);

	for (uint64_t generation = 1; generation <= w.steps; generation++) {
		wrap(&old);
		struct census census = advance(&old, &new);
		/* Every living cell is a neighbor of eight: this holds on any torus, whatever the pattern, and
		 * also finds cells that changed since they were counted. */
		if (census.neighbors != 8 * alive)
			workload_check_failed(&w, generation, "%llu cells were seen %llu times, not 8 times each",
					      (unsigned long long) alive, (unsigned long long) census.neighbors);
		if (generation == w.spoil_at)
			row_of(&new, w.size / 2)[w.size / 2] ^= 1;
		uint64_t expected = alive + census.births - census.deaths;
		alive = population(&new);
		if (alive != expected)
			workload_check_failed(&w, generation, "%llu cells live, births and deaths leave %llu",
					      (unsigned long long) alive, (unsigned long long) expected);
		struct grid kept = old;
		old = new;
		new = kept;
		checksum = fold(checksum, &old);
		workload_step_done(&w, generation, checksum);
	}
	free(new.cells);
	free(old.cells);
	return workload_end(&w, checksum);
}
