"""A short run of the fuzzer over every parser, and that it would find something."""

import json
import time

import pytest

import fuzz
from plymix.errors import Refusal
from plymix.formats import sharded


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return fuzz.targets(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_valid_files_are_read(tmp_path, known, name):
    """What the cases start from is no damaged file itself: its parser gives a result."""
    for files in known[name].seeds:
        for file, content in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        known[name].run(tmp_path)


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_damaged_files(tmp_path, known, name):
    fuzz.fuzz(known[name], tmp_path / "case", 20, number=1)


def test_every_target_is_named(known):
    assert tuple(known) == fuzz.NAMES


def crash(folder):
    raise KeyError("x")


def hang(folder):
    end = time.process_time() + 5
    while time.process_time() < end:
        pass


def gorge(folder):
    return len(bytes(fuzz.MEMORY + (1 << 20)))


def rattle(folder):
    raise Refusal("ok")


@pytest.mark.parametrize(
    ("run", "error"), [(crash, KeyError), (hang, fuzz.Hang), (gorge, AssertionError)]
)
def test_faults_are_found(tmp_path, monkeypatch, run, error):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    with pytest.raises(error):
        fuzz.attempt(fuzz.Target([], run), {"x": b""}, tmp_path / "case")
    fuzz.attempt(fuzz.Target([], rattle), {"x": b""}, tmp_path / "case")


def test_a_fault_in_a_parser_is_found(tmp_path, known, monkeypatch):
    """A reader of indices that lets JSON's own errors out is caught at it."""
    monkeypatch.setattr(sharded, "parsed", lambda text, file: json.loads(text))
    with pytest.raises((ValueError, AttributeError, RecursionError)):
        fuzz.fuzz(known["shards"], tmp_path / "case", 100, number=1)
