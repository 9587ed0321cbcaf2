"""Several processes that train one student, as `torchrun` or `accelerate launch` starts them.

The first one does all of `teach`. The others wait, take part in every training that it begins, and end when it does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

_PATIENCE = timedelta(days=30)  # the first process may ask a teacher for days before there is anything to train on
_in_training = False

Result = TypeVar("Result")


def processes() -> int:
    """Return how many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Say whether this process is the one that does everything."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def leading() -> Iterator[None]:
    """Let the other processes end when the work inside does; of one process it asks nothing."""
    try:
        yield
    finally:
        # After a failure in the middle of a training nobody listens: their launcher ends the others.
        if processes() > 1 and not _in_training:
            _hand_out(None)
            _leave()


def everywhere(function: Callable[..., Result], *given: Any, own: Mapping[str, Any], **options: Any) -> Result:
    """Call a function in every process and return what it returns in this, the first; `own` is for this one alone."""
    global _in_training
    if processes() > 1:
        _hand_out((function, given, options))
    _in_training = True
    result = function(*given, **options, **own)
    _in_training = False
    return result


def follow() -> None:
    """Be one of the other processes: do what the first one hands out until it has no more."""
    while (work := _hand_out(None)) is not None:
        function, given, options = work
        function(*given, **options)
    _leave()


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def agreed(value: float) -> float:
    """Return the first process's value, so that all of them save and stop at the same step."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return float(shared)


def _hand_out(work: Any) -> Any:
    """Return in every process what the first one gives."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true"
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    shared = [work]
    dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    return shared[0]
