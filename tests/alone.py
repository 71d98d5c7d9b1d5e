"""Files of tests in a process of their own: those that send it signals, or fork it.

Triton's compiler, once it has run, leaves LLVM's handlers and its stack for them: a crash then says
nothing (SIGSEGV), and what Python ignores ends the process (SIGXFSZ).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def passes(file: str) -> None:
    """Run the tests of a file whose name pytest does not collect by itself."""
    line = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    environ = {name: text for name, text in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [*line, f"tests/{file}"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
