"""The console scripts, and `python -m plymix`: the command line, once it is imported.

Importing it takes a moment, in which Ctrl-C ends as quietly as it does later.
"""

import sys


def main() -> int:
    """The console script `plymix`."""
    return _called("main")


def main_mbw() -> int:
    """The console script `merge_block_weighted`."""
    return _called("main_mbw")


def _called(name: str) -> int:
    try:
        from plymix import cli

        code: int = getattr(cli, name)()
    except KeyboardInterrupt:
        sys.stderr.write("plymix: stopped\n")
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
