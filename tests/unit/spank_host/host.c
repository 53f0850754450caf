/*
 * Loads the SPANK plugin as one of Slurm's programs would, calls its callbacks in Slurm's order, and prints what
 * the plugin asked of Slurm, a line each.
 *
 *     host PLUGIN.so WHERE [KEY=VALUE...]
 *
 * WHERE: allocator, local, remote, slurmd or job_script. Keys, in any order and number:
 *     arg        an argument of the plugin's line in plugstack.conf
 *     option     --checkpoint as the user wrote it
 *     name       the program's name
 *     open-mode, requeue    what sbatch's options say before the plugin sees them
 *     step       the step's id, or "batch"
 *     env        NAME=VALUE in the job's environment
 *
 * With -DSBATCH it has what the plugin needs of sbatch, with -DSCRONTAB what it knows scrontab by, with -DNODE what
 * it needs of slurmstepd 23.11 and later; with none of them it is an older Slurm.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

static const char *where;
static struct spank_option *registered;
static uint32_t step = SLURM_BATCH_SCRIPT;
static char *job_env[16];
static int job_envs;

static void say(const char *what, const char *format, va_list list)
{
	printf("%s ", what);
	vprintf(format, list);
	printf("\n");
}

void slurm_error(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	say("error", format, list);
	va_end(list);
}

void slurm_spank_log(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	say("log", format, list);
	va_end(list);
}

spank_context_t spank_context(void)
{
	static const char *names[] = { "error", "local", "remote", "allocator", "slurmd", "job_script" };

	for (int i = 0; i < 6; i++)
		if (strcmp(where, names[i]) == 0)
			return (spank_context_t) i;
	return S_CTX_ERROR;
}

spank_err_t spank_option_register(spank_t sp, struct spank_option *option)
{
	(void) sp;
	registered = option;
	printf("registered %s %s\n", option->name, option->arginfo);
	return ESPANK_SUCCESS;
}

spank_err_t spank_get_item(spank_t sp, spank_item_t item, ...)
{
	va_list list;

	(void) sp;
	if (item != S_JOB_STEPID)
		return ESPANK_BAD_ARG;
	va_start(list, item);
	*va_arg(list, uint32_t *) = step;
	va_end(list);
	return ESPANK_SUCCESS;
}

spank_err_t spank_getenv(spank_t sp, const char *name, char *buffer, int size)
{
	size_t length = strlen(name);

	(void) sp;
	for (int i = 0; i < job_envs; i++)
		if (strncmp(job_env[i], name, length) == 0 && job_env[i][length] == '=') {
			int needed = snprintf(buffer, size, "%s", job_env[i] + length + 1);
			return needed < size ? ESPANK_SUCCESS : ESPANK_NOSPACE;
		}
	return ESPANK_ENV_NOEXIST;
}

spank_err_t spank_unsetenv(spank_t sp, const char *name)
{
	(void) sp;
	printf("unsetenv %s\n", name);
	return ESPANK_SUCCESS;
}

#ifdef NODE
spank_err_t spank_prepend_task_argv(spank_t sp, int argc, const char *argv[])
{
	(void) sp;
	printf("prepend");
	for (int i = 0; i < argc; i++)
		printf(" %s", argv[i]);
	printf("\n");
	return ESPANK_SUCCESS;
}
#endif

static char *open_mode, *requeue, *nodes; /* NULL or "unset": the user chose none */

#ifdef SBATCH
char opt[1], sbopt[1];

char *slurm_option_get(void *options, const char *name)
{
	const char *value = strcmp(name, "nodes") == 0       ? nodes
			    : strcmp(name, "open-mode") == 0 ? open_mode
							     : requeue;

	if (options != opt)
		abort();
	return value != NULL ? strdup(value) : NULL;
}

int slurm_option_set(void *options, const char *name, const char *value, bool early)
{
	if (options != opt || early)
		abort();
	printf("set %s %s\n", name, value);
	return 0;
}

void slurm_xfree_ptr(void *text)
{
	free(text);
}
#endif

#ifdef SCRONTAB
char scopt[1];
#endif

static int call(void *plugin, const char *name, int ac, char **av)
{
	int (*callback)(spank_t, int, char **) = dlsym(plugin, name);
	int code = callback != NULL ? callback(NULL, ac, av) : 0;

	printf("%s %d\n", name, code);
	return code;
}

int main(int argc, char **argv)
{
	char *args[8];
	const char *options[8];
	int n_args = 0, n_options = 0, components = 1;
	void *plugin;

	if (argc < 3)
		return 64;
	where = argv[2];
	for (int i = 3; i < argc; i++) {
		char *value = strchr(argv[i], '=');

		if (value == NULL || n_args == 8 || n_options == 8 || job_envs == 16)
			return 64;
		*value++ = '\0';
		if (strcmp(argv[i], "arg") == 0)
			args[n_args++] = value;
		else if (strcmp(argv[i], "option") == 0)
			options[n_options++] = value;
		else if (strcmp(argv[i], "env") == 0)
			job_env[job_envs++] = value;
		else if (strcmp(argv[i], "name") == 0)
			program_invocation_short_name = value;
		else if (strcmp(argv[i], "open-mode") == 0)
			open_mode = value;
		else if (strcmp(argv[i], "requeue") == 0)
			requeue = value;
		else if (strcmp(argv[i], "nodes") == 0)
			nodes = value;
		else if (strcmp(argv[i], "components") == 0)
			components = atoi(value);
		else if (strcmp(argv[i], "step") == 0)
			step = strcmp(value, "batch") == 0 ? SLURM_BATCH_SCRIPT : (uint32_t) atol(value);
		else
			return 64;
	}
	plugin = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	if (plugin == NULL) {
		fprintf(stderr, "%s\n", dlerror());
		return 66;
	}
	call(plugin, "slurm_spank_init", n_args, args);
	for (int i = 0; i < n_options; i++) {
		int code = registered->cb(registered->val, options[i], strcmp(where, "remote") == 0);

		printf("option %d\n", code);
		if (code != 0)
			return 1;
	}
	for (int i = 0; i < components; i++)
		call(plugin, "slurm_spank_init_post_opt", n_args, args);
	if (strcmp(where, "remote") == 0)
		call(plugin, "slurm_spank_task_init", n_args, args);
	dlclose(plugin);
	return 0;
}
