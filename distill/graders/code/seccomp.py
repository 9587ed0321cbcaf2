"""A seccomp filter for code that nobody has read: it allows the system calls of a computation and no others.

The filter lists what is allowed, so that calls of a later kernel are refused. The list has no way to start a program or
a process (only threads), to open a socket, to signal, trace or read another process, to mount, to set a file's times
(which Landlock allows), or to load code into the kernel. The filter works on x86-64 and arm64; elsewhere `install`
returns False.

Source: seccomp(2), bpf(2); the numbers are those of asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# Name, number on x86-64, number on arm64 (- where it has none).
_ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, open 2 -, openat 257 56, close 3 57,
close_range 436 436, fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, lseek 8 62, getdents64 217 61,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49,
fchdir 81 50, mkdir 83 -, mkdirat 258 34, unlink 87 -, unlinkat 263 35, rmdir 84 -, rename 82 -, renameat 264 38,
renameat2 316 276, ftruncate 77 46, truncate 76 45, fallocate 285 47, fsync 74 82, fdatasync 75 83, dup 32 23,
dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, flock 73 32, umask 95 166,
sendfile 40 71, copy_file_range 326 285, fadvise64 221 223, statfs 137 43, fstatfs 138 44, poll 7 -, ppoll 271 73,
select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
eventfd2 290 19, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, brk 12 214, madvise 28 233, msync 26 227,
mincore 27 232, membarrier 324 283, futex 202 98, set_robust_list 273 99, get_robust_list 274 100,
set_tid_address 218 96, rseq 334 293, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, gettid 186 178,
getpid 39 172, getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, getrandom 318 278,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time 201 -,
times 100 153, getrusage 98 165, sysinfo 99 179, uname 63 160, getrlimit 97 163, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133,
sigaltstack 131 132, restart_syscall 219 128, alarm 37 -, pause 34 -, setitimer 38 103, getitimer 36 102, exit 60 93,
exit_group 231 94, socketpair 53 199, recvfrom 45 207, shutdown 48 210, getsockopt 55 209, getsockname 51 204
"""
_CLONE, _CLONE3, _TGKILL, _PRLIMIT64, _SENDTO = (56, 220), (435, 435), (234, 131), (302, 261), (44, 206)
_CLONE_THREAD = 0x10000
_FCNTL, _IOCTL = (72, 25), (16, 29)
# Duplicate, flags, locks, pipe size, seals. Not F_SETOWN and F_SETSIG: the kernel would signal whom they name.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, 1034)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not FIOSETOWN, FIOASYNC, TIOCSTI.
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_NEWEST = 462  # a higher number belongs to a later kernel: "no such call" lets libraries fall back

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JGE, JSET, RET
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NO_SUCH_CALL, _REFUSE = 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EPERM
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2


def install() -> bool:
    """Restrict this process and its threads to the list for good; return False if the kernel cannot.

    The process may start threads, signal itself, and read and set its own limits, no others. Data that it sends on a
    socket pair goes to the other end and nowhere else. It cannot have the kernel signal others when data arrives.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return False
    program = _program(machine)
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    filter_ = Filter(len(program), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return not libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(filter_), 0, 0)


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter as (code, jump if true, jump if false, k)."""
    column = list(_ARCHITECTURES).index(machine)
    numbers = [line.split()[1 + column] for line in _ALLOWED.replace("\n", " ").split(",")]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for number in numbers:
        if number != "-":
            program += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _ALLOW)]
    program += _only_if(_CLONE[column], 0, test=_ANY_BIT, value=_CLONE_THREAD)
    program += _only_if(_TGKILL[column], 0, test=_EQUAL, value=os.getpid())
    program += _only_if(_PRLIMIT64[column], 0, test=_EQUAL, value=0)
    program += _only_if(_SENDTO[column], 4, test=_EQUAL, value=0)  # no address
    program += _one_of(_FCNTL[column], 1, values=_FCNTL_COMMANDS)
    program += _one_of(_IOCTL[column], 1, values=_IOCTL_COMMANDS)
    # A filter cannot read clone3's flags, which lie in memory: "no such call" makes libraries use clone instead.
    program += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _NO_SUCH_CALL)]
    # x86-64 also takes the calls of the x32 ABI, from 0x40000000 on: they get "no such call".
    return [*program, (_AT_LEAST, 0, 1, _NEWEST), (_RETURN, 0, 0, _NO_SUCH_CALL), (_RETURN, 0, 0, _REFUSE)]


def _only_if(number: int, argument: int, *, test: int, value: int) -> list[tuple[int, int, int, int]]:
    """Allow one call if the low half of an argument (0 to 5) passes a test; for equality with 0 the high half too."""
    low, high = 16 + 8 * argument, 20 + 8 * argument
    check = [(_LOAD, 0, 0, low), (test, 1, 0, value), (_RETURN, 0, 0, _REFUSE)]
    if test == _EQUAL and value == 0:
        check += [(_LOAD, 0, 0, high), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE)]
    check.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(check), number), *check]


def _one_of(number: int, argument: int, *, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Allow one call if the low half of an argument, all that the kernel reads of a command, is one of some values."""
    check = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        check += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    check.append((_RETURN, 0, 0, _REFUSE))
    return [(_EQUAL, 0, len(check), number), *check]
