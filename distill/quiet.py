"""Keep the libraries' own progress bars and notices off the screen: ours are the only ones."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Silence transformers' progress bars and everything below an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
