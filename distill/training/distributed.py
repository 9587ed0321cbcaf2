"""Several processes that train one student, as `torchrun` or `accelerate launch` starts them.

The first one does all of `teach`. The others wait, take part in every training that it begins, and end when it does.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

_PATIENCE = timedelta(days=30)  # the first process may ask a teacher for days before there is anything to train on

Result = TypeVar("Result")


def processes() -> int:
    """Return how many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Say whether this process is the one that does everything."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def leading() -> Iterator[None]:
    """Let the other processes end when the block does; with one process this does nothing."""
    try:
        yield
    except BaseException as error:
        # Within a training the others do not listen, and telling them would block: their launcher ends them.
        if not _was_training(error):
            _dismiss()
        raise
    _dismiss()


def everywhere(function: Callable[..., Result], *given: Any, first_only: Mapping[str, Any], **options: Any) -> Result:
    """Call a function in every process and return the result of this one, the first; only it gets `first_only`."""
    if processes() > 1:
        _broadcast((function, given, options))
    return function(*given, **options, **first_only)


def follow() -> None:
    """Be one of the other processes: do what the first one sends until it sends nothing more."""
    while (work := _broadcast(None)) is not None:
        function, given, options = work
        function(*given, **options)
    _leave()


def shared(value: Result) -> Result:
    """Return the first process's value, so that all of them plan, save and stop alike."""
    return value if processes() == 1 else _broadcast(value)


def _was_training(error: BaseException | None) -> bool:
    """Say whether an error, or one that led to it, came out of `everywhere`."""
    while error is not None:
        if any(frame.f_code is everywhere.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _dismiss() -> None:
    """Let the other processes end."""
    if processes() > 1:
        _broadcast(None)
        _leave()


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def _broadcast(work: Any) -> Any:
    """Return in every process what the first one gives."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true"
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    sent = [work]
    dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
    return sent[0]
