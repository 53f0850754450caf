/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Has a frozen process make its own twin, so that the process comes to no harm whenever its tracer, CRIU, dies.
 *
 * A tracer that dies lets its tracees run on from wherever they are. So a process that was given other
 * registers for one system call, with its own to be put back afterwards, crashes if its tracer dies in
 * between. Here it is given a whole program (code.S) by one PTRACE_SETREGS, which finishes by itself: it clones
 * a helper, waits for it, and puts back signal mask, flags and all registers. A signal frame and rt_sigreturn would do
 * the same but need room on a stack which may be a coroutine's of 2 KiB. The tracer merely watches and, when all is done, puts
 * the original registers back itself, as then a system call that the freezing interrupted is resumed as the
 * kernel would have done it.
 *
 * The program lies in the bytes behind the vDSO's image, which nothing uses; written there by force they
 * become the process's own copy. They are set to zero again afterwards; if CRIU dies they stay, unused.
 *
 *   process --clone(VM)--> helper --clone()--> twin
 *
 * The helper's end makes the twin an orphan, init's child: the process is never told of it. */
#define _GNU_SOURCE
#include "twin.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ptrace.h>
#include <linux/rseq.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern const uint8_t code_begin[], code_entry[], code_end[];
extern const uint8_t slot_regs[], slot_mask[], slot_beat[], slot_call[], slot_fork[];

enum {
	/* Debian's Linux 6.12 leaves 1015 bytes behind its vDSO, and its 7.2 leaves 815; the code has 718. */
	CODE_ROOM = 768,
	CODE_64BIT = 0x33, /* the code segment of a 64-bit task */
	SYSCALL_LENGTH = 2,
	/* linux/errno.h, which is the kernel's own */
	ERESTARTSYS = 512,
	ERESTARTNOINTR = 513,
	ERESTARTNOHAND = 514,
	ERESTART_RESTARTBLOCK = 516,
};

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
struct ptrace_rseq_configuration {
	uint64_t rseq_abi_pointer;
	uint32_t rseq_abi_size, signature, flags, pad;
};
#endif
#ifndef PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
#define PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
struct ptrace_sud_config {
	uint64_t mode, selector, offset, len;
};
#endif

/* glibc's own header of ptrace() lacks some requests, and cannot be had together with the kernel's. */
static long trace(long request, pid_t pid, void *address, void *data)
{
	return syscall(SYS_ptrace, request, (long) pid, address, data);
}

static bool wait_for(pid_t pid, int *status)
{
	for (;;) {
		pid_t got = waitpid(pid, status, __WALL);
		if (got == pid)
			return true;
		if (got < 0 && errno != EINTR)
			return false;
	}
}

static bool is_stop(int status, int what)
{
	return WIFSTOPPED(status) && status >> 8 == what;
}

static uint64_t now_usecs(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t) now.tv_sec * 1000000 + (uint64_t) now.tv_nsec / 1000;
}

/* The kernel aborts a restartable sequence whose thread is moved elsewhere, as happens here, and then forgets
 * it: so the abort must be made part of what the thread goes on with. Source: kernel/rseq.c. */
static bool abort_rseq(pid_t pid, int memory, struct user_regs_struct *registers)
{
	struct ptrace_rseq_configuration config;
	struct rseq_cs section;
	uint64_t pointer;

	if (trace(PTRACE_GET_RSEQ_CONFIGURATION, pid, (void *) sizeof(config), &config) != sizeof(config) ||
	    config.rseq_abi_pointer == 0)
		return true;
	off_t at = (off_t) (config.rseq_abi_pointer + offsetof(struct rseq, rseq_cs));
	if (pread(memory, &pointer, sizeof(pointer), at) != sizeof(pointer))
		return false;
	if (pointer == 0)
		return true;
	if (pread(memory, &section, sizeof(section), (off_t) pointer) != sizeof(section))
		return false;
	if (registers->rip - section.start_ip < section.post_commit_offset)
		registers->rip = section.abort_ip;
	return true;
}

/* What the process is to go on with, should nobody be there to put its registers back: a system call that
 * was interrupted is made again. Source: arch/x86/kernel/signal.c, arch_do_signal_or_restart(). */
static struct user_regs_struct restarted(struct user_regs_struct registers)
{
	if ((long) registers.orig_rax < 0)
		return registers;
	switch (-(long) registers.rax) {
	case ERESTARTSYS:
	case ERESTARTNOINTR:
	case ERESTARTNOHAND:
		registers.rax = registers.orig_rax;
		registers.rip -= SYSCALL_LENGTH;
		break;
	case ERESTART_RESTARTBLOCK:
		registers.rax = SYS_restart_syscall;
		registers.rip -= SYSCALL_LENGTH;
		break;
	}
	return registers;
}

