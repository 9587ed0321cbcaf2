"""Hold a process to a scratch folder, some memory and some time: what Linux lets an ordinary user do about code.

`confine` puts on every layer that the kernel grants, and refuses to go on unless at least one of them keeps files and
one keeps the network out of reach. docs/verification.md says what each holds. Linux alone has the layers; the limits
work on every POSIX system.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .seccomp import install

FILE_LAYERS, NETWORK_LAYERS = {"mounts", "landlock"}, {"network namespace", "seccomp"}

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH, _O_PATH = 2, 0o10000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock, the same on every architecture


@dataclass(frozen=True)
class Limits:
    """What a confined process may take: bytes of address space and of each file, seconds of CPU, open files."""

    memory: int = 1 << 30
    cpu_s: int = 10
    file: int = 16 << 20
    n_files: int = 64


class NotConfined(Exception):
    """The kernel grants no layer that keeps files, or none that keeps the network, out of reach."""


def confine(scratch: Path, readable: Iterable[Path], limits: Limits, parent: int) -> list[str]:
    """Confine this process, which has one thread, for good; return the names of the layers that hold.

    It can read `readable`, read and write `scratch` (its working directory from now on), and reach no network and no
    other process. Descriptors that are open stay open. It dies with its parent, whose process id is given since it may
    have died already.

    Raises:
        NotConfined: a layer for files or one for the network is missing.
    """
    die_with(parent)
    set_limits(limits)
    readable = [path for path in readable if path.exists()]
    layers = ["limits"] if os.name == "posix" else []
    if sys.platform == "linux":
        layers += _namespaces(scratch, readable)
        os.chdir(scratch)
        _drop_capabilities()
        die_with(parent)  # once more: the kernel forgets it when credentials change
        if _landlock(scratch, readable):
            layers.append("landlock")
        if install():
            layers.append("seccomp")
    if not FILE_LAYERS & set(layers) or not NETWORK_LAYERS & set(layers):
        raise NotConfined(f"this system grants only: {', '.join(layers)}")
    return layers


@cache
def confinement() -> tuple[str, ...]:
    """Return the layers that hold on this machine, by trying them in a process of its own; () if code cannot run."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", __spec__.name, scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(json.loads(done.stdout)) if done.returncode == 0 else ()


def set_limits(limits: Limits) -> None:
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
    """Give this process so many more seconds of CPU from now on: it dies even if nobody is left to kill it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + cpu_s) + 2
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def python_paths() -> list[Path]:
    """Return what a Python program reads to run: its libraries, the system's, time zones, the harmless devices."""
    base = Path(sys.base_prefix)
    library = Path(sysconfig.get_path("stdlib")).parent
    packages = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo")
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    return list(dict.fromkeys([base / "lib", library, *packages, *map(Path, system + devices)]))


def _namespaces(scratch: Path, readable: Sequence[Path]) -> list[str]:
    """Leave the network, and the file system but for what is given; return the layers that this gave."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEWUSER | _NEWNET | _NEWNS | _NEWIPC | _NEWUTS):
        return []
    layers = ["network namespace"]
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
        _change_root(libc, scratch, readable)
    except OSError:  # where AppArmor lets an ordinary user make a namespace but do nothing in it
        return layers
    with contextlib.suppress(ValueError, OSError):  # counted in this namespace alone: threads of this process
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    return [*layers, "mounts"]


def _change_root(libc: ctypes.CDLL, scratch: Path, readable: Sequence[Path]) -> None:
    """Make a root of the readable paths, read-only, and of an empty scratch folder of 64 MiB in memory."""
    root = scratch / "root"
    root.mkdir()
    _mount(libc, None, Path("/"), None, _MS_REC | _MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in readable:
        place = root / path.relative_to("/")
        if place.exists() or place.is_symlink():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            place.symlink_to(os.readlink(path))
            continue
        place.mkdir() if path.is_dir() else place.touch()
        _mount(libc, str(path), place, None, _MS_BIND | _MS_REC)
        # An ordinary user may not drop the flags of the mount it comes from.
        kept = os.statvfs(place).f_flag & (_MS_NOSUID | _MS_NODEV | 8 | 1024 | 2048)
        kept |= _MS_NOSUID if path.parts[1] == "dev" else _MS_NOSUID | _MS_NODEV
        _mount(libc, None, place, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | kept)
    place = root / scratch.relative_to("/")
    place.mkdir(parents=True, exist_ok=True)
    _mount(libc, "tmpfs", place, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64m,nr_inodes=4k,mode=700")
    _mount(libc, None, root, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(root)
    _check(libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"."))
    _check(libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _mount(
    libc: ctypes.CDLL, source: str | None, target: Path, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, str(target), kind, options)]
    _check(libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _drop_capabilities() -> None:
    """Give up every capability: root is an ordinary user from now on."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    ctypes.CDLL(None).capset(header, nothing)


def _landlock(scratch: Path, readable: Sequence[Path]) -> bool:
    """Have the kernel check every path against what is given; from its ABI 4 on no TCP, from 6 on no signals outside.

    Source: Linux, Documentation/userspace-api/landlock.rst.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    n_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    everything = (1 << n_rights) - 1
    on_files = everything & (1 << 1 | 1 << 2 | 1 << 14 | 1 << 15)  # write, read, truncate, ioctl on a device
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = libc.syscall(ctypes.c_long(_CREATE_RULESET), attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return False
    try:
        read = 1 << 2 | 1 << 3
        for path, rights in [*((path, read) for path in readable), (scratch, everything & ~1)]:
            rights |= 1 << 1 if path == Path("/dev/null") else 0
            descriptor = os.open(path, _O_PATH)
            rule = struct.pack("=Qi", rights if path.is_dir() else rights & on_files, descriptor)
            result = libc.syscall(ctypes.c_long(_ADD_RULE), rules, 1, rule, 0)
            os.close(descriptor)
            if result:
                return False
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            return False
        return not libc.syscall(ctypes.c_long(_RESTRICT_SELF), rules, 0)
    finally:
        os.close(rules)


if __name__ == "__main__":
    try:
        print(json.dumps(confine(Path(sys.argv[1]), python_paths(), Limits(), os.getppid())))
    except NotConfined as error:
        sys.exit(str(error))
