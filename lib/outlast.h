/* Outlast for programs: checkpoints at the program's own points. Link with -loutlast. See outlast_ckpt(3). */
#ifndef OUTLAST_H
#define OUTLAST_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Checkpoints the whole job at this point. Returns 0 when the checkpoint is in the store, 1 in the job that was
 * restored from it, and -1 if there is none: outlast_error() says why, the program runs on. Where there is no
 * Outlast it returns 0 at once.
 */
int outlast_ckpt(void);

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
 * Critical data: outlast_protect() names the memory that alone is worth saving; outlast_save() writes all of it to
 * a file, whole or not at all; outlast_load() reads it back into the same memory of a new process, and then calls
 * each restored(data). Ids are the program's own. They work without Outlast. Return 0; -1: outlast_error() says why,
 * and after a failed outlast_load() all memory is as it was.
 */
int outlast_protect(int id, void *address, size_t length, void (*restored)(void *data), void *data);
int outlast_unprotect(int id);
int outlast_save(const char *path);
int outlast_load(const char *path);

#ifndef OUTLAST_NO_SHORT_NAMES
static inline int ckpt(void)
{
	return outlast_ckpt();
}
#endif

#ifdef __cplusplus
}
#endif
#endif
