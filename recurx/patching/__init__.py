"""`recurx.patch`: run the recursion of official TRM / HRM code, or lucidrains', on recurx.

    handle = recurx.patch(model)      # a module, however wrapped, a class, or an imported module
    print(handle.report)              # what was swapped, what was not, and why
    handle.remove()                   # or use the handle as a context manager

Only one method of one submodule is replaced, bound with `types.MethodType`: parameters, buffers and
`state_dict` are untouched, and a deep copy (EMA) runs its own weights. Code is recognised by its
structure, never by its name, and compared with the original on a small random batch before the
swap. A pickle of a patched model holds the unpatched one, and loads without recurx.
"""

from recurx.patching.handle import Entry, PatchHandle, Report
from recurx.patching.install import patch

__all__ = ["Entry", "PatchHandle", "Report", "patch"]
