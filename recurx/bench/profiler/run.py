"""`recurx.profile`: time steps, trace one, measure the ceilings, put it together."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurx.bench.profiler import advice, kernels, result, step, tables
from recurx.bench.profiler.attribute import NET_STAGES, PRODUCTS, resolve
from recurx.bench.profiler.ceilings import Ceilings
from recurx.bench.profiler.records import Trace, best_of
from recurx.bench.profiler.report import Profile
from recurx.bench.profiler.roles import roles_of
from recurx.bench.profiler.tracer import Tracer, stage
from recurx.errors import bad_argument
from recurx.measure import seconds_of, synchronize
from recurx.patching.handle import PatchHandle

ROUNDS = 5  # untraced steps whose median is the step's time
TRACES, TRACE_SECONDS = 3, 3.0  # traced steps, of which each operator's shortest time counts


def profile(
    model: nn.Module,
    batch: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int = 1,
    carry: Any = None,
    train: bool = False,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ema: Any = None,
    run: Callable[[], Any] | None = None,
    halting_steps: int = 16,
    compare: bool = True,
    seconds: float = 12.0,
    timeline: Iterable[dict[str, Any]] | None = None,
    script: str = "python your_script.py",
) -> Profile:
    """Profile one step of a recursive model by domain: net calls, block stages, loss, optimiser.

    Works on official TRM / HRM code as it is, on patched code, on recurx's models, on CPU and GPU.
    Nothing is left in the model: flags, random state and, with `train`, weights, gradients and
    optimiser state are put back.

    Args:
        model: an ACT wrapper, a loss head around it, or a bare inner module. A compiled module is
            profiled as the module that it wraps.
        batch: {"inputs": [B, seq_len], ...} as the model takes it; None draws a random one of
            `batch_size` samples from `model.config`.
        carry: where to start; None for the model's own initial carry.
        train: a training step (forward, loss, backward, `optimizer`, `ema`) instead of a
            supervision step without gradient. An ACT wrapper gets recurx's loss head.
        optimizer: one or several, stepped and zeroed in a training step; with `run`, those that
            it steps.
        ema: anything with `update(model)`, called at the end of a training step; with `run`, the
            one that it calls.
        run: your own step, called without arguments and run as it is (some ten times); it may
            train, and what it changes stays changed. Ranges of your own:
            `from recurx.bench.profiler import stage`.
        halting_steps: steps of deep supervision for the histogram of halting; fewer if `seconds`
            are over.
        compare: patch the model for a moment and time the same step on recurx.
        seconds: for the untraced steps; the trace, the ceilings and the comparison come on top.
        timeline: phases inside a kernel, see `Profile.add_timeline`; None records those of the
            CUDA engine, where its kernels were built to tell them.
        script: what the Nsight command lines run.

    Returns:
        A `Profile`: print it, or `.save_html`, `.save_trace`, `.save_json`, `.to_dict`.

    Raises:
        InvalidArgument: no batch or carry can be made for this model, or it returns no loss.
    """
    if not isinstance(model, nn.Module):
        raise bad_argument("profile", "model", "a torch module", type(model).__name__)
    if train and run is not None:
        raise bad_argument("profile", "train", "False with run=", True, "Your run= is the step.")
    if ema is not None and not hasattr(ema, "update"):
        raise bad_argument("profile", "ema", "an object with update(model)", type(ema).__name__)
    notes: list[str] = []
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
        notes.append("torch.compile was set aside: the module that it wraps is profiled.")
    device = step.device_of(model)
    given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers: list[Any] = [one for one in given if one is not None]
    mode = None if run is not None else train
    with (
        step.undisturbed(model, mode, optimizers if train else (), ema, train),
        PatchHandle() as handle,
    ):
        # Hooks see an optimiser's step, unless its instance got another (`recurx.train.swap`);
        # nothing else sees an average.
        for one in optimizers:
            handle.put(one, "step", stage("optimizer")(one.step))
        if ema is not None:
            handle.put(ema, "update", stage("ema")(ema.update))
        if run is None:
            batch = step.random_batch(model, batch_size) if batch is None else batch
            carry = step.initial_carry(model, batch) if carry is None else carry
            if train:
                todo = step.training_step(model, batch, carry, optimizers, ema)
            else:
                todo = step.supervision_step(model, batch, carry)
        else:
            todo = step.Step(model, "step", run)
        samples = batch_size if batch is None else len(next(iter(batch.values()))) or batch_size
        times = _timed(todo, device, seconds, halting_steps)
        trace, events = _traced(todo, device)
        times += _timed(todo, device, 0.0, 0)  # one more, so that a drift shows
        resolve(trace)
        ceilings = Ceilings.of(device, _dtype(model))
        made = _assemble(todo, trace, times, events, ceilings, device, samples)
        casts = sum(o.bytes for o in trace.ops if o.name == "_to_copy" and o.stage in PRODUCTS)
        measured = advice.Measured(made.ms, made.rows, casts)
        training = train or run is not None
        parts = [todo.model, *optimizers, *([] if ema is None else [ema])] if training else []
        said = advice.advise(model, todo, measured, samples, training, compare, parts)
        if timeline is None:
            timeline = _engine_timeline(todo, trace, device)
    made.advice, made.predicted_ms, made.patched_ms = vars(said).values()
    top = max(made.rows, key=lambda row: row.ms, default=result.empty_row("other"))
    made.commands = kernels.commands(script, events, top.label)
    made.notes = notes + _notes(made, device)
    if timeline is not None:
        made.add_timeline(timeline)
    return made


def _timed(todo: step.Step, device: torch.device, seconds: float, halting: int) -> list[float]:
    """Milliseconds of untraced steps: after one to warm up, `ROUNDS`, more for the halting
    histogram, fewer when `seconds` are over; one without warm-up for `seconds` of 0."""
    until, times = time.perf_counter() + seconds, []
    warm = seconds > 0
    wanted = max(ROUNDS, halting - 1) if warm else 1
    while len(times) < wanted:
        took = seconds_of(todo.run_and_count if todo.steps < halting else todo, device)
        late = time.perf_counter() >= until
        if warm and not late:
            warm = False  # the first step allocates, packs weights, tunes
        else:
            times.append(1e3 * took)
        if late:
            break
    return times


def _traced(todo: step.Step, device: torch.device) -> tuple[Trace, list[Any]]:
    """A traced step, and with CUDA its kernels."""
    roles = roles_of(todo.model)
    # The first dispatch mode of a process imports much of torch: not inside a traced step.
    Tracer(roles).record(nn.Identity(), lambda: torch.zeros(1, device="cpu").add_(1))
    if device.type != "cuda":
        until, traces = time.perf_counter() + TRACE_SECONDS, []
        while len(traces) < TRACES and (not traces or time.perf_counter() < until):
            traces.append(Tracer(roles).record(todo.model, todo))
        return best_of(traces), []
    tracer = Tracer(roles, annotate=True)
    trace, events = kernels.record(lambda: tracer.record(todo.model, todo))
    return trace, kernels.attach(events, trace.ops)


def _engine_timeline(
    todo: step.Step, trace: Trace, device: torch.device
) -> list[dict[str, Any]] | None:
    """What the kernels of backend "cuda" record of one more step; None if they record nothing."""
    if not any(op.split is not None and op.split.backend == "cuda" for op in trace.ops):
        return None
    from recurx import backends

    engine: Any = backends.get("cuda")
    library = engine.library()
    if library is None or not library.has_timeline:
        return None
    with engine.timeline() as recorded:
        todo()
        synchronize(device)
    return recorded.events  # type: ignore[no-any-return]


def _assemble(
    todo: step.Step, trace: Trace, times: list[float], events: list[Any], ceilings: Any,
    device: torch.device, samples: int,
) -> Profile:  # fmt: skip
    total, ops = statistics.median(times), trace.ops
    ms, overhead = tables.operator_ms(trace, total)
    idle = 0.0
    if events:  # a GPU: stages are the time of their kernels, the rest is waiting for the host
        ms = [sum(us for _, us in op.kernels) * 1e-3 for op in ops]
        idle = max(0.0, total - sum(us for _, _, us in events) * 1e-3)
    return Profile(
        title=type(todo.model).__name__,
        kind=todo.kind,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        dtype=str(_dtype(todo.model)).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch=samples,
        versions={"torch": torch.__version__, "python": platform.python_version()},
        step_ms=times,
        traces=trace.steps,
        traced_ms=trace.wall * 1e-6,
        lost_ms=trace.lost * 1e-6,
        overhead_us=overhead,
        rows=tables.make_rows(ops, ms, total, ceilings, events),
        calls=tables.make_calls(ops, ms),
        syncs=tables.make_syncs(ops),
        engines=tables.make_engines(ops, ms),
        launches=len(events) if events else sum(not op.free for op in ops),
        operators=len(ops),
        idle_ms=idle,
        ceilings=ceilings,
        halting=dict(sorted(todo.halted.items())),
        halting_open=todo.still_open,
        halting_steps=todo.steps,
        ops=ops,
        kernel_events=events,
    )


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the states: that of the configuration, or of the parameters."""
    name = getattr(step.model_config(model), "forward_dtype", None)
    if isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)  # type: ignore[no-any-return]
    parameter = next(model.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def _notes(made: Profile, device: torch.device) -> list[str]:
    notes = []
    other = made.row("other").share
    if other > 0.05:
        notes.append(
            f"{other:.0%} of the step is in no known stage; name your own ranges with "
            "`from recurx.bench.profiler import stage`."
        )
    if device.type == "cuda" and not made.kernel_events:
        notes.append("torch.profiler recorded no kernel (no CUPTI?): stage times are the host's.")
    if device.type == "cpu":
        notes.append("Bytes are those of the operators; caches may serve them, so GB/s and "
                     "'of roof' can exceed the copy bandwidth.")  # fmt: skip
    if not any(row.name in NET_STAGES for row in made.rows):
        notes.append("No recursion that recurx knows was found: stages are the model's children.")
    return notes
