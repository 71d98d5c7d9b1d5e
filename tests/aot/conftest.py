"""Make the folders beside this one importable: the PTX tests use the compilers of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
