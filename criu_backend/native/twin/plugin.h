/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The part of CRIU's interface to plugins that is used here, as CRIU 4.0 to 4.2 have it. Written down here since
 * distributions ship its header, criu-plugin.h, in no package that can be relied upon. Source: criu-plugin.h. */
#ifndef OUTLAST_PLUGIN_H
#define OUTLAST_PLUGIN_H

enum {
	PLUGIN_VERSION = 0 << 16 | 2 << 8 | 0,
	/* Called for each task once the whole tree is frozen, before anything of it has been dumped. */
	HOOK_CHECKPOINT_DEVICES = 11,
	HOOKS = 12, /* that this plugin knows of; later versions of CRIU may have more */
	STAGE_DUMP = 0,
	LOG_WARNING = 2,
	LOG_INFO = 3,
};

struct plugin {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int error);
	unsigned int version;
	unsigned int hook_count;
	void *hooks[HOOKS];
};

/* CRIU's own. Weak, since this library is also loaded by what CRIU starts, where they are missing. */
extern int criu_get_image_dir(void) __attribute__((weak));
extern void print_on_level(unsigned int level, const char *format, ...) __attribute__((weak, format(printf, 2, 3)));

#endif
