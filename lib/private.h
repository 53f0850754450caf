/* What the files of liboutlast share. */
#ifndef OUTLAST_PRIVATE_H
#define OUTLAST_PRIVATE_H

/* Sets what outlast_error() returns; returns -1. */
__attribute__((format(printf, 1, 2), visibility("hidden"))) int outlast_fail(const char *form, ...);

/* There is no error. */
__attribute__((visibility("hidden"))) void outlast_no_error(void);

#endif
