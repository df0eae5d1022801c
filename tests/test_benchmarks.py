"""The benchmark harness: pairing, medians, memory account, tables, recipes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cases
import machine
import measure
import peers
import report

from plymix import recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def usage(wall, cpu=1.0, mib=50.0, error=""):
    return measure.Usage(wall, cpu, mib, error)


def test_rounds_alternate_and_leave_out_the_first():
    order = []

    def run(name):
        def call():
            order.append(name)
            return usage(len(order))

        return call

    a, b = measure.rounds([run("a"), run("b")], 2)
    assert order == ["a", "b"] * 3
    assert [u.wall for u in a] == [3, 5]
    assert [u.wall for u in b] == [4, 6]


def test_a_failed_run_is_not_repeated_and_is_kept():
    runs = iter([usage(1), usage(2, error="no")])
    failed, fine = measure.rounds([lambda: next(runs), lambda: usage(1)], 3, warmup=0)
    assert [u.error for u in failed] == ["", "no"]
    assert len(fine) == 3


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    # The pairs give 0.5, 3 and 2; the medians, 3 and 2, would give 1.5.
    a, b = [usage(1), usage(3), usage(8)], [usage(2), usage(1), usage(4)]
    assert measure.ratio(a, b) == 2.0


def test_figures():
    found = measure.figures([usage(3, 2, 40), usage(1, 9, 60), usage(2, 4, 50)])
    assert found == measure.Figures(wall=2, low=1, high=3, cpu=4, mib=60)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
def test_a_process_is_accounted_for_by_itself(tmp_path):
    (tmp_path / "out.safetensors").write_text("an earlier result")
    (tmp_path / "use.py").write_text("x = bytes(range(256)) * 400_000\n")
    big = measure.process(f"{sys.executable} use.py", tmp_path, os.environ)
    assert not big.error
    assert big.mib > 97  # the 97.7 MiB it holds
    assert big.cpu > 0
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
def test_failures_and_limits_are_told_without_paths(tmp_path):
    line = f"echo first; echo {tmp_path}/x is bad >&2; exit 3"
    assert measure.process(line, tmp_path, os.environ, shell=True).error == "x is bad"
    late = measure.process("sleep 20", tmp_path, os.environ, limit=0.2)
    assert late.error == "not done after 0.2 s"
    assert late.wall < 10


def row(wall=1.0, mib=50.0, error="", **bars):
    case = cases.Case("one", "sd1", "One", "plymix x", "cat a", **bars)
    return report.Row(case, [usage(wall, 0.5, mib, error)], [usage(2.0)])


def test_bars():
    assert row(2.0, ratio=1.0, mib=64).error == ""
    assert row(2.0, ratio=1.0).bars() == [("≤ 1 ×", True)]
    assert row(2.1, ratio=1.0).bars() == [("≤ 1 ×", False)]
    assert row(0.3, seconds=0.3).bars() == [("< 0.3 s", False)]


def test_a_row_of_the_table():
    case = cases.Case("one", "sd1", "One", "plymix x", "cat a", ratio=1.0, mib=64)
    text = report.section([report.Row(case, [usage(1.0, 0.5, 65)], [usage(2.0)])], "A machine")
    line = "| One | 1.00 (1.00–1.00) | 0.50 | 65 | 2.00 (2.00–2.00) | 0.50 | ≤ 1 × ✔, ≤ 64 MiB ✘ |"
    assert line in text.splitlines()
    assert "plymix x\n# yardstick: cat a" in text
    assert "--only one" in text


def test_every_line_of_a_table_has_as_many_cells():
    failed = report.Row(row().case, [usage(1, error="a | b")], [usage(1)])
    for line in report.section([row(), failed], "").splitlines():
        if line.startswith("|"):
            assert line.count("|") == len(report.HEADER) + 1


def test_a_row_beside_the_peers():
    shared = peers.Shared("ties", "")
    runs = {
        "plymix": [usage(2.0)],
        "sd-mecha": [usage(30.0, mib=900)],
        "mergekit": [usage(1, error="no")],
    }
    assert report.peer_cells(shared, runs) == [
        "ties", "2.00, 50 MiB", "30.0, 900 MiB", "15.0 ×", "failed: no", "", "–", "",
    ]  # fmt: skip
    assert report.peer_cells(shared, {"plymix": [usage(2.0)]})[2:] == ["–", ""] * 3


def test_replacing_a_section():
    page = "x\n<!-- a: begin -->\nold\n<!-- a: end -->\ny\n<!-- b: begin -->\n<!-- b: end -->\n"
    new = report.replace(page, "a", "new")
    assert new == page.replace("old", "new")
    assert report.replace(new, "a", "new") == new
    with pytest.raises(ValueError, match="c: begin"):
        report.replace(page, "c", "new")


def test_the_page_has_a_section_for_each_group():
    page = PAGE.read_text("utf-8")
    for group in [*cases.FILES, "peers"]:
        assert report.replace(page, group, "x") != page


def test_every_recipe_is_one():
    texts = [t for c in cases.CASES for n, t in c.files.items() if n.endswith(".toml")]
    texts += [s.recipe for s in peers.SHARED]
    assert len(texts) > 20
    for text in texts:
        recipe.from_toml(text)


def test_names_are_unique_and_every_case_has_a_bar():
    names = [c.name for c in cases.CASES]
    assert len(names) == len(set(names))
    assert len({s.name for s in peers.SHARED}) == len(peers.SHARED)
    for case in cases.CASES:
        assert case.group in cases.FILES
        assert (case.ratio, case.seconds, case.mib) != (None, None, None)


def test_the_gradient_and_the_four_blocks():
    gradient = [float(x) for x in cases.GRADIENT_XL.split(",")]
    assert (len(gradient), gradient[0], gradient[9], gradient[18]) == (19, 1, 0, 1)
    assert cases.FOUR_BLOCKS.split(",").count("1") == 21
    assert len(peers.GRADIENT) == len(peers.PLACES) == 25


def test_machine(tmp_path):
    text = machine.describe(tmp_path)
    assert "Python 3." in text
    assert str(tmp_path) not in text
    assert "/" not in machine.filesystem(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the account of a family is Linux's")
def test_memory_of_a_family_is_counted_together(tmp_path):
    (tmp_path / "use.py").write_text(
        "import os, time\n"
        "child = os.fork()\n"
        "x = b'1' * (40 << 20)\n"  # each has its own
        "time.sleep(0.5)\n"
        "child and os.wait()\n"
    )
    with subprocess.Popen([sys.executable, tmp_path / "use.py"]) as process:
        together = measure.Together(process.pid)
        together.start()
        process.wait()
        together.stop()
    assert 80 < together.mib < 120
