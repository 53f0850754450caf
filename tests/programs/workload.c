#define _GNU_SOURCE
#include "workload.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_STEPS 1000000000
#define MAX_THREADS 64
#define MAX_PACE 86400

static void print_usage(const struct workload *w, FILE *to)
{
	fprintf(to,
		"usage: %s [options] [%s [%s]]\n"
		"  %-22s %" PRIu64 " to %" PRIu64 ", %" PRIu64 " unless given\n"
		"  %-22s how many %ss, %" PRIu64 " unless given\n"
		"  --pace SECONDS         sleep so long between two %ss\n"
		"  --fail-at STEP CODE    exit with CODE after the line of this %s\n"
		"  --signal-at STEP SIG   die by the signal (TERM, 15) after the line of this %s\n"
		"  --spoil-at STEP        spoil the result of this %s, so that its check must fail\n",
		w->name, w->size_name, w->steps_name, w->size_name, w->size_min, w->size_max, w->size,
		w->steps_name, w->step_name, w->steps, w->step_name, w->step_name, w->step_name, w->step_name);
	if (w->threaded)
		fprintf(to, "  --threads N            compute with N threads, 1 to %d; the result is the same\n",
			MAX_THREADS);
	fputs("exit codes: 0 right result, 1 a check failed, 2 wrong arguments\n", to);
}

static void refuse(const struct workload *w, const char *what, const char *text, const char *why)
	__attribute__((noreturn));

static void refuse(const struct workload *w, const char *what, const char *text, const char *why)
{
	print_usage(w, stderr);
	fprintf(stderr, "%s: %s %s: %s\n", w->name, what, text, why);
	exit(2);
}

static uint64_t whole_number(const struct workload *w, const char *what, const char *text, uint64_t min,
			     uint64_t max)
{
	char why[80];
	size_t digits = strspn(text, "0123456789");

	snprintf(why, sizeof(why), "must be a whole number, %" PRIu64 " to %" PRIu64, min, max);
	/* With at most 18 digits strtoull() cannot overflow. */
	if (digits == 0 || digits > 18 || text[digits] != '\0')
		refuse(w, what, text, why);
	uint64_t number = strtoull(text, NULL, 10);
	if (number < min || number > max)
		refuse(w, what, text, why);
	return number;
}

static struct timespec seconds(const struct workload *w, const char *what, const char *text)
{
	size_t digits = strspn(text, "0123456789.");
	char *end;
	double value = strtod(text, &end);

	if (digits == 0 || text[digits] != '\0' || *end != '\0' || end == text || value > MAX_PACE)
		refuse(w, what, text, "must be seconds, such as 0.5, at most a day");
	time_t whole = (time_t) value;
	return (struct timespec) {.tv_sec = whole, .tv_nsec = (long) ((value - (double) whole) * 1e9)};
}

static int signal_number(const struct workload *w, const char *what, const char *text)
{
	const char *name = strncmp(text, "SIG", 3) == 0 ? text + 3 : text;

	for (int number = 1; number < NSIG; number++) {
		const char *known = sigabbrev_np(number);
		if (known != NULL && strcmp(known, name) == 0)
			return number;
	}
	if (text[0] < '0' || text[0] > '9')
		refuse(w, what, text, "no such signal; write TERM, SIGTERM or 15");
	return (int) whole_number(w, what, text, 1, NSIG - 1);
}

/* Return the second argument of an option that has two: getopt knows only of one. */
static const char *second_argument(const struct workload *w, const char *what, int argc, char **argv)
{
	if (optind >= argc)
		refuse(w, what, optarg, "takes two arguments");
	return argv[optind++];
}

