"""What this machine has to compute with."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Return how many threads to compute with: one a physical core that this process may use.

    Hyper-threads share the units that llama.cpp keeps busy, and its threads wait for one another actively: one too many
    costs more than one too few. `OMP_NUM_THREADS` lowers the number, as it does for other numeric libraries.
    """
    cores = physical_cores()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdigit() and int(limit) > 0 else cores


def physical_cores() -> int:
    """Return the physical cores that this process may use, at least 1."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return max(1, os.cpu_count() or 1)
    usable = os.sched_getaffinity(0)
    cores = {_core_of(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota() or len(cores)))


def _core_of(cpu: int) -> tuple[str, str]:
    """Return the (package, core) that a logical CPU is a thread of; a core of its own if the system does not say."""
    try:
        topology = _CPUS / f"cpu{cpu}" / "topology"
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "", str(cpu)


def _quota() -> int | None:
    """Return the whole CPUs that a container's limit leaves, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
