"""The start of every Python process here: python -m bench.gpu_check.child MODULE ARGUMENT...

SIGINT makes it write the traceback of every thread at once, from C, so that a process which waits
for the GPU says where. What RECURX_GPU_CHECK_IMPORT names is imported first: tests put a double in
the GPU's place that way.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import runpy
import signal
import sys

IMPORT = "RECURX_GPU_CHECK_IMPORT"
ABSENT, NO_GPU = 77, 78  # exit codes: this build or machine lacks what the phase is about


def main() -> None:
    errors = os.fdopen(os.dup(2), "w")  # pytest puts others in the place of 1 and 2
    faulthandler.enable(errors)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    faulthandler.register(signal.SIGINT, errors, all_threads=True, chain=True)
    for module in filter(None, os.environ.get(IMPORT, "").split(",")):
        importlib.import_module(module)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
