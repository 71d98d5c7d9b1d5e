"""`recurx.profile`: where one step of a recursive model spends its time, by domain.

    profile = recurx.profile(model, batch)        # official code as it is, patched, or recurx's own
    print(profile)                                # net calls, block stages, loss, optimiser, syncs
    profile.save_html("profile.html")             # one file, no network
    profile.save_trace("trace.json")              # ui.perfetto.dev

Files, in the order of the data: `step.py` (what runs), `roles.py` (in which part of
the model), `wrapped.py`, `fused.py` and `tracer.py` (the trace, `records.py`), `counts.py` (FLOPs,
bytes, syncs), `attribute.py` (operator -> stage), `kernels.py` (CUDA), `result.py` and `tables.py`
(the numbers), `advice.py`; then what shows them: `trace.py`, `roofline.py`, `report.py` with its
templates; `run.py` puts it together.
"""

from recurx.bench.profiler.nvtx import nvtx_ranges
from recurx.bench.profiler.report import Profile
from recurx.bench.profiler.run import profile
from recurx.bench.profiler.tracer import stage

__all__ = ["Profile", "nvtx_ranges", "profile", "stage"]
