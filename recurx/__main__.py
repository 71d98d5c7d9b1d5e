"""`python -m recurx`: see `recurx.commands`."""

import sys

from recurx.commands import main

if __name__ == "__main__":
    sys.exit(main())
