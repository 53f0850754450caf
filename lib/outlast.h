/* Outlast for programs: checkpoints at the program's own points. Link with -loutlast. See outlast_ckpt(3). */
#ifndef OUTLAST_H
#define OUTLAST_H

#include <stddef.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Checkpoints the whole job at this point. Returns 0 when the checkpoint is in the store, 1 in the job that was
 * restored from it, and -1 if there is none: outlast_error() says why, the program runs on. Where there is no
 * Outlast it returns 0 at once.
 */
int outlast_ckpt(void);

/*
 * Has the whole job of process pid checkpointed soon, as `outlast checkpoint` does, without it noticing: a process of the
 * caller's own job, or of another job of the same user on this node; 0 is the caller itself. Returns 0 at once when that
 * is agreed on, whatever then becomes of the checkpoint, and -1 if not: outlast_error() says why.
 */
int outlast_tckpt(pid_t pid);

/* Why the last call in this thread failed; "" if it did not. */
const char *outlast_error(void);

/* Whether this process is one of a job that is checkpointed: 1 or 0. */
int outlast_active(void);

/*
 * Has before(data) called at the beginning of each outlast_ckpt(), the last one registered first, and
 * after(restored, data) at its end, the first one first. Either may be NULL. Returns 0, or -1 without memory.
 */
int outlast_on_ckpt(void (*before)(void *data), void (*after)(int restored, void *data), void *data);

/*
 * Leaves the whole pages of these length bytes out of the checkpoints that outlast_ckpt() takes: scratch memory. What
 * is in them is zero after each outlast_ckpt(). outlast_include() takes it back. Private memory only. Return 0 or -1.
 */
int outlast_exclude(void *address, size_t length);
int outlast_include(void *address, size_t length);

/*
 * Critical data: outlast_protect() names the memory, and outlast_protect_file() the files, that alone are worth saving;
 * outlast_save() writes all of them to one file, whole or not at all; outlast_load() reads it back into the same memory
 * and files for a new process, and then calls each restored(data). Ids are the program's own. They work without Outlast.
 * Return 0; -1: outlast_error() says why, and after a failed outlast_load() all memory is as it was.
 */
int outlast_protect(int id, void *address, size_t length, void (*restored)(void *data), void *data);
int outlast_protect_file(int id, const char *path, void (*restored)(void *data), void *data);
int outlast_unprotect(int id);
int outlast_save(const char *path);
int outlast_load(const char *path);

#ifndef OUTLAST_NO_SHORT_NAMES
static inline int ckpt(void)
{
	return outlast_ckpt();
}

static inline int tckpt(pid_t pid)
{
	return outlast_tckpt(pid);
}
#endif

#ifdef __cplusplus
}
#endif
#endif
