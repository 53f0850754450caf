/*
 * What the workloads share: their arguments, their numbered progress lines, their random numbers and their
 * checksum. workload.py is the same in Python and must stay so, bit for bit.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <float.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#if FLT_EVAL_METHOD != 0
#error "the checksums need doubles that are rounded after every operation (on a PC: a 64-bit compiler)"
#endif

/* One run of a workload. The first group is the program's own word on itself, with defaults; the rest is set
 * by workload_parse(). A step is 1 to steps; the *_at steps are 0 where they were not asked for. */
struct workload {
	const char *name;
	const char *size_name;
	const char *step_name;
	const char *steps_name;
	uint64_t size, size_min, size_max;
	uint64_t steps;
	bool threaded;

	uint64_t threads;
	struct timespec pace;
	uint64_t fail_at, signal_at, spoil_at;
	int fail_code, signal_number;
};

/* Read the command line into *w. Ends the program with its usage: 2 for a wrong argument, 0 for --help. */
void workload_parse(struct workload *w, int argc, char **argv);

/* Return zeroed memory for count elements, or end the program with 1. */
void *workload_memory(const struct workload *w, uint64_t count, uint64_t size);

/* End the program with 1 and a message: step did not pass its own check. */
void workload_check_failed(const struct workload *w, uint64_t step, const char *format, ...)
	__attribute__((noreturn, format(printf, 3, 4)));

/* Print the step's line, then do what was asked for this step: exit, die by a signal, sleep. */
void workload_step_done(const struct workload *w, uint64_t step, uint64_t checksum);

/* Called by a program whose steps take long after each of the parts that every step has, where somebody preloads
 * something that wants to know. */
void workload_part_done(void) __attribute__((weak));

/* Print the last line. Returns the program's exit code. */
int workload_end(const struct workload *w, uint64_t checksum);

/* The checksum before the first step. */
uint64_t workload_start(const struct workload *w);

/* A seed for one stream of random numbers of a step: it depends on every result so far. stream is 0 to 3. */
uint64_t workload_seed(uint64_t checksum, uint64_t step, unsigned stream);

/* The number with this index in the stream that begins with seed: any of them, in any order (SplitMix64). */
uint64_t workload_draw(uint64_t seed, uint64_t index);

/* Fold one word into the checksum. The order of the words counts. */
uint64_t workload_fold(uint64_t checksum, uint64_t word);

/* Fold the bits of count doubles into the checksum, in order. */
uint64_t workload_fold_doubles(uint64_t checksum, const double *values, uint64_t count);

#endif
