"""What the figures were measured on, without names of hosts or folders."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe(folder: Path) -> str:
    """One line: processor, memory, filesystem of `folder`, system, versions, date."""
    parts = [
        f"{processor()}, {os.cpu_count()} cores",
        f"{memory() / 2**30:.0f} GiB memory",
        f"{filesystem(folder)}",
        platform.system(),
        f"Python {platform.python_version()}",
        *(f"{name} {installed(name)}" for name in ("numpy", "numkong", "plymix")),
        datetime.date.today().isoformat(),
    ]
    return ", ".join(parts)


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 0


def filesystem(folder: Path) -> str:
    """The kind of filesystem `folder` is on: ext4, tmpfs ..."""
    found, longest = "unknown filesystem", -1
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, mount, kind, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if folder.resolve().is_relative_to(mount) and len(mount) > longest:
            found, longest = kind, len(mount)
    return found


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(none)"
