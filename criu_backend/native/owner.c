/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Loaded into `criu dump` and `criu restore`: CRIU reaches the job's files as the job's owner does.
 *
 * CRIU runs as root, and opens by its path what the job had open. Where root is squashed, as NFS servers do, it is
 * nobody there and finds nothing in a home of mode 0700. Elsewhere it finds too much: a path that the owner has replaced
 * by a link to somebody else's file would be opened for the job.
 *
 * $OUTLAST_OWNER is "UID:GID:GROUP,GROUP,...". CRIU names the job's files relative to the root directory of their mount
 * namespace, and nothing else so: by this they are told from its images and from /proc. Source: criu 4.2,
 * criu/files-reg.c, check_path_remap(), do_open_reg_noseek_flags(), rfi_remap().
 *
 * Where the owner may not, root still may what a job can have open without being allowed to open it: directories, the
 * owner's own files, programs that may only be executed; and make and remove names as CRIU does for deleted files.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process at most so many: NGROUPS_MAX. */
#define MOST_GROUPS 65536

static struct {
	bool known;
	uid_t uid;
	gid_t gid;
	int count, before;
	gid_t *groups, *root_groups;
	struct stat top;
} owner;

/* setfsuid() and, called directly, setgroups() are of one thread alone; glibc's setgroups() would change all. */
static void become(uid_t uid, gid_t gid, int count, const gid_t *groups)
{
	int error = errno;

	syscall(SYS_setgroups, count, groups);
	setfsgid(gid);
	setfsuid(uid);
	errno = error;
}

static void as_owner(void)
{
	become(owner.uid, owner.gid, owner.count, owner.groups);
}

static void as_root(void)
{
	become(0, 0, owner.before, owner.root_groups);
}

__attribute__((constructor)) static void read_owner(void)
{
	char *word = getenv("OUTLAST_OWNER");
	int before = getgroups(0, NULL);

	if (word == NULL || before < 0 || stat("/", &owner.top) < 0)
		return;
	owner.uid = (uid_t) strtoul(word, &word, 10);
	if (owner.uid == 0 || *word++ != ':')
		return;
	owner.gid = (gid_t) strtoul(word, &word, 10);
	owner.groups = calloc(MOST_GROUPS, sizeof(gid_t));
	owner.root_groups = calloc((size_t) before + 1, sizeof(gid_t));
	if (owner.groups == NULL || owner.root_groups == NULL)
		return;
	owner.before = getgroups(before, owner.root_groups);
	while (*word++ != '\0' && *word != '\0' && owner.count < MOST_GROUPS)
		owner.groups[owner.count++] = (gid_t) strtoul(word, &word, 10);
	owner.known = owner.before >= 0;
}

static bool of_the_job(int directory, const char *path)
{
	struct stat info;
	int error = errno;
	bool is = owner.known && path[0] != '/' && directory >= 0 && fstat(directory, &info) == 0 &&
		  info.st_dev == owner.top.st_dev && info.st_ino == owner.top.st_ino;

	errno = error;
	return is;
}

static bool refused(long result)
{
	return result < 0 && (errno == EACCES || errno == EPERM);
}

/* Whether root may open for the job what its owner may not. */
static bool may_keep(int fd, int flags)
{
	struct stat info;

	if (fstat(fd, &info) < 0)
		return false;
	if (S_ISREG(info.st_mode) && info.st_uid != owner.uid)
		return (flags & O_ACCMODE) == O_RDONLY && (info.st_mode & 0111) != 0;
	return S_ISREG(info.st_mode) || S_ISDIR(info.st_mode);
}

int openat64(int directory, const char *path, int flags, ...)
{
	va_list rest;

	va_start(rest, flags);
	mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
	va_end(rest);
	if (!of_the_job(directory, path))
		return (int) syscall(SYS_openat, directory, path, flags, mode);
	as_owner();
	int fd = (int) syscall(SYS_openat, directory, path, flags, mode);
	as_root();
	if (!refused(fd))
		return fd;
	int error = errno;
	fd = (int) syscall(SYS_openat, directory, path, flags, mode);
	if (fd >= 0 && !may_keep(fd, flags)) {
		close(fd);
		fd = -1;
	}
	errno = fd < 0 ? error : errno;
	return fd;
}

/* What openat64() becomes where CRIU was built with _FORTIFY_SOURCE. */
int __openat64_2(int directory, const char *path, int flags);
int __openat64_2(int directory, const char *path, int flags)
{
	return openat64(directory, path, flags);
}

/* The rest is the same for each: as the owner, and where that is refused, as root. */
#define TRY(directory, path, call)                   \
	do {                                         \
		if (!of_the_job(directory, path))    \
			return (int) (call);         \
		as_owner();                          \
		int result = (int) (call);           \
		as_root();                           \
		if (refused(result))                 \
			result = (int) (call);       \
		return result;                       \
	} while (0)

int fstatat64(int directory, const char *restrict path, struct stat64 *restrict info, int flags)
{
	TRY(directory, path, syscall(SYS_newfstatat, directory, path, info, flags));
}

int unlinkat(int directory, const char *path, int flags)
{
	TRY(directory, path, syscall(SYS_unlinkat, directory, path, flags));
}

int mkdirat(int directory, const char *path, mode_t mode)
{
	TRY(directory, path, syscall(SYS_mkdirat, directory, path, mode));
}

int linkat(int from, const char *path, int to, const char *name, int flags)
{
	TRY(to, name, syscall(SYS_linkat, from, path, to, name, flags));
}

/* The working directory, which CRIU has opened before. */
int fchdir(int directory)
{
	if (!owner.known)
		return (int) syscall(SYS_fchdir, directory);
	as_owner();
	int result = (int) syscall(SYS_fchdir, directory);
	as_root();
	return refused(result) ? (int) syscall(SYS_fchdir, directory) : result;
}
