"""`recurx.patch`: run the recursion of official TRM / HRM code, nano-trm's or lucidrains'.

    handle = recurx.patch(model)      # a module, however wrapped, a class, or an imported module
    print(handle.report)              # what was swapped, what was not, and why
    handle.remove()                   # or use the handle as a context manager

Only one method of one submodule is replaced, by a class derived from its own: parameters, buffers
and `state_dict` are untouched, and a copy runs its own weights. Code is recognised by its
structure, never by its name; its nets are proved (recurx/proof.py), and the whole is compared with
the original on a small random batch before the swap, in training and evaluation. Where the code
changes later, the model's own code runs, with a `RecurxWarning`, until `handle.refresh()`. A pickle
of a patched model holds the unpatched one, and loads without recurx.
"""

from recurx.patching.handle import Entry, PatchHandle, Report
from recurx.patching.install import patch

__all__ = ["Entry", "PatchHandle", "Report", "patch"]
