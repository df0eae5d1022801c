"""`python -m plymix` is the command `plymix`."""

import sys

from plymix.cli import main

if __name__ == "__main__":
    sys.exit(main())
