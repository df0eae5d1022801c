"""Results as the tables of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cases import Case
from measure import Figures, Usage, figures, ratio
from peers import PEERS, Shared

PASS, FAIL = "✔", "✘"


@dataclass(frozen=True)
class Row:
    """A case with the runs of its command and, if it has one, of its yardstick."""

    case: Case
    usages: Sequence[Usage]
    yardsticks: Sequence[Usage] = ()

    @property
    def error(self) -> str:
        return failure(self.usages) or failure(self.yardsticks)

    @property
    def ratio(self) -> float:
        return ratio(self.usages, self.yardsticks)

    def bars(self) -> list[tuple[str, bool]]:
        """Each bar and whether it holds."""
        case, found = self.case, figures(self.usages)
        bars = []
        if case.ratio is not None:
            bars.append((f"≤ {case.ratio:g} ×", round(self.ratio, 2) <= case.ratio))
        if case.seconds is not None:
            bars.append((f"< {case.seconds:g} s", found.wall < case.seconds))
        if case.mib is not None:
            bars.append((f"≤ {case.mib:.0f} MiB", found.mib <= case.mib))
        return bars


def failure(usages: Sequence[Usage]) -> str:
    return usages[-1].error if usages else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table: the first column to the left, the others to the right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def wall(f: Figures) -> str:
    return f"{f.wall:.2f} ({f.low:.2f}–{f.high:.2f})"


def cells(row: Row) -> list[str]:
    if row.error:
        return [row.case.title, f"failed: {clean(row.error)}", *[""] * 5]
    f = figures(row.usages)
    held = bool(row.yardsticks)
    return [
        row.case.title,
        wall(f),
        f"{f.cpu:.2f}",
        f"{f.mib:.0f}",
        wall(figures(row.yardsticks)) if held else "",
        f"{row.ratio:.2f}" if held else "",
        ", ".join(f"{bar} {PASS if ok else FAIL}" for bar, ok in row.bars()),
    ]


def clean(text: str) -> str:
    """An error text fit for a table cell."""
    return text.replace("|", "/")[:160]


HEADER = ("case", "wall s", "CPU s", "peak MiB", "yardstick s", "ratio", "bar")


def section(rows: Sequence[Row], about: str) -> str:
    """The table of one group and the command of each row."""
    parts = [about, table(HEADER, [cells(r) for r in rows])]
    parts += ["<details><summary>Commands</summary>"]
    for row in rows:
        lines = [row.case.command]
        if row.case.yardstick:
            lines.append(f"# yardstick: {row.case.yardstick}")
        parts += [f"{row.case.title} (`{again(row.case.name)}`)", block("\n".join(lines))]
        parts += [f"{name}:\n\n{block(text)}" for name, text in row.case.files.items()]
    return "\n\n".join([*parts, "</details>"])


def again(name: str) -> str:
    """The command that measures one case."""
    return f"python benchmarks/run.py --only {name}"


def block(text: str) -> str:
    """Not marked as any language: blocks of a language are run by the tests of the pages."""
    return f"```text\n{text.strip()}\n```"


def peer_cells(shared: Shared, runs: Mapping[str, Sequence[Usage]]) -> list[str]:
    """One row of the table beside the peers. `runs` has "plymix" and the peers that were run."""
    ours = runs["plymix"]
    if failure(ours):
        return [shared.name, f"failed: {clean(failure(ours))}", *[""] * (2 * len(PEERS))]
    row = [shared.name, f"{figures(ours).wall:.2f}, {figures(ours).mib:.0f} MiB"]
    for peer in PEERS:
        usages = runs.get(peer, ())
        if not usages:
            row += ["–", ""]
        elif failure(usages):
            row += [f"failed: {clean(failure(usages))}", ""]
        else:
            f = figures(usages)
            row += [f"{f.wall:.1f}, {f.mib:.0f} MiB", f"{ratio(usages, ours):.1f} ×"]
    return row


def peer_section(rows: Mapping[Shared, Mapping[str, Sequence[Usage]]], about: str) -> str:
    header = ["method", "plymix s", *(h for p in PEERS for h in (f"{p} s", "plymix is faster"))]
    parts = [about, table(header, [peer_cells(s, runs) for s, runs in rows.items()])]
    parts += ["<details><summary>Commands</summary>"]
    for shared in rows:
        lines = [line for tool in ("plymix", *PEERS) if (line := shared.line(tool))]
        parts += [f"{shared.name}", block("\n".join(lines))]
        for name, text in shared.files.items():
            parts.append(f"{name}:\n\n{block(text)}")
    return "\n\n".join([*parts, "</details>"])


def replace(page: str, name: str, text: str) -> str:
    """The page with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page does not have {begin} and {end} once each, in this order")
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
