"""Names that nobody knows: which ones are offered instead."""

import pytest

from plymix.errors import nearest, unknown

PRESETS = [
    "GRAD_A",
    "GRAD_V",
    "SDXL_GRAD_V",
    "FLAT_25",
    "COSINE",
    "SDXL_COSINE",
    "M00",
    "IN09",
    "IN11",
]
METHODS = ["ties", "ties_dare", "dare_ties", "dare_linear", "karcher", "add_difference", "merge"]
METHODS += ["train_difference", "euclidean_add_difference", "presets", "median", "ties_gmedian"]


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ("grad", ["GRAD_A", "GRAD_V"]),  # they begin so
        ("GRADV", ["GRAD_V"]),
        ("cosin", ["COSINE"]),
        ("IN99", ["IN09"]),
        ("Dare", ["dare_ties", "dare_linear"]),
        ("gmedian", ["ties_gmedian"]),  # a word of it
        ("mrege", ["merge"]),
        ("addifference", ["add_difference"]),  # not all that end so
        ("nothing", []),
        ("", []),
    ],
)
def test_nearest(asked, offered):
    assert nearest(asked, PRESETS + METHODS) == offered


def test_what_is_said_where_none_is_near():
    assert str(unknown("thing", "x", ["one", "two"])) == "unknown thing 'x': known: one, two"
    assert str(unknown("thing", "x", map(str, range(13)))) == "unknown thing 'x': 13 are known"