void workload_parse(struct workload *w, int argc, char **argv)
{
	static const struct option options[] = {
		{"pace", required_argument, NULL, 'p'},	     {"fail-at", required_argument, NULL, 'f'},
		{"signal-at", required_argument, NULL, 's'}, {"spoil-at", required_argument, NULL, 'x'},
		{"help", no_argument, NULL, 'h'},	     {"threads", required_argument, NULL, 't'},
		{NULL, 0, NULL, 0},
	};
	const char *fail_at = NULL, *fail_code = NULL, *signal_at = NULL, *signal = NULL, *spoil_at = NULL;
	const struct workload program = *w; /* with its defaults, for the usage */
	int option;

	w->threads = 1;
	while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
		switch (option) {
		case 'p':
			w->pace = seconds(&program, "--pace", optarg);
			break;
		case 'f':
			fail_at = optarg;
			fail_code = second_argument(&program, "--fail-at", argc, argv);
			break;
		case 's':
			signal_at = optarg;
			signal = second_argument(&program, "--signal-at", argc, argv);
			break;
		case 'x':
			spoil_at = optarg;
			break;
		case 't':
			if (!w->threaded)
				refuse(&program, "--threads", optarg, "this workload has one thread");
			w->threads = whole_number(&program, "--threads", optarg, 1, MAX_THREADS);
			break;
		case 'h':
			print_usage(&program, stdout);
			exit(0);
		default:
			print_usage(&program, stderr); /* getopt has said what is wrong */
			exit(2);
		}
	}
	if (optind < argc)
		w->size = whole_number(&program, w->size_name, argv[optind++], w->size_min, w->size_max);
	if (optind < argc)
		w->steps = whole_number(&program, w->steps_name, argv[optind++], 1, MAX_STEPS);
	if (optind < argc)
		refuse(&program, "argument", argv[optind], "is one too many");
	/* Only now, since the options may stand before the number of steps that bounds them. */
	if (fail_at != NULL) {
		w->fail_at = whole_number(&program, "--fail-at", fail_at, 1, w->steps);
		w->fail_code = (int) whole_number(&program, "--fail-at, CODE", fail_code, 0, 255);
	}
	if (signal_at != NULL) {
		w->signal_at = whole_number(&program, "--signal-at", signal_at, 1, w->steps);
		w->signal_number = signal_number(&program, "--signal-at, SIG", signal);
	}
	if (spoil_at != NULL)
		w->spoil_at = whole_number(&program, "--spoil-at", spoil_at, 1, w->steps);
}

void *workload_memory(const struct workload *w, uint64_t count, uint64_t size)
{
	void *memory = calloc(count, size);

	if (memory == NULL) {
		fprintf(stderr, "%s: %" PRIu64 " bytes: no memory\n", w->name, count * size);
		exit(1);
	}
	return memory;
}

void workload_check_failed(const struct workload *w, uint64_t step, const char *format, ...)
{
	va_list arguments;

	fprintf(stderr, "%s: %s %" PRIu64 ": check failed: ", w->name, w->step_name, step);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

/* Write the line in one piece, so that nobody reads half of it. */
static void flush(const struct workload *w)
{
	if (fflush(stdout) == 0)
		return;
	fprintf(stderr, "%s: standard output: %s\n", w->name, strerror(errno));
	_exit(1); /* exit() would try to write the same line again */
}

static void die_by_signal(const struct workload *w)
{
	sigset_t set;

	/* The caller may have left it ignored or blocked. SIGKILL refuses to be reset, and needs it not. */
	signal(w->signal_number, SIG_DFL);
	sigemptyset(&set);
	sigaddset(&set, w->signal_number);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	raise(w->signal_number);
	fprintf(stderr, "%s: signal %d: did not end the program\n", w->name, w->signal_number);
	exit(1);
}

void workload_step_done(const struct workload *w, uint64_t step, uint64_t checksum)
{
	struct timespec rest = w->pace;

	printf("%s %" PRIu64 " of %" PRIu64 " checksum %016" PRIx64 "\n", w->step_name, step, w->steps, checksum);
	flush(w);
	if (step == w->fail_at)
		exit(w->fail_code);
	if (step == w->signal_at)
		die_by_signal(w);
	/* A restored process finds its sleep interrupted, and goes on with what was left of it. */
	if (step < w->steps)
		while (nanosleep(&rest, &rest) == -1 && errno == EINTR)
			;
}

int workload_end(const struct workload *w, uint64_t checksum)
{
	printf("result %016" PRIx64 " ok\n", checksum);
	flush(w);
	return 0;
}

/* The finalizer of SplitMix64. Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators
 * (OOPSLA 2014), with the constants of Vigna's public domain splitmix64.c. */
static uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

uint64_t workload_start(const struct workload *w)
{
	return mix(w->size);
}

uint64_t workload_seed(uint64_t checksum, uint64_t step, unsigned stream)
{
	return mix(checksum ^ mix(step << 2 | stream));
}

uint64_t workload_draw(uint64_t seed, uint64_t index)
{
	return mix(seed + (index + 1) * 0x9e3779b97f4a7c15);
}

uint64_t workload_fold(uint64_t checksum, uint64_t word)
{
	checksum = (checksum ^ word) * 0x9e3779b97f4a7c15;
	return checksum << 29 | checksum >> 35; /* else high bits would never reach low ones */
}

uint64_t workload_fold_doubles(uint64_t checksum, const double *values, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		uint64_t word;
		memcpy(&word, &values[i], sizeof(word));
		checksum = workload_fold(checksum, word);
	}
	return checksum;
}
