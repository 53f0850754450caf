/*
 * rlimit_shim.so: lets CRIU dump another user's process on a machine whose root has no CAP_SYS_RESOURCE.
 *
 * CRIU reads the limits of each process with prlimit64(), which the kernel refuses there with EPERM. The same
 * numbers are in /proc/PID/limits, which root may read. Only reading is helped, and only after the kernel has
 * refused. CRIU calls through syscall(), not prlimit(), so that is what stands here. For test machines only:
 * preloaded into criu by the wrapper that the testbed installs where the capability is missing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* proc(5), /proc/PID/limits; the order is that of RLIMIT_* in asm-generic/resource.h. */
static const char *const names[] = {
	"Max cpu time",	     "Max file size",	    "Max data size",	    "Max stack size",
	"Max core file size", "Max resident set",   "Max processes",	    "Max open files",
	"Max locked memory", "Max address space",   "Max file locks",	    "Max pending signals",
	"Max msgqueue size", "Max nice priority",   "Max realtime priority", "Max realtime timeout",
};

static rlim64_t number(const char *word)
{
	return strcmp(word, "unlimited") == 0 ? RLIM64_INFINITY : strtoull(word, NULL, 10);
}

static int read_limit(pid_t pid, unsigned long resource, struct rlimit64 *limit)
{
	char path[64], line[256], soft[32], hard[32];
	int found = -1;

	if (resource >= sizeof(names) / sizeof(names[0]))
		return -1;
	snprintf(path, sizeof(path), "/proc/%d/limits", (int) pid);
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return -1;
	size_t length = strlen(names[resource]);
	while (found != 0 && fgets(line, sizeof(line), file) != NULL) {
		if (strncmp(line, names[resource], length) == 0 &&
		    sscanf(line + length, "%31s %31s", soft, hard) == 2) {
			limit->rlim_cur = number(soft);
			limit->rlim_max = number(hard);
			found = 0;
		}
	}
	fclose(file);
	return found;
}

long syscall(long which, ...)
{
	static long (*real)(long, ...);
	long arguments[6];
	va_list list;

	va_start(list, which);
	for (int i = 0; i < 6; i++)
		arguments[i] = va_arg(list, long);
	va_end(list);
	if (real == NULL)
		real = (long (*)(long, ...)) dlsym(RTLD_NEXT, "syscall");
	long result = real(which, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
			   arguments[5]);
	if (which == SYS_prlimit64 && result == -1 && errno == EPERM && arguments[0] != 0 && arguments[2] == 0 &&
	    arguments[3] != 0 &&
	    read_limit((pid_t) arguments[0], (unsigned long) arguments[1], (struct rlimit64 *) arguments[3]) == 0)
		return 0;
	return result;
}
