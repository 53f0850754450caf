/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What a frozen process of the job runs to have a twin made of it. It is copied, with its slots filled, into
 * unused bytes behind the process's vDSO. See inject.c for why it is as it is: whoever started it may die
 * at any instruction, and then it must finish on its own and leave the process as it was. So it needs no stack
 * and no writable memory, and the last it does is to take all registers from its slots. */

#define SYS_rt_sigprocmask 14
#define SYS_nanosleep 35
#define SYS_clone 56
#define SYS_wait4 61
#define SYS_setsid 112
#define SYS_prctl 157
#define SYS_exit_group 231
#define SYS_close_range 436

#define SIG_SETMASK 2
#define EINTR 4
#define CLONE_VM 0x100
#define CLONE_FILES 0x400
#define WALL 0x40000000
#define PR_SET_NAME 15
#define CLOSE_RANGE_UNSHARE 2

/* 5 s at a time. */
#define PATIENCE 12

	.section .rodata
	.balign 16
	.globl code_begin, code_entry, code_end, slot_regs, slot_mask, slot_beat, slot_call, slot_fork
code_begin:
	.ascii "outlast-twin 1\n\0"
slot_beat:	.quad 0
slot_call:	.quad 0, 0, 0, 0, 0	/* number (0: none) and arguments of a system call to make first */
slot_fork:	.quad 0
slot_mask:	.quad 0
slot_regs:	.fill 18, 8, 0		/* in the order of the restoring below */
all:		.quad -1
pause_time:	.quad 5, 0
name:		.asciz "outlast-twin"
	.balign 16

code_entry:
	movl	$SYS_rt_sigprocmask, %eax
	movl	$SIG_SETMASK, %edi
	leaq	all(%rip), %rsi
	movl	$0, %edx
	movl	$8, %r10d
	syscall

	movq	slot_call(%rip), %rax
	testq	%rax, %rax
	jz	1f
	movq	slot_call+8(%rip), %rdi
	movq	slot_call+16(%rip), %rsi
	movq	slot_call+24(%rip), %rdx
	movq	slot_call+32(%rip), %r10
	syscall
1:
	cmpq	$0, slot_fork(%rip)
	je	restore
	/* The helper: it shares the memory, is no thread of the process, and tells nobody of its end. */
	movl	$SYS_clone, %eax
	movl	$(CLONE_VM | CLONE_FILES), %edi
	xorl	%esi, %esi
	xorl	%edx, %edx
	xorl	%r10d, %r10d
	xorl	%r8d, %r8d
	syscall
	testq	%rax, %rax
	jz	helper
	js	restore
	movl	%eax, %ebx
2:
	movl	$SYS_wait4, %eax
	movl	%ebx, %edi
	xorl	%esi, %esi
	movl	$WALL, %edx
	xorl	%r10d, %r10d
	syscall
	cmpq	$-EINTR, %rax
	je	2b

restore:
	/* The flags come off a stack that nothing is ever pushed on: all signals are still blocked. */
	leaq	slot_regs+128(%rip), %rsp
	popfq
	movq	slot_regs+0(%rip), %rsp
	/* From here on the flags stay as they are: a system call keeps them, and so does a move. */
	movl	$SYS_rt_sigprocmask, %eax
	movl	$SIG_SETMASK, %edi
	leaq	slot_mask(%rip), %rsi
	movl	$0, %edx
	movl	$8, %r10d
	syscall
	movq	slot_regs+8(%rip), %r15
	movq	slot_regs+16(%rip), %r14
	movq	slot_regs+24(%rip), %r13
	movq	slot_regs+32(%rip), %r12
	movq	slot_regs+40(%rip), %rbp
	movq	slot_regs+48(%rip), %rbx
	movq	slot_regs+56(%rip), %r11
	movq	slot_regs+64(%rip), %r10
	movq	slot_regs+72(%rip), %r9
	movq	slot_regs+80(%rip), %r8
	movq	slot_regs+88(%rip), %rax
	movq	slot_regs+96(%rip), %rcx
	movq	slot_regs+104(%rip), %rdx
	movq	slot_regs+112(%rip), %rsi
	movq	slot_regs+120(%rip), %rdi
	jmp	*slot_regs+136(%rip)

helper:
	movl	$SYS_clone, %eax
	movl	$CLONE_FILES, %edi
	xorl	%esi, %esi
	xorl	%edx, %edx
	xorl	%r10d, %r10d
	xorl	%r8d, %r8d
	syscall
	testq	%rax, %rax
	jz	twin
	xorl	%edi, %edi
	testq	%rax, %rax
	sets	%dil
	movl	$SYS_exit_group, %eax
	syscall
	hlt

twin:
	/* Out of the job's session, and with none of its files open: a pipe must end when the job closes it. */
	movl	$SYS_setsid, %eax
	syscall
	movl	$SYS_close_range, %eax
	xorl	%edi, %edi
	movl	$-1, %esi
	movl	$CLOSE_RANGE_UNSHARE, %edx
	syscall
	movl	$SYS_prctl, %eax
	movl	$PR_SET_NAME, %edi
	leaq	name(%rip), %rsi
	syscall
	/* Whoever reads the twin's memory counts up the slot; when nobody does so any more the twin ends. */
	movq	slot_beat(%rip), %rbx
3:
	movl	$PATIENCE, %r12d
4:
	movl	$SYS_nanosleep, %eax
	leaq	pause_time(%rip), %rdi
	xorl	%esi, %esi
	syscall
	movq	slot_beat(%rip), %rax
	cmpq	%rax, %rbx
	movq	%rax, %rbx
	jne	3b
	decl	%r12d
	jnz	4b
	movl	$SYS_exit_group, %eax
	xorl	%edi, %edi
	syscall
	hlt
code_end:

	.section .note.GNU-stack, "", @progbits
