"""The commands as processes: console scripts, streams, signals, what is imported."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from plymix.cli import screen
from plymix.engine import Progress

MAIN = "import sys; from plymix.__main__ import {main}; sys.exit({main}())"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate("ab"):
        tiny.write(folder / f"{name}.safetensors", "sd1", seed=i)
    return folder


def command(*words: object, code: str = MAIN.format(main="main")) -> list[str]:
    return [sys.executable, "-c", code, *map(str, words)]


def plymix(
    folder: Path, *words: object, code: str = MAIN.format(main="main"), **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*words, code=code),
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
    )


def test_both_console_scripts_are_the_same_command(models: Path, tmp_path: Path) -> None:
    words = (models / "a.safetensors", models / "b.safetensors", "--weights", "GRAD_V", "-o")
    new = plymix(tmp_path, "mbw", *words, "new.safetensors")
    old = plymix(tmp_path, *words, "old.safetensors", code=MAIN.format(main="main_mbw"))
    assert (new.returncode, old.returncode) == (0, 0), new.stderr + old.stderr
    assert (tmp_path / "new.safetensors").read_bytes() == (
        tmp_path / "old.safetensors"
    ).read_bytes()
    shown = plymix(tmp_path, "--help", code=MAIN.format(main="main_mbw")).stdout.decode()
    assert shown.startswith("Usage: merge_block_weighted [OPTIONS] MODEL_1 MODEL_2")


def test_errors_have_an_exit_code_and_no_traceback(models: Path, tmp_path: Path) -> None:
    ran = plymix(tmp_path, "mbw", models / "a.safetensors", "gone.safetensors")
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr.startswith(b"plymix: gone.safetensors does not exist")
    assert b"Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command_line", ["merge -o out.ckpt", "explain", "mbw --verbose"])
def test_json_is_all_of_stdout(models: Path, tmp_path: Path, command_line: str) -> None:
    name, *options = command_line.split()
    files = (models / "a.safetensors", models / "b.safetensors")
    ran = plymix(tmp_path, name, *files, *options, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["merged"] > 800


def test_an_ascii_terminal_is_enough(models: Path, tmp_path: Path) -> None:
    os.link(models / "a.safetensors", tmp_path / "é [a].safetensors")
    ran = plymix(
        tmp_path, "mbw", "é [a].safetensors", models / "b.safetensors", "--verbose",
        PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C.UTF-8",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.isascii()
    assert b"[a].safetensors" in ran.stdout


def test_no_colour_where_there_is_no_terminal(models: Path, tmp_path: Path) -> None:
    ran = plymix(tmp_path, "explain", models / "a.safetensors", models / "b.safetensors")
    assert b"\x1b" not in ran.stdout + ran.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("methods", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


IMPORTS = """
import sys
from plymix.cli import run
code = run(sys.argv[1:])
print(code, *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (("--help",), {"torch", "numpy", "numkong", "rich", "cyclopts", "msgspec"}),
        (("merge", "--help"), {"torch", "numpy", "numkong", "msgspec"}),
        (("archs",), {"torch", "numpy", "numkong", "rich"}),
        (("mbw", "a", "b", "--weights", "GRAD_V", "-o", "OUT"), {"torch", "rich"}),
        (("merge", "a", "b", "-o", "OUT"), {"torch", "rich"}),
        (("explain", "a", "b"), {"torch", "numpy", "numkong", "rich"}),
        (("inspect", "a"), {"torch", "rich"}),
        (("check", "a"), {"torch", "rich"}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_only_what_is_needed_is_imported(
    models: Path, tmp_path: Path, words: tuple[str, ...], absent: set[str]
) -> None:
    files = {n: models / f"{n}.safetensors" for n in "ab"} | {"OUT": tmp_path / "o.safetensors"}
    ran = plymix(tmp_path, *(files.get(w, w) for w in words), code=IMPORTS)
    code, *modules = ran.stderr.decode().splitlines()[-1].split()
    assert code == "0", ran.stderr
    assert absent & set(modules) == set()


SLOW = """
import sys, time
from plymix.cli import main
from plymix.engine.worker import Worker
work = Worker.run
def slow(self, item):
    time.sleep(0.2)
    work(self, item)
Worker.run = slow
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_merge_leaves_nothing(models: Path, tmp_path: Path, name: str) -> None:
    words = ("merge", models / "a.safetensors", models / "b.safetensors", "-o", "out.safetensors")
    alpha = ",".join(f"0.{i:02}" for i in range(25))
    process = subprocess.Popen(
        command(*words, "--alpha", alpha, code=SLOW),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        end = time.monotonic() + 30
        while not list(tmp_path.iterdir()) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert err.splitlines()[-1] == b"plymix: stopped; nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path: Path) -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from plymix import cli
cli.run = lambda words, prog: os.kill(os.getpid(), signal.SIGHUP) or 0
sys.exit(cli.main())
"""
    assert plymix(tmp_path, "--help", code=code).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("main", ["main", "main_mbw"])
@pytest.mark.parametrize("module", ["plymix.cli", "plymix.errors", "plymix.cli.screen"])
def test_ctrl_c_is_quiet_while_the_command_line_is_imported(
    tmp_path: Path, module: str, main: str
) -> None:
    code = f"""
import os, signal, sys, time
class Stops:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
sys.meta_path.insert(0, Stops())
{MAIN.format(main=main)}
"""
    ran = plymix(tmp_path, "--help", code=code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"plymix: stopped\n")


# --- the progress line --------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *steps: Progress) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "60")
    with screen.ProgressLine() as progress:
        for step in steps:
            progress(step)
    return stream.getvalue()


def step(seconds: float, done: int) -> Progress:
    return Progress("merging", done * 10**9, 4 * 10**9, seconds)


def test_a_short_merge_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), step(0.1, 1), step(0.4, 4)) == ""


def test_a_terminal_sees_speed_and_time_left_and_a_clean_line_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = shown(monkeypatch, Terminal(), step(1.0, 1), step(1.01, 2), step(2.0, 3))
    first, second, cleared, end = text.split("\r")[1:]
    assert first == "merging  25% of 4.00 GB, 1.00 GB/s, 3 s left"
    assert second.rstrip() == "merging  75% of 4.00 GB, 1.50 GB/s, 1 s left"
    assert (cleared.strip(), end) == ("", "")
    assert len(cleared) >= len(first)


def test_elsewhere_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [step(s / 2, 1) for s in range(60)]
    lines = shown(monkeypatch, io.StringIO(), *steps).splitlines()
    assert len(lines) == 2
    assert "\r" not in "".join(lines)


def test_counts_are_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Progress("hashing the inputs", 1, 2, 3.0)
    assert "hashing the inputs: 1 of 2" in shown(monkeypatch, Terminal(), now)
