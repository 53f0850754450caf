/*
 * SPANK plugin: adds --checkpoint=INTERVAL to sbatch, salloc and srun, and starts a batch script that asked for
 * checkpoints under the shim.
 *
 * All else is the work of the shim and the job's manager. This file only moves words from one command line
 * to another, since it is loaded into sbatch and, as root, into slurmstepd, where a crash takes the job with it.
 *
 * plugstack.conf:  optional spank_outlast.so shim=/usr/libexec/outlast/outlast-shim
 *
 * A bad --checkpoint is refused at submission. After that nothing here may stop a job: every callback returns
 * 0, and a job that cannot be checkpointed runs without, and says so in its own stderr.
 */
#define _GNU_SOURCE /* program_invocation_short_name */
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(outlast, 1)

#define SHIM_KEY "shim="
#define LONGEST_INTERVAL (30 * 86400) /* seconds */

/* What sbatch and salloc hand on to the commands inside the job: their default for --checkpoint. */
#define INHERITED "SLURM_SPANK__SLURM_SPANK_OPTION_outlast_checkpoint"

/* Slurm 23.11 and later. Weak, so that the plugin still loads, and says so, under an older slurmstepd. */
extern spank_err_t spank_prepend_task_argv(spank_t sp, int argc, const char *argv[])
	__attribute__((weak));

/*
 * sbatch's own options, and the functions of libslurm that read and write them by name. They are in no header
 * of Slurm's, but the same in each release from 23.11 to 26.05, which exports them to its plugins. All weak:
 * without them the user is told what to write. opt is opaque; sbopt is in sbatch only and scopt in scrontab only,
 * and tell them from salloc.
 */
extern char opt[] __attribute__((weak));
extern char sbopt[] __attribute__((weak));
extern char scopt[] __attribute__((weak));
extern char *slurm_option_get(void *options, const char *name) __attribute__((weak));
extern int slurm_option_set(void *options, const char *name, const char *value, bool early)
	__attribute__((weak));
extern void slurm_xfree_ptr(void *text) __attribute__((weak));

static char shim[PATH_MAX] = "/usr/libexec/outlast/outlast-shim";
static char interval[16]; /* as the user wrote it; empty where the job has no --checkpoint */

/* Whether text is auto, or [1-9][0-9]{0,6}[smhd], at most 30d: the grammar of parse_pace in outlast/model.py. */
static bool is_interval(const char *text)
{
	size_t digits = strspn(text, "0123456789");
	long unit;

	if (strcmp(text, "auto") == 0)
		return true;
	if (digits < 1 || digits > 7 || text[0] == '0' || strlen(text) != digits + 1)
		return false;
	switch (text[digits]) {
	case 's': unit = 1; break;
	case 'm': unit = 60; break;
	case 'h': unit = 3600; break;
	case 'd': unit = 86400; break;
	default: return false;
	}
	return strtol(text, NULL, 10) <= LONGEST_INTERVAL / unit;
}

static int set_interval(int val, const char *text, int remote)
{
	(void) val;
	if (scopt != NULL) {
		slurm_error("outlast: scrontab gives no --checkpoint to its jobs; "
			    "let the entry's command be sbatch --checkpoint=INTERVAL");
		return -1;
	}
	if (text != NULL && is_interval(text)) {
		snprintf(interval, sizeof(interval), "%s", text);
		return 0;
	}
	slurm_error("outlast: --checkpoint=%.64s: not a time between 1s and 30d; "
		    "write a whole number and a unit: 30s, 10m, 1h or 2d; or auto", text != NULL ? text : "");
	/* On the node it is too late to refuse: the job runs without checkpoints. */
	return remote ? 0 : -1;
}

static struct spank_option checkpoint_option = {
	.name = "checkpoint",
	.arginfo = "INTERVAL",
	.usage = "[outlast] checkpoint the batch job every INTERVAL (30s, 10m, 1h, 2d; or auto) "
		 "and restart it from the newest checkpoint if its node fails",
	.has_arg = 1,
	.cb = set_interval,
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	spank_context_t context = spank_context();

	/* The prolog, the epilog and slurmd itself have no use for the option or the shim. */
	if (context != S_CTX_ALLOCATOR && context != S_CTX_LOCAL && context != S_CTX_REMOTE)
		return 0;
	for (int i = 0; i < ac; i++) {
		if (strncmp(av[i], SHIM_KEY "/", sizeof(SHIM_KEY)) == 0 && strlen(av[i]) < sizeof(shim))
			snprintf(shim, sizeof(shim), "%s", av[i] + sizeof(SHIM_KEY) - 1);
		else
			slurm_error("outlast: plugstack.conf: %s: not understood; "
				    "the only argument is " SHIM_KEY "/absolute/path", av[i]);
	}
	if (spank_option_register(sp, &checkpoint_option) != ESPANK_SUCCESS)
		slurm_error("outlast: Slurm did not take the option --checkpoint; jobs run without checkpoints");
	return 0;
}

