"""What a merge shows: notes, the result's line, the plan, the table of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plymix.cli import screen
from plymix.cli.options import Device, checked_threads
from plymix.cli.typed import typed
from plymix.errors import amount, listed

if TYPE_CHECKING:
    from plymix.api import Explanation, Result, Share
    from plymix.plan import Plan


def carry_out(
    plan: Plan, path: Path, threads: int, device: Device = "cpu", configs: str = ""
) -> Result:
    """Run a plan with its notes and a progress line."""
    from plymix import api

    for text in remarks(plan):
        screen.note(text)
    with screen.ProgressLine() as progress:
        result = api.run(
            plan,
            path,
            threads=checked_threads(threads),
            device=device,
            configs=configs,
            progress=progress,
        )
    for text in result.notes[len(plan.notes) :]:  # what only the work could tell
        screen.note(text)
    return result


def worked(
    work: Callable[..., Any],
    given: tuple[Any, ...],
    output: str,
    dry_run: bool,
    force: bool,
    threads: int,
    options: Mapping[str, Any],
) -> Any:
    """What `work` makes of what is `given`, with a progress line; its notes are shown."""
    with typed(), screen.ProgressLine() as progress:
        found = work(
            *given,
            output or None,
            dry_run=dry_run,
            force=force,
            threads=checked_threads(threads),
            progress=progress,
            **options,
        )
    for text in found.notes:
        screen.note(text)
    return found


def remarks(plan: Plan) -> Iterator[str]:
    """What a user should know of a plan: its notes, dropped EMA weights, keys without a partner."""
    yield from plan.notes
    for i in plan.inputs:
        for rule, keys in plan.dropped.get(i.name, {}).items():
            if rule.startswith("ema") and i.name in plan.recipe.models:
                used = rule in ("ema = use", "ema = exchange")
                done = "replaced by their EMA copies" if used else "left out"
                yield f"{i.label}: {amount(len(keys))} {done} ({rule})"
        unmatched = plan.unmatched.get(i.name, ())
        told = {*i.strangers, *i.paired.unpaired} | (plan.used(i) if unmatched else set())
        # a LoRA's, which is no model with tensors, are told by module among the plan's notes
        if i.tensors and (alone := [key for key in unmatched if key not in told]):
            yield f"{i.label}: {amount(len(alone))} without a partner, left out: {listed(alone)}"


def finish(
    plan: Plan,
    path: Path | None,
    json: bool,
    dry_run: bool = False,
    threads: int = 0,
    device: Device = "cpu",
    configs: str = "",
) -> None:
    """Carry a plan out into `path` and show the result, or show the plan."""
    from plymix import api

    if dry_run or path is None:
        _show_plan(api.rehearsed(plan, path, device=device, configs=configs), plan, json)
        return
    result = carry_out(plan, path, threads, device, configs)
    if json:
        screen.put_json(result.to_dict())
    else:
        screen.put(made(result, result.formula))


def made(result: Result, formula: str) -> str:
    """The line that ends a merge: what was made, of what, how large, how fast."""
    from plymix.api import size

    return (
        f"{result.path.name} = {formula} [{size(result.nbytes)}, {result.seconds:.1f} s;"
        f" {amount(result.merged)} merged, {result.copied} copied; of the inputs"
        f" {result.dropped} unused, {result.unmatched} unmatched]"
    )


def _show_plan(explanation: Explanation, plan: Plan, json: bool) -> None:
    for text in (*remarks(plan), *explanation.notes[len(plan.notes) :]):
        screen.note(text)
    if json:
        screen.put_json(explanation.to_dict())
        return
    screen.put(explanation.formula)
    screen.put(explanation.architecture)
    screen.put("")
    show_blocks(explanation.blocks, [i.label for i in plan.inputs])
    screen.put("")
    for line in totals(explanation, {i.name: i.label for i in plan.inputs}):
        screen.put(line)


def totals(explanation: Explanation, labels: Mapping[str, str]) -> Iterator[str]:
    from plymix.api import size

    yield f"{amount(explanation.merged)} merged, {explanation.copied} copied"
    for name, rules in explanation.dropped.items():
        for rule, n in rules.items():
            yield f"{n} of {labels.get(name, name)} left out: {rule}"
    for name, keys in explanation.unmatched.items():
        if keys:
            whose = labels.get(name, name)
            yield f"{len(keys)} of {whose} unmatched (another model lacks them): {listed(keys)}"
    yield (
        f"reads {size(explanation.bytes_read)}, writes {size(explanation.bytes_written)},"
        f" needs at most {size(explanation.memory)} of memory; nothing was written"
    )


Row = tuple[str, Mapping[str, float], str, int, int]
"""Block, share of each file, methods, tensors merged, tensors copied."""


def rows(shares: Iterable[Share]) -> list[Row]:
    """One row per block; components of a block that are treated alike are one."""
    found: dict[Any, Row] = {}
    for s in shares:
        key = (s.block, tuple(s.shares.items()), s.method)
        _, _, _, merged, copied = found.get(key, ("", {}, "", 0, 0))
        found[key] = (s.block, s.shares, s.method, merged + s.merged, copied + s.copied)
    return list(found.values())


def show_blocks(shares: Iterable[Share], files: Iterable[str]) -> None:
    """The table of blocks: bars between two files' shares; for more files, the shares in words."""
    known = rows(shares)
    used = [f for f in dict.fromkeys(files) if any(f in row[1] for row in known)]
    plain_mix = all(not row[2] and abs(sum(row[1].values()) - 1) < 1e-6 for row in known)
    if len(used) <= 2 and plain_mix:
        _two_files(known, [*used, *(f for f in files if f not in used)][:2])
    else:
        _many_files(known)


def _two_files(known: list[Row], files: list[str]) -> None:
    first, second = (*files, "")[:2]
    counted = screen.width() >= 72
    side = max(9, min(24, (screen.width() - 46) // 2 if counted else (screen.width() - 24) // 2))
    cells = max(8, min(30, screen.width() - 8 - 2 * (side + 2) - 16 * counted))
    rows = []
    for block, mix, _, merged, copied in known:
        share = mix.get(first, 0.0)
        row = [block, screen.percent(share), screen.bar(share, cells)]
        row += [screen.percent(mix.get(second, 0.0)), str(merged), str(copied)]
        rows.append(row if counted else row[:4])
    names = [f">{screen.shortened(first, side)}", "", screen.shortened(second, side)]
    columns = ["block", *names, ">merged", ">copied"]
    screen.table(columns if counted else columns[:4], rows)


def _many_files(known: list[Row]) -> None:
    def told(mix: Mapping[str, float], methods: str) -> str:
        return mixed(mix.items()) + (f" by {methods}" if methods else "")

    screen.table(
        ("block", ">merged", ">copied", "made of"),
        [(b, str(m), str(c), told(mix, how).strip()) for b, mix, how, m, c in known],
    )


def mixed(shares: Iterable[tuple[str, float]]) -> str:
    """'150 % a.ckpt - 50 % b.ckpt', from the files and their shares."""
    from plymix.metadata import signed_sum

    return signed_sum((share, f"{screen.percent(abs(share))} {name}") for name, share in shares)
