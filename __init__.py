"""deepdistill: put a large teacher's reasoning into a small model that runs on a laptop."""

__version__ = "0.1.0"
