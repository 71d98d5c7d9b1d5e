"""`python -m recurx`: see `recurx.cli`."""

import sys

from recurx.cli import main

if __name__ == "__main__":
    sys.exit(main())
