"""Keep the libraries' own progress bars and notices off the screen: ours are the only ones."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Silence transformers' progress bars and everything below an error."""
    import os
    import warnings

    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is first imported
    from transformers.utils import logging

    # peft asks transformers by a name that is going away; nobody who runs deepdistill can do anything about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
