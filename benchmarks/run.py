"""Measure plymix, and write the tables of docs/benchmarks.md.

    python benchmarks/run.py                      every case of every group
    python benchmarks/run.py --only ckpt,chain    some groups or cases
    python benchmarks/run.py --only peers         sd-mecha, mergekit, torch beside plymix
    python benchmarks/run.py --only peers,ties    the same, for some methods
    python benchmarks/run.py --only methods       the arithmetic of each method alone, in a list
    python benchmarks/run.py --peers              everything
    python benchmarks/run.py --quick              small files, one run: does it all work?

Groups: sd1 (8.5 GB of files), ckpt (8.5 GB), sdxl (14 GB), flux (holes; results of 24 GB), loras
(8 GB), peers (the files of sd1 and loras). The files are made in a temporary folder, group by
group, and removed; with --folder they stay there and are used again.

Each case runs as a whole process in turn with its yardstick (A B A B ...), over files in the page
cache, the first pair left out; results are removed and the disk is left to finish before each run.
docs/benchmarks.md gets the table of each group that was measured whole, unless --show.

The exit code is 1 if a command of plymix or a yardstick failed; a bar that is missed is marked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import machine
import measure
import peers
import report
from cases import CASES, FILES, TWELVE, Case
from measure import Usage
from report import Row

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
PEER_GROUP = "peers"
METHODS = "methods"
PEER_LIMIT = 900  # seconds a peer may take for one merge


def main() -> int:
    args = arguments()
    if METHODS in args.only:
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, HERE / "methods.py"], env=env, check=False)
        args.only.remove(METHODS)
        if done.returncode or not args.only:
            return done.returncode
    folder = args.folder or Path(tempfile.mkdtemp(prefix="plymix-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return measured(args, folder)
    finally:
        if not args.folder:
            shutil.rmtree(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="NAMES", help="groups or cases, by comma")
    parser.add_argument("--runs", type=int, default=5, help="measured pairs of each case")
    parser.add_argument("--peer-runs", type=int, default=2, help="rounds beside the peers")
    parser.add_argument("--folder", type=Path, help="where the files are made, and kept")
    parser.add_argument("--peers", action="store_true", help="also sd-mecha and mergekit")
    parser.add_argument("--quick", action="store_true", help="small files, one run; implies --show")
    parser.add_argument("--show", action="store_true", help="print the tables, leave the page")
    args = parser.parse_args()
    args.show |= args.quick
    names = [*FILES, PEER_GROUP, METHODS, *(c.name for c in CASES), *(s.name for s in peers.SHARED)]
    args.only = [n for n in args.only.split(",") if n]
    for name in args.only:
        if name not in names:
            parser.error(f"no group or case {name!r}; there are: {', '.join(dict.fromkeys(names))}")
    if args.peers and args.only:
        args.only.append(PEER_GROUP)
    if args.runs < 1 or args.peer_runs < 1:
        parser.error("at least one run is needed")
    return args


def measured(args: argparse.Namespace, folder: Path) -> int:
    """Measure what was asked for, show it, and write the page."""
    wanted = [c for c in CASES if not args.only or {c.name, c.group} & {*args.only}]
    groups = list(dict.fromkeys(c.group for c in wanted))
    with_peers = args.peers or PEER_GROUP in args.only
    some = [s for s in peers.SHARED if s.name in args.only]
    methods = (some or peers.SHARED) if with_peers else ()
    beside: dict[peers.Shared, Mapping[str, Sequence[Usage]]] = {}
    groups += [g for g in dict.fromkeys(s.group for s in methods) if g not in groups]
    small = ["--small"] * args.quick
    for together in [groups] if args.folder else [[g] for g in groups]:
        make(folder, [*together, *small, "--check"])
    count = 1 if args.quick else args.runs
    failed = False
    for group in groups:
        make(folder, [group, *small])
        links(folder, group)
        rows = [row_of(c, folder, count) for c in wanted if c.group == group]
        failed |= any(r.error for r in rows)
        if rows:
            about = machine.describe(folder)
            whole = len(rows) == sum(c.group == group for c in CASES)
            publish(group, report.section(rows, about), write=whole and not args.show)
        if mine := [s for s in methods if s.group == group]:
            beside |= beside_peers(folder, mine, 1 if args.quick else args.peer_runs)
        if not args.folder:
            for name in [*FILES[group][2], *TWELVE.values()]:
                (folder / name).unlink(missing_ok=True)
    if beside:
        about = f"{machine.describe(folder)}, {peers.install(folder / PEER_GROUP)}"
        text = report.peer_section(beside, about)
        publish(PEER_GROUP, text, write=not (args.show or some))
        failed |= any(report.failure(runs["plymix"]) for runs in beside.values())
    return int(failed)


def make(folder: Path, words: Sequence[str]) -> None:
    """Call files.py, whose needs in memory are not ours."""
    done = subprocess.run([sys.executable, HERE / "files.py", folder, *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def links(folder: Path, group: str) -> None:
    """The twelve names of the four SD1.5 files."""
    if group == "sd1":
        for i, name in enumerate(TWELVE.values()):
            (folder / name).unlink(missing_ok=True)
            os.link(folder / FILES[group][2][i % 4], folder / name)


def environment(folder: Path, bin: Path) -> dict[str, str]:
    """A child's environment: commands from `bin` first, plymix's cache in `folder`."""
    path = os.pathsep.join([str(bin), os.environ.get("PATH", os.defpath)])
    # mergekit's libraries would otherwise look for a hub.
    return {
        **os.environ,
        "PATH": path,
        "PLYMIX_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def row_of(case: Case, folder: Path, count: int) -> Row:
    """Measure one case."""
    env = environment(folder, Path(sys.executable).parent)
    for name, text in case.files.items():
        (folder / name).write_text(text)

    def command() -> Usage:
        if case.cold:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        return measure.process(case.command, folder, env)

    runs = [shown(case.name, command)]
    if case.yardstick:
        shell = not case.yardstick.startswith("plymix ")
        line = partial(measure.process, case.yardstick, folder, env, shell=shell)
        runs.append(shown("  yardstick", line))
    usages, *others = measure.rounds(runs, count)
    return Row(case, usages, *others)


def beside_peers(
    folder: Path, methods: Sequence[peers.Shared], count: int
) -> dict[peers.Shared, Mapping[str, Sequence[Usage]]]:
    """Measure these methods with all tools in turn."""
    env = folder / PEER_GROUP
    peers.install(env)
    bins = {"plymix": Path(sys.executable).parent, **dict.fromkeys(peers.PEERS, env / "bin")}
    rows: dict[peers.Shared, Mapping[str, Sequence[Usage]]] = {}
    for shared in methods:
        for name, text in shared.files.items():
            (folder / name).write_text(text)
        lines = {tool: line for tool in bins if (line := shared.line(tool))}
        runs = [
            shown(
                f"{shared.name}: {tool}",
                partial(measure.process, line, folder, environment(folder, bins[tool]), PEER_LIMIT),
            )
            for tool, line in lines.items()
        ]
        rows[shared] = dict(zip(lines, measure.rounds(runs, count, warmup=0), strict=True))
    return rows


def shown(label: str, run: Callable[[], Usage]) -> Callable[[], Usage]:
    """The run, with a line of what it took on stderr."""

    def call() -> Usage:
        used = run()
        what = f"{used.wall:7.2f} s {used.cpu:7.2f} s CPU {used.mib:7.0f} MiB  {used.error}"
        print(f"{label:30} {what.rstrip()}", file=sys.stderr, flush=True)
        return used

    return call


def publish(name: str, text: str, *, write: bool) -> None:
    """Print a group's tables, and put them on the page."""
    print(f"{text}\n", flush=True)
    if write:
        page = PAGE.read_text("utf-8")
        PAGE.write_text(report.replace(page, name, text), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
