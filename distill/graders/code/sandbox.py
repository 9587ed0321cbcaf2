"""Confine a process to a scratch folder, some memory and some time, with the means that Linux gives an ordinary user.

`confine` applies every layer that the kernel grants, and refuses to continue unless at least one layer keeps files and
one keeps the network out of reach. docs/verification.md says what each layer does. Only Linux has the layers; the
limits work on every POSIX system.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .seccomp import install

FILE_LAYERS, NETWORK_LAYERS = {"mounts", "landlock"}, {"network namespace", "seccomp"}
LAYERS = frozenset(FILE_LAYERS | NETWORK_LAYERS)

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH, _O_PATH = 2, 0o10000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock, the same on every architecture


@dataclass(frozen=True)
class SandboxLimits:
    """What a confined process may use: bytes of address space and of each file, seconds of CPU, open files."""

    memory: int = 1 << 30
    cpu_s: int = 10
    file: int = 16 << 20
    n_files: int = 64


class NotConfined(Exception):
    """The kernel grants no layer that keeps files out of reach, or none that keeps the network out of reach."""


def confine(
    scratch: Path,
    readable: Iterable[Path],
    *,
    parent: int,
    limits: SandboxLimits | None = None,
    layers: Collection[str] = LAYERS,
) -> list[str]:
    """Confine this process, which has one thread, for good; return the names of the layers in force.

    It can read `readable`, read and write `scratch` (from now on its working directory), and reach no network and no
    other process. Open descriptors stay open. It dies with its parent, whose process id is an argument because it may
    be dead already. Only these `layers` are tried.

    Raises:
        NotConfined: no layer protects the files, or none the network.
    """
    die_with(parent)
    set_limits(limits or SandboxLimits())
    readable = [path for path in readable if path.exists()]
    in_force = ["limits"] if os.name == "posix" else []
    if sys.platform == "linux":
        if "network namespace" in layers:
            in_force += _namespaces(scratch, readable, with_mounts="mounts" in layers)
        os.chdir(scratch)
        _drop_capabilities()
        die_with(parent)  # once more, since the kernel forgets it when credentials change
        if "landlock" in layers and _landlock(scratch, readable):
            in_force.append("landlock")
        if "seccomp" in layers and install():
            in_force.append("seccomp")
    if not FILE_LAYERS & set(in_force) or not NETWORK_LAYERS & set(in_force):
        raise NotConfined(f"this system grants only: {', '.join(in_force)}")
    return in_force


@cache
def confinement() -> tuple[str, ...]:
    """Return the layers that this machine grants, tried in a separate process; () if it cannot confine code."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-P", "-m", __spec__.name, scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(json.loads(done.stdout)) if done.returncode == 0 else ()


def set_limits(limits: SandboxLimits) -> None:
    """Limit memory, CPU time, files and their size, and leave no core file."""
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.file),
        (resource.RLIMIT_NOFILE, limits.n_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on the address space
            resource.setrlimit(kind, (value, value))


def limit_worker(memory: int) -> None:
    """Limit the memory of a long-lived process and leave no core file."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_next(cpu_s: float) -> None:
    """Let this process use so many more seconds of CPU from now on: it dies even if nobody is left to kill it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + cpu_s) + 2
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def python_paths() -> list[Path]:
    """Return what a Python program needs to read: its libraries, the system's, time zones, harmless devices."""
    base = Path(sys.base_prefix)
    library = Path(sysconfig.get_path("stdlib")).parent
    packages = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo")
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    return list(dict.fromkeys([base / "lib", library, *packages, *map(Path, system + devices)]))


def _namespaces(scratch: Path, readable: Sequence[Path], *, with_mounts: bool) -> list[str]:
    """Leave the network and, `with_mounts`, all files but the given ones; return the layers that this made."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEWUSER | _NEWNET | _NEWNS | _NEWIPC | _NEWUTS):
        return []
    layers = ["network namespace"]
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
        if not with_mounts:
            return layers
        _change_root(libc, scratch, readable)
    except OSError:  # AppArmor may let an ordinary user make a namespace but do nothing in it
        return layers
    with contextlib.suppress(ValueError, OSError):  # counted in this namespace alone: the threads of this process
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    return [*layers, "mounts"]


def _change_root(libc: ctypes.CDLL, scratch: Path, readable: Sequence[Path]) -> None:
    """Make a new root: the readable paths, read-only, and an empty scratch folder of 64 MiB in memory."""
    root = scratch / "root"
    root.mkdir()
    _mount(libc, Path("/"), flags=_MS_REC | _MS_PRIVATE)
    _mount_memory(libc, root, options="size=1m,mode=755")
    for path in readable:
        place = root / path.relative_to("/")
        if place.exists() or place.is_symlink():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            place.symlink_to(os.readlink(path))
            continue
        place.mkdir() if path.is_dir() else place.touch()
        _mount(libc, place, source=str(path), flags=_MS_BIND | _MS_REC)
        # An ordinary user may not drop the flags of the mount that it comes from.
        kept = os.statvfs(place).f_flag & (_MS_NOSUID | _MS_NODEV | 8 | 1024 | 2048)
        kept |= _MS_NOSUID if path.parts[1] == "dev" else _MS_NOSUID | _MS_NODEV
        _mount(libc, place, flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY | kept)
    place = root / scratch.relative_to("/")
    place.mkdir(parents=True, exist_ok=True)
    _mount_memory(libc, place, options="size=64m,nr_inodes=4k,mode=700")
    _mount(libc, root, flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(root)
    _check(libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"."))
    _check(libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _mount(libc: ctypes.CDLL, target: Path, *, flags: int, source: str | None = None) -> None:
    _check(libc.mount(source and source.encode(), str(target).encode(), None, ctypes.c_ulong(flags), None))


def _mount_memory(libc: ctypes.CDLL, target: Path, *, options: str) -> None:
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _check(libc.mount(b"tmpfs", str(target).encode(), b"tmpfs", flags, options.encode()))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _drop_capabilities() -> None:
    """Give up every capability: from now on root is an ordinary user."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    ctypes.CDLL(None).capset(header, nothing)


def _landlock(scratch: Path, readable: Sequence[Path]) -> bool:
    """Make the kernel allow the given paths only; ABI 4 also forbids TCP, ABI 6 signals to other processes.

    Source: Linux, Documentation/userspace-api/landlock.rst.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    n_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    everything = (1 << n_rights) - 1
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = libc.syscall(ctypes.c_long(_CREATE_RULESET), attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return False
    try:
        read = 1 << 2 | 1 << 3
        allowed = [*((path, read) for path in readable), (scratch, everything & ~1)]  # all but running programs
        if not all(_allow(libc, path, rules=rules, rights=rights & everything) for path, rights in allowed):
            return False
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            return False
        return not libc.syscall(ctypes.c_long(_RESTRICT_SELF), rules, 0)
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, path: Path, *, rules: int, rights: int) -> bool:
    """Add a rule that allows these rights under a path; say whether the kernel took it."""
    if path == Path("/dev/null"):
        rights |= 1 << 1  # write
    if not path.is_dir():
        rights &= 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # write, read, truncate, ioctl on a device
    descriptor = os.open(path, _O_PATH)
    try:
        return not libc.syscall(ctypes.c_long(_ADD_RULE), rules, 1, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        print(json.dumps(confine(Path(sys.argv[1]), python_paths(), parent=os.getppid())))
    except NotConfined as error:
        sys.exit(str(error))
