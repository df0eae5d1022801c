"""The command line: parse, call, show. Nobody imports this room.

    plymix mbw model1.ckpt model2.ckpt --weights GRAD_V

`COMMANDS` is all there is. A command's module is imported when the command is called, and help for
all of them is printed from this table, so that `plymix --help` costs no more than Python's start.

Exit codes: 0 done, 1 failed (or a file found unhealthy), 2 refused, 130 stopped. Results go to
stdout, notes, progress and errors to stderr. With `--json` stdout holds exactly one JSON document;
an error is `{"error": text, "exit_code": number}` then.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING

from plymix import stops
from plymix.cli import screen
from plymix.errors import PlymixError, Refusal, also, listed, nearest, unknown

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

COMMANDS: dict[str, tuple[str, str]] = {
    "mbw": ("merging:mbw", "Merge two models by blocks; numbers are the share of model 1."),
    "merge": ("merging:merge", "Merge two models; alpha is the share of the second, B."),
    "explain": ("merging:explain", "Show what a merge or a recipe would do; nothing is written."),
    "run": ("recipes:run", "Run a recipe (TOML) into a file or folder."),
    "convert": ("converting:convert", "Write a model in another container, layout or dtype."),
    "replay": ("recipes:replay", "Make a result again from the recipe in it, byte for byte."),
    "verify": ("recipes:verify", "Tell whether a result is what its recipe says."),
    "recipe show": ("recipes:show", "Print the recipe that a result carries."),
    "recipe import": ("recipes:import_", "Turn another tool's record of a merge into a recipe."),
    "lora bake": ("loras:bake", "Add LoRAs to a model, in one pass, exactly."),
    "lora inspect": ("loras:inspect", "Show what a LoRA is, holds and fits."),
    "lora merge": ("lora_files:merge", "Write one LoRA that does what several do together."),
    "lora extract": ("lora_files:extract", "Write the LoRA that makes one model of another."),
    "lora resize": ("lora_files:resize", "Write a LoRA with other ranks."),
    "lora convert": ("lora_files:convert", "Write a LoRA in another program's spelling."),
    "compare": ("pictures:compare", "Draw merges side by side, without writing a checkpoint."),
    "blocks": ("pictures:blocks", "Find out which block does what, by pictures."),
    "diff": ("comparing:diff", "Tell how far two models are from each other."),
    "extract": ("upkeep:extract", "Write one component of a model into a file of its own."),
    "prune": ("upkeep:prune", "Write a model without what only training needs."),
    "repair": ("upkeep:repair", "Put right what is broken in a model, and nothing else."),
    "inspect": ("looking:inspect", "Show what a model file is and holds."),
    "check": ("looking:check", "Look for damage: NaN, infinities, zeros, bad position ids."),
    "presets": ("looking:presets", "List the block weight presets, or draw one."),
    "methods": ("looking:methods", "List the merge methods, or explain one."),
    "archs": ("architectures:archs", "List the architectures, or one's blocks and components."),
    "doctor": ("looking:doctor", "Test this installation, processor and disk."),
}
"""Command -> (module of this package and function, first line of its help)."""


def main() -> int:
    """The console script `plymix`."""
    return _left(_entry(sys.argv[1:]))


def main_mbw() -> int:
    """The console script `merge_block_weighted`: `plymix mbw` under its old name."""
    return _left(_entry(["mbw", *sys.argv[1:]], prog="merge_block_weighted"))


def _left(code: int) -> int:
    """End the process now: to take a large plan apart value by value costs as much as to draw it.

    Everything that must be finished is by then. Where a stream cannot be flushed, Python's own end
    says so.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return code
    os._exit(code)


def _entry(words: Sequence[str], prog: str = "") -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # plymix has threads of its own, and results stay the same
    gc.set_threshold(1_000_000)  # a plan is tens of thousands of values without a cycle
    stops.once()
    return run(words, prog)


def run(words: Sequence[str], prog: str = "") -> int:
    """Carry out one command line and give its exit code. Errors are shown, never raised."""
    screen.prepare()
    try:
        code = _dispatch(words, prog)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _silence()
        return 1
    except BaseException as e:
        return _failed(e, "--json" in words)


