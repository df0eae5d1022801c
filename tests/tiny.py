"""The small checkpoints of `scripts/tiny_checkpoints.py`, for tests: `from tiny import header`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_checkpoints import *  # noqa: F403
