"""Where plymix keeps what it can compute or fetch again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of plymix; `PLYMIX_CACHE` names another one."""
    if wish := os.environ.get("PLYMIX_CACHE"):
        return Path(wish)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "plymix"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "plymix"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "plymix"