def _dispatch(words: Sequence[str], prog: str) -> int:
    asked = words[1:] if words and words[0] in _groups() else words  # half a command
    if not asked or asked[0] in ("--help", "-h", "help"):
        screen.put(overview())
        return 0
    if words[0] in ("--version", "-V"):
        from plymix import __version__

        screen.put(f"plymix {__version__}")
        return 0
    name = next((n for n in COMMANDS if list(words[: n.count(" ") + 1]) == n.split()), None)
    if name is None:
        raise _no_command(words)
    import cyclopts

    parser, rest = app(name, prog), words[name.count(" ") + 1 :]
    try:
        found = parser(rest)
    except cyclopts.CycloptsError as e:
        raise Refusal(also(_misread(e, parser, rest), f"see {parser.name[0]} --help")) from None
    return found if isinstance(found, int) else 0


def _misread(error: CycloptsError, parser: App, words: Sequence[str]) -> str:
    """What is wrong with a command line, in our words where the parser's would mislead."""
    from cyclopts import UnknownOptionError, UnusedCliTokensError

    known = [name for a in parser.assemble_argument_collection() for name in a.names]
    if isinstance(error, UnknownOptionError):
        word = error.token.keyword or error.token.value
        bare = {name.lstrip("-"): name for name in reversed(known)}
        near = nearest(word.lstrip("-"), bare)
        return f"unknown option {word}" + (f": did you mean {bare[near[0]]}?" if near else "")
    if isinstance(error, UnusedCliTokensError):
        # -output was read as -o utput, and what follows it is left over
        for word, name in product(words, known):
            if len(word) > 2 and name.startswith(f"-{word}"):
                return f"unknown option {word}: did you mean {name}?"
        return f"too many arguments: {listed(error.unused_tokens or [])}"
    return str(error).strip().rstrip(".")


def app(name: str, prog: str = "") -> App:
    """The parser of one command. Its function gives the exit code, or None for 0."""
    from cyclopts import App, Parameter

    module, function = COMMANDS[name][0].split(":")
    home = import_module(f"plymix.cli.{module}")
    command = getattr(home, function)
    made = App(
        name=prog or f"plymix {name}",
        help=_paragraphs(command.__doc__ or ""),
        help_format="plaintext",
        help_epilogue=home.EXAMPLES[name].replace("PROG", prog or f"plymix {name}"),
        version_flags=[],
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    made["--help"].show = False
    made.default(command)
    return made


def _paragraphs(doc: str) -> str:
    """A docstring with one line per paragraph, for the terminal to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in doc.split("\n\n"))


def _groups() -> dict[str, list[str]]:
    """First words of commands that have two, and the second ones."""
    found: dict[str, list[str]] = {}
    for first, _, second in (name.partition(" ") for name in COMMANDS if " " in name):
        found.setdefault(first, []).append(second)
    return found


def _no_command(words: Sequence[str]) -> Refusal:
    if (known := _groups().get(words[0])) is not None:
        return unknown(f"{words[0]} command", " ".join(words[1:2]), known)
    if words[0].startswith("-"):
        return Refusal(f"{words[0]} comes before a command; see plymix --help")
    return unknown("command", words[0], COMMANDS, help="see plymix --help")


def overview() -> str:
    """The help of `plymix` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "plymix merges diffusion checkpoints layer by layer.",
            "",
            "Usage: plymix COMMAND ...",
            "",
            *lines,
            "",
            "plymix COMMAND --help tells all about one. plymix --version tells the version.",
        ]
    )


def _failed(error: BaseException, as_json: bool) -> int:
    """Show an error in one or two lines; its exit code."""
    text, code = _told(error)
    screen.error(text)
    if os.environ.get("PLYMIX_DEBUG") == "1":
        import traceback

        screen.put("".join(traceback.format_exception(error)), sys.stderr)
    if as_json:
        try:
            screen.put_json({"error": text, "exit_code": code})
            sys.stdout.flush()
        except BrokenPipeError:
            _silence()
    return code


def _told(error: BaseException) -> tuple[str, int]:
    match error:
        case PlymixError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return str(error) or "stopped; nothing was written", 130
        case OSError():
            name = f": {error.filename}" if error.filename is not None else ""
            return f"{error.strerror or error}{name}", 1
        case MemoryError():
            return "out of memory; nothing was written", 1
        case SystemExit(code=int(code)):
            return "stopped", code
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"internal error ({what}); please report it, with what PLYMIX_DEBUG=1 adds", 1


def _silence() -> None:
    """Whoever read stdout has gone: let Python's last flush go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
