"""`python -m qlib`: the same as the command `qlib`."""

import sys

from qlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
