/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef OUTLAST_PREDICT_H
#define OUTLAST_PREDICT_H

#include <stdbool.h>
#include <sys/types.h>

/* What a process was seen to have before it was frozen. */
struct prediction {
	pid_t pid;
	char *smaps; /* of each mapping, two lines: its first and "VmFlags: ..." */
	bool no_guards;
	bool written; /* it has been given to CRIU, and will be verified */
	struct prediction *next;
};

/* Looks at process PID, which need not be frozen. */
void predict(pid_t pid);

/* What was seen of process PID, or NULL. */
struct prediction *prediction_of(pid_t pid);
void forget_predictions(void);

/* Opens what may stand for /proc/PID/smaps of the process, now frozen, and is written down in the image
 * directory as "predicted-PID"; -1 if the process is not as it was. */
int open_predicted(struct prediction *prediction);

struct pm_scan_arg;
bool is_about_guards(const struct pm_scan_arg *arguments);

#endif
