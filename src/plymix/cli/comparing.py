"""`diff`: how far two models are from each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from plymix.cli import screen
from plymix.cli.options import Force, Json, OwnArch, Threads, argument, checked_threads, option

if TYPE_CHECKING:
    from plymix.chart import Chart
    from plymix.difference import Difference, Distance

EXAMPLES = {"diff": "Example:\n  PROG a.safetensors b.safetensors --plot diff.svg"}


def diff(
    a: Annotated[str, argument("The first model.")],
    b: Annotated[str, argument("The second model.")],
    /,
    *,
    plot: Annotated[
        str,
        option(
            "Draw the blocks here too: .svg, or .png (needs Pillow).", metavar="FILE", default=False
        ),
    ] = "",
    arch: OwnArch = "",
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Tell how far two models are from each other.

    For each component and block: how many tensors have other numbers, the relative distance
    |B - A| / |A|, and the cosine. Tells when B is A plus a VAE, or A rounded to fp16, or the same
    weights under other names. Both are read once; formats, names and number formats may differ.
    """
    from plymix import chart, difference, outputs

    path = outputs.path_of(plot) if plot else None
    if path:
        chart.check(path, force)
    with screen.ProgressLine() as progress:
        found = difference.diff(
            a, b, arch=arch, threads=checked_threads(threads), progress=progress
        )
    if path:
        chart.write(drawn(found), path)
    if json:
        screen.put_json(found.to_dict())
    else:
        for line in _told(found):
            screen.put(line)
        _tables(found)
        if path:
            screen.put(f"\ndrawn in {path}")


def _told(found: Difference) -> Iterator[str]:
    from plymix.errors import amount, listed

    yield f"A = {found.a}: {found.title_a}"
    yield f"B = {found.b}: {found.title_b}"
    yield from found.verdicts
    for name, keys in (("A", found.only_a), ("B", found.only_b)):
        if keys:
            yield f"{amount(len(keys))} only in {name}: {listed(keys, 3)}"
    if found.reshaped:
        yield f"{amount(len(found.reshaped))} of two shapes: {listed(found.reshaped, 3)}"


def _tables(found: Difference) -> None:
    top = _top(found)
    cells = max(8, min(30, screen.width() - 62))
    for title, rows in (("component", found.components), ("block", found.blocks)):
        screen.put("")
        screen.table(
            (title, ">tensors", ">changed", ">distance", "", ">cosine"),
            [
                (
                    d.name,
                    str(d.tensors),
                    screen.percent(d.changed / d.tensors),
                    _number(d.relative),
                    screen.bar((d.relative or 0.0) / top, cells, rest=" ").rstrip(),
                    "-" if d.cosine is None else f"{d.cosine:.6f}",
                )
                for d in (*rows, *([found.total] if title == "component" else []))
            ],
        )


def _top(found: Difference) -> float:
    """The largest distance of a block, which a whole bar stands for."""
    return max((d.relative or 0.0 for d in found.blocks), default=0.0) or 1.0


def _number(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:.4g}"


def drawn(found: Difference) -> Chart:
    """The blocks as bars, the longest for the largest distance."""
    from plymix.chart import Bar, Chart

    top = _top(found)

    def bar(d: Distance) -> Bar:
        said = f"{_number(d.relative)}   {screen.percent(d.changed / d.tensors)} changed"
        return Bar(d.name, (d.relative or 0.0) / top, said)

    return Chart(
        f"{found.a} and {found.b}",
        [*found.verdicts[:4], "relative distance |B - A| / |A|, and share of changed tensors"],
        [bar(d) for d in found.blocks],
    )