static void fill_code(uint8_t *code, const struct order *order, const struct user_regs_struct *registers,
		      uint64_t mask)
{
	const struct user_regs_struct final = restarted(*registers);
	/* The order of code.S. */
	const uint64_t values[] = { final.rsp, final.r15, final.r14, final.r13,	  final.r12, final.rbp,
				    final.rbx, final.r11, final.r10, final.r9,	  final.r8,  final.rax,
				    final.rcx, final.rdx, final.rsi, final.rdi, final.eflags, final.rip };
	const uint64_t call[] = { (uint64_t) order->call, (uint64_t) order->arguments[0], (uint64_t) order->arguments[1],
				  (uint64_t) order->arguments[2], (uint64_t) order->arguments[3] };
	const uint64_t fork = order->fork;

	memcpy(code, code_begin, (size_t) (code_end - code_begin));
	memcpy(code + (slot_regs - code_begin), values, sizeof(values));
	memcpy(code + (slot_mask - code_begin), &mask, sizeof(mask));
	memcpy(code + (slot_call - code_begin), call, sizeof(call));
	memcpy(code + (slot_fork - code_begin), &fork, sizeof(fork));
}

/* Finds room for the code behind the vDSO's image: bytes that are zero, or hold code that was left there. */
static uint64_t find_room(int memory, const struct range *vdso, size_t size)
{
	uint8_t found[CODE_ROOM];

	if (vdso->end - vdso->start < CODE_ROOM || size > CODE_ROOM ||
	    pread(memory, found, sizeof(found), (off_t) (vdso->end - CODE_ROOM)) != sizeof(found))
		return 0;
	if (memcmp(found, code_begin, (size_t) (slot_beat - code_begin)) == 0)
		return vdso->end - CODE_ROOM;
	for (size_t i = 0; i < sizeof(found); i++) {
		if (found[i] != 0)
			return 0;
	}
	return vdso->end - CODE_ROOM;
}

/* The helper has appeared: from here on the death of this process kills it and the twin, until then they carry on
 * by themselves. It is left to copy its memory. */
static const char *let_copy(struct work *work)
{
	unsigned long helper = 0;
	int status;

	if (trace(PTRACE_GETEVENTMSG, work->pid, NULL, &helper) < 0 || !wait_for((pid_t) helper, &status) ||
	    !WIFSTOPPED(status) ||
	    trace(PTRACE_SETOPTIONS, (pid_t) helper, NULL, (void *) (work->options | PTRACE_O_EXITKILL)) < 0)
		return "the helper was lost";
	work->helper = (pid_t) helper;
	work->begin = now_usecs();
	trace(PTRACE_CONT, work->helper, NULL, NULL);
	return NULL;
}

/* Sees the helper and the twin through. The twin stays stopped, the helper has ended. */
static const char *await_twin(struct work *work, struct order *order)
{
	unsigned long twin = 0;
	int status;
	const char *problem = NULL;

	while (wait_for(work->helper, &status) && WIFSTOPPED(status)) {
		if (is_stop(status, SIGTRAP | PTRACE_EVENT_CLONE << 8) &&
		    trace(PTRACE_GETEVENTMSG, work->helper, NULL, &twin) == 0) {
			order->fork_usecs = (unsigned) (now_usecs() - work->begin);
			order->twin = (pid_t) twin;
			int stopped;
			if (!wait_for(order->twin, &stopped) || !WIFSTOPPED(stopped) ||
			    trace(PTRACE_SETOPTIONS, order->twin, NULL,
				  (void *) (work->options | PTRACE_O_EXITKILL)) < 0) {
				problem = "the twin was lost";
				order->twin = 0;
			}
		}
		trace(PTRACE_CONT, work->helper, NULL, NULL);
	}
	work->helper = 0;
	return problem;
}

/* Lets the process run its code: up to the appearance of the helper, if that has not been yet, else up to the exit of the
 * code's last system call. */
static const char *watch(struct work *work, const struct order *order)
{
	struct user_regs_struct registers;
	const char *problem = NULL;
	int status;

	for (;;) {
		if (trace(PTRACE_SYSCALL, work->pid, NULL, NULL) < 0 || !wait_for(work->pid, &status) ||
		    !WIFSTOPPED(status)) {
			work->done = true;
			return "the process was killed";
		}
		if (is_stop(status, SIGTRAP | PTRACE_EVENT_CLONE << 8)) {
			const char *lost = let_copy(work);
			if (lost == NULL)
				return problem;
			problem = lost;
		} else if (is_stop(status, SIGTRAP | 0x80)) {
			work->entered = !work->entered;
			if (work->entered || trace(PTRACE_GETREGS, work->pid, NULL, &registers) < 0)
				continue;
			if (registers.orig_rax == SYS_rt_sigprocmask && ++work->masked == 2) {
				work->done = true;
				return problem;
			}
			const long result = (long) registers.rax;
			const bool matters = registers.orig_rax == SYS_clone ||
					     (order->call != 0 && registers.orig_rax == (unsigned long) order->call);
			/* The kernel makes a call with one of its own errors again. */
			if (matters && result < 0 && result > -ERESTARTSYS)
				problem = strerror((int) -result);
		}
	}
}

