"""The scripts of benchmarks/pocket, which import each other by their plain names, can be imported by the tests too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "pocket"))