/*
 * Give sbatch's option the value that a restarted job needs, unless the user chose another: then the user's
 * stands, and a line says what it costs.
 */
static void choose_option(const char *name, const char *needed, const char *contrary, const char *cost)
{
	char *chosen = slurm_option_get(opt, name);

	/* Slurm gives NULL or "unset" for what nobody chose, and "a" or "t" for the open mode. */
	if (chosen == NULL || strcmp(chosen, "unset") == 0) {
		if (slurm_option_set(opt, name, needed, false) != 0)
			slurm_spank_log("outlast: sbatch did not take %s=%s: %s", name, needed, cost);
	} else if (strncmp(chosen, needed, strlen(chosen)) != 0) {
		slurm_spank_log("outlast: %s: %s", contrary, cost);
	}
	if (slurm_xfree_ptr != NULL)
		slurm_xfree_ptr(chosen);
}

/*
 * Say at submission what the node would say as well, where it is known by then. Slurm gives the number of nodes as
 * 2 or, for a range, as 2-4. sbatch comes here once for each component of a heterogeneous job.
 */
static void say_what_has_no_checkpoints(void)
{
	static bool asked, said;
	static int components;

	components++;
	asked = asked || interval[0] != '\0';
	if (!asked || said)
		return;
	if (components > 1) {
		slurm_spank_log("outlast: this runs without checkpoints: heterogeneous jobs cannot be checkpointed");
		said = true;
	} else if (opt != NULL && slurm_option_get != NULL) {
		char *nodes = slurm_option_get(opt, "nodes");

		if (nodes != NULL && strtol(nodes, NULL, 10) > 1) {
			slurm_spank_log("outlast: this runs without checkpoints: "
					"only jobs on one node can be checkpointed");
			said = true;
		}
		if (slurm_xfree_ptr != NULL)
			slurm_xfree_ptr(nodes);
	}
}

/* In sbatch: all options, of the command line, the environment and the script, are read, and not yet sent. */
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	spank_context_t context = spank_context();
	bool is_sbatch = context == S_CTX_ALLOCATOR &&
			 (sbopt != NULL || strcmp(program_invocation_short_name, "salloc") != 0);

	(void) sp;
	(void) ac;
	(void) av;
	if (is_sbatch && sbopt != NULL)
		say_what_has_no_checkpoints();
	if (interval[0] == '\0' || context == S_CTX_REMOTE)
		return 0;
	if (!is_sbatch) {
		if (getenv(INHERITED) == NULL)
			slurm_spank_log("outlast: --checkpoint acts on batch jobs only; "
					"this runs without checkpoints");
	} else if (sbopt != NULL && opt != NULL && slurm_option_get != NULL && slurm_option_set != NULL) {
		choose_option("open-mode", "append", "--open-mode=truncate",
			      "every restart empties the job's output file");
		choose_option("requeue", "requeue", "--no-requeue",
			      "the job is not restarted when its node fails");
	} else {
		slurm_spank_log("outlast: this sbatch keeps its options to itself; "
				"write --open-mode=append and --requeue beside --checkpoint");
	}
	/* sbatch reads the options of a heterogeneous job's next component now: they are its own. */
	interval[0] = '\0';
	return 0;
}

/* On the node: runs as the user, in the process that is about to become the task. */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	const char *prefix[] = { shim, "--interval", interval, "--" };
	char nodes[16] = "1", components[16];
	uint32_t step = 0;

	(void) ac;
	(void) av;
	if (interval[0] == '\0' || spank_get_item(sp, S_JOB_STEPID, &step) != ESPANK_SUCCESS ||
	    step != SLURM_BATCH_SCRIPT)
		return 0;
	/* The flag is this job's: neither its steps nor the jobs that it submits in turn have asked for it. */
	spank_unsetenv(sp, INHERITED);
	/* S_JOB_NNODES is 0 in a batch step. */
	spank_getenv(sp, "SLURM_JOB_NUM_NODES", nodes, sizeof(nodes));
	if (strcmp(nodes, "1") != 0)
		slurm_spank_log("outlast: runs without checkpoints: the job has %s nodes, "
				"and only jobs on one node can be checkpointed", nodes);
	else if (spank_getenv(sp, "SLURM_HET_SIZE", components, sizeof(components)) == ESPANK_SUCCESS)
		slurm_spank_log("outlast: runs without checkpoints: heterogeneous jobs cannot be checkpointed");
	else if (spank_prepend_task_argv == NULL)
		slurm_spank_log("outlast: runs without checkpoints: they need Slurm 23.11 or later");
	else if (access(shim, X_OK) != 0) /* to put it in front would fail the job */
		slurm_spank_log("outlast: runs without checkpoints: %s: %s", shim, strerror(errno));
	else if (spank_prepend_task_argv(sp, sizeof(prefix) / sizeof(*prefix), prefix) != ESPANK_SUCCESS)
		slurm_spank_log("outlast: runs without checkpoints: Slurm did not take %s", shim);
	return 0;
}
