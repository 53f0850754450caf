/*
 * critical.c FILE STEPS: an example of critical data. Of its 64 MiB only a few numbers are worth saving, and its log; it
 * saves them to FILE after each step, and goes on from there when it is run again. It needs no Outlast around it.
 *
 *     gcc -O2 -o critical critical.c -loutlast
 */
#include <outlast.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { CELLS = 8 << 20 };

struct state {
	uint64_t seed;
	int64_t step;
};

static struct state state = { 1, 0 };
static uint64_t *table;

/* What can be computed again is not saved: this is how it comes back. */
static void fill(void *unused)
{
	uint64_t x = state.seed;

	(void) unused;
	for (long i = 0; i < CELLS; i++)
		table[i] = x = x * 6364136223846793005u + 1442695040888963407u;
}

int main(int argc, char **argv)
{
	if (argc < 3 || (table = malloc(CELLS * sizeof(*table))) == NULL)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	FILE *log = fopen("critical.log", "a");
	if (log == NULL)
		return 2;
	outlast_protect(1, &state, sizeof(state), fill, NULL);
	outlast_protect_file(2, "critical.log", NULL, NULL);
	if (access(argv[1], F_OK) != 0) {
		fill(NULL);
	} else if (outlast_load(argv[1]) == 0) {
		printf("goes on after step %lld\n", (long long) state.step);
		/* The file is another one now, with what it held then. */
		log = freopen("critical.log", "a", log);
	} else {
		fprintf(stderr, "critical: %s\n", outlast_error());
		return 1;
	}
	while (state.step < atol(argv[2])) {
		state.seed = table[state.seed % CELLS] + (uint64_t) state.step;
		state.step++;
		fill(NULL);
		fprintf(log, "%lld %016llx\n", (long long) state.step, (unsigned long long) state.seed);
		fflush(log);
		if (outlast_save(argv[1]) < 0) {
			fprintf(stderr, "critical: %s\n", outlast_error());
			return 1;
		}
		printf("step %lld\n", (long long) state.step);
		usleep(50000);
	}
	printf("result %016llx\n", (unsigned long long) state.seed);
	return 0;
}
