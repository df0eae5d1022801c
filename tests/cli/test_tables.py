"""Tables in the terminal: columns that line up, whatever the letters; nothing is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plymix.cli import screen

WORD = st.text(st.sampled_from("ab1 é日本\u0301…█"), max_size=30)


def drawn(capsys: pytest.CaptureFixture[str], *args: object, **options: int) -> list[str]:
    screen.table(*args, **options)  # type: ignore[arg-type]
    return capsys.readouterr().out.splitlines()


def test_columns_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("IN00", "1", "x"), ("日本", "12.5", "é"), ("e\u0301", "-3", "last")]
    assert drawn(capsys, ("block", ">share", "of"), rows) == [
        "block  share  of",
        "IN00       1  x",
        "日本    12.5  é",  # two columns for each of these letters
        "e\u0301         -3  last",  # none for a mark on another
    ]


def test_one_column_folds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("key", "some words that do not fit, an-unbroken-one-that-never-would-be", "1")]
    assert drawn(capsys, ("name", "text", ">n"), rows, wrap=1) == [
        f"{'name':4}  {'text':31}  n",  # 31 are left for it
        f"{'key':4}  {'some words that do not fit,':31}  1",
        "      an-unbroken-one-that-never-woul",
        "      d-be",
    ]


@given(st.lists(st.tuples(WORD, WORD, WORD), max_size=4), st.integers(0, 2))
def test_nothing_is_cut(rows: list[tuple[str, str, str]], wrap: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setenv("COLUMNS", "44")
        patch.setattr("sys.stdout", type("Out", (), {"write": lines.append, "encoding": "utf-8",
                                                     "isatty": lambda: False}))  # fmt: skip
        screen.table(("a", ">b", "c"), rows, wrap=wrap)
    letters = sorted("".join(lines).replace(" ", "").replace("\n", ""))
    assert letters == sorted("abc" + "".join("".join(row) for row in rows).replace(" ", ""))


@given(WORD, st.integers(5, 40))
def test_long_names_lose_their_middle(name: str, most: int) -> None:
    short = screen.shortened(name, most)
    assert screen.cells(short) <= most
    assert short == name or "…" in short