/* Starts the process on its code. */
static const char *start(struct work *work, const struct range *vdso, const struct order *order)
{
	const size_t size = (size_t) (code_end - code_begin);
	struct user_regs_struct original, begin;
	struct ptrace_sud_config dispatch = { 0 };
	const uint64_t all = ~0ULL;
	uint8_t code[CODE_ROOM] = { 0 };
	const pid_t pid = work->pid;

	if (trace(PTRACE_GETREGS, pid, NULL, &original) < 0 ||
	    trace(PTRACE_GETSIGMASK, pid, (void *) sizeof(work->mask), &work->mask) < 0)
		return "its registers cannot be read";
	if (original.cs != CODE_64BIT)
		return "it runs 32-bit code";
	if (trace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, pid, (void *) sizeof(dispatch), &dispatch) == 0 &&
	    dispatch.mode != 0)
		return "it dispatches its system calls itself";
	work->room = find_room(work->memory, vdso, size);
	if (work->room == 0)
		return "there is no room behind its vDSO";
	work->registers = original;
	if (!abort_rseq(pid, work->memory, &work->registers))
		return "its restartable sequence cannot be read";
	fill_code(code, order, &work->registers, work->mask);
	if (pwrite(work->memory, code, size, (off_t) work->room) != (ssize_t) size)
		return "its memory cannot be written";
	begin = original;
	begin.rip = work->room + (uint64_t) (code_entry - code_begin);
	begin.orig_rax = (unsigned long) -1;
	begin.rax = 0;
	begin.eflags &= ~0x400ULL; /* the direction flag; the code takes back the process's own */
	/* CRIU has had the filters of those that have any suspended: so they must stay. */
	work->options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_SUSPEND_SECCOMP;
	if (trace(PTRACE_SETOPTIONS, pid, NULL, (void *) work->options) < 0) {
		work->options &= ~PTRACE_O_SUSPEND_SECCOMP;
		if (trace(PTRACE_SETOPTIONS, pid, NULL, (void *) work->options) < 0)
			return "it could not be started";
	}
	if (trace(PTRACE_SETREGS, pid, NULL, &begin) < 0)
		return "it could not be started";
	/* In this order: with the new registers comes the code that puts the mask back. */
	trace(PTRACE_SETSIGMASK, pid, (void *) sizeof(all), (void *) &all);
	work->started = true;
	return NULL;
}

const char *begin_work(struct work *work, pid_t pid, const struct range *vdso, struct order *order)
{
	char path[64];

	memset(work, 0, sizeof(*work));
	order->twin = 0;
	work->pid = pid;
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	work->memory = open(path, O_RDWR | O_CLOEXEC);
	if (work->memory < 0)
		return "its memory cannot be opened";
	const char *problem = start(work, vdso, order);
	return work->started ? watch(work, order) : problem;
}

const char *end_work(struct work *work, const char *problem, struct order *order)
{
	const uint8_t zeros[CODE_ROOM] = { 0 };
	const size_t size = (size_t) (code_end - code_begin);
	const pid_t pid = work->pid;
	int status;

	if (work->helper != 0) {
		const char *lost = await_twin(work, order);
		problem = problem != NULL ? problem : lost;
	}
	while (work->started && !work->done) {
		const char *failed = watch(work, order);
		problem = problem != NULL ? problem : failed;
	}
	if (work->started) {
		trace(PTRACE_SETREGS, pid, NULL, &work->registers);
		trace(PTRACE_SETSIGMASK, pid, (void *) sizeof(work->mask), &work->mask);
		trace(PTRACE_INTERRUPT, pid, NULL, NULL);
		trace(PTRACE_CONT, pid, NULL, NULL);
		if (!wait_for(pid, &status) || !WIFSTOPPED(status) || status >> 16 != PTRACE_EVENT_STOP)
			problem = "the process was killed";
	}
	if (work->options != 0)
		trace(PTRACE_SETOPTIONS, pid, NULL, (void *) (work->options & ~PTRACE_O_TRACECLONE));
	if (work->room != 0 && pwrite(work->memory, zeros, size, (off_t) work->room) != (ssize_t) size)
		say("%d: the code stays behind its vDSO: %s", pid, strerror(errno));
	order->beat = work->room + (uint64_t) (slot_beat - code_begin);
	if (work->memory >= 0)
		close(work->memory);
	return problem;
}

const char *inject(pid_t pid, const struct range *vdso, struct order *order)
{
	struct work work;
	const char *problem = begin_work(&work, pid, vdso, order);

	return end_work(&work, problem, order);
}
