"""The numbers: sums, work, host syncs, halting, advice, traces; and that nothing is left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as module_hooks

import recurx
from recurx import backends, reference
from recurx.bench.profiler import counts, fused, nvtx_ranges
from recurx.bench.profiler.attribute import resolve
from recurx.bench.profiler.kernels import attach, commands
from recurx.bench.profiler.records import Op, Trace
from recurx.bench.profiler.result import Timeline
from recurx.bench.profiler.roles import roles_of
from recurx.bench.profiler.step import initial_carry, random_batch, supervision_step
from recurx.bench.profiler.tables import make_rows, operator_ms
from recurx.bench.profiler.trace import chrome_trace
from recurx.bench.profiler.tracer import Tracer
from recurx.errors import InvalidArgument
from recurx.models import TRM, TRMConfig
from recurx.train import AdamATan2, Average
from tests import lookalike
from tests.bench.profiler.profile_cases import build, profile

EVENTS = [
    {"owner": 1, "call": 0, "block": 0, "phase": "qkv", "start_ns": 1000, "end_ns": 3000},
    {"owner": 0, "call": 0, "block": 0, "phase": "qkv", "start_ns": 500, "end_ns": 2500},
    {"owner": 0, "call": 0, "block": 0, "phase": "attention", "start_ns": 2500, "end_ns": 4500},
]


def tiny(**fields: Any) -> TRM:
    torch.manual_seed(0)
    return TRM(TRMConfig.tiny(7, 9, H_cycles=2, L_cycles=2, **fields), backend="eager")


def short(model: Any, **arguments: Any) -> Any:
    arguments = {"compare": False, "seconds": 0.05, "halting_steps": 0, "batch_size": 2} | arguments
    return recurx.profile(model, **arguments)


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_stages_add_up_to_the_step(train: bool) -> None:
    found = short(tiny(batch_size=2), train=train)
    assert sum(row.ms for row in found.rows) == pytest.approx(found.ms, rel=0.05)
    assert sum(row.share for row in found.rows) == pytest.approx(1, rel=0.05)
    for row in found.rows:
        assert row.ms == pytest.approx(row.forward_ms + row.backward_ms)


def unaccounted(trace: Trace) -> float:
    """Share of the traced step that is neither in an operator nor in the tracer's books."""
    return abs(trace.wall - sum(op.ns for op in trace.ops) - trace.lost) / trace.wall


def test_a_trace_that_loses_the_time_between_operators_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append = Tracer._append

    def lossy(self: Tracer, op: Op) -> None:
        op.start = op.end - op.run
        append(self, op)

    monkeypatch.setattr(Tracer, "_append", lossy)
    model = tiny()
    batch = random_batch(model, 2)
    step = supervision_step(model.eval(), batch, initial_carry(model, batch))
    assert unaccounted(Tracer(roles_of(model)).record(model, step)) > 0.05


def test_the_trace_accounts_for_the_time_of_the_step() -> None:
    """Against a clock outside the tracer: all of the traced step is in operators or in its books,
    and work that no operator does (a sleep) is not lost."""
    model = tiny()
    batch = random_batch(model, 2)
    step = supervision_step(model.eval(), batch, initial_carry(model, batch))

    def slow() -> None:
        step()
        time.sleep(0.05)
        step()

    begin = time.perf_counter_ns()
    trace = Tracer(roles_of(model)).record(model, slow)
    outside = time.perf_counter_ns() - begin
    assert trace.wall == pytest.approx(outside, rel=0.05)
    assert unaccounted(trace) < 0.05
    for before, op in itertools.pairwise(trace.ops):
        assert op.start == before.end  # a partition: no gap, no overlap
    resolve(trace)
    assert max(trace.ops, key=lambda op: op.ns).ns > 0.04e9  # the sleep went to the next operator


def test_the_overhead_of_the_trace_is_taken_out() -> None:
    model = tiny()
    batch = random_batch(model, 2)
    step = supervision_step(model.eval(), batch, initial_carry(model, batch))
    trace = Tracer(roles_of(model)).record(model, step)
    traced = sum(trace.ns) * 1e-6
    ms, overhead = operator_ms(trace, traced / 2)
    assert sum(ms) == pytest.approx(traced / 2) and min(ms) >= 0
    assert overhead == pytest.approx(1e3 * traced / 2 / len(ms))
    ms, overhead = operator_ms(trace, traced * 2)  # a noisy machine: nothing to take out
    assert sum(ms) == pytest.approx(traced * 2) and overhead == 0


def test_nothing_is_left_behind() -> None:
    """The overhead outside the traced section is nil: no hook, no wrapper, no patch remains."""
    model = build("trm").train()
    functions = {name: getattr(reference, name) for name in ("run", "call", "block", "linear")}
    scope = dict(type(model.model.inner.L_level.layers[0].self_attn).forward.__globals__)
    profile(model, compare=True, seconds=0.05)
    assert not module_hooks._global_forward_hooks and not module_hooks._global_forward_pre_hooks
    assert all(getattr(reference, name) is f for name, f in functions.items())
    assert dict(type(model.model.inner.L_level.layers[0].self_attn).forward.__globals__) == scope
    assert model.training and all(module.training for module in model.modules())
    assert "forward" not in vars(model.model.inner)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    model = tiny()

    def step() -> None:
        model.inner.lm_head(torch.ones(2, 3))  # wrong width

    with pytest.raises(RuntimeError):
        Tracer(roles_of(model)).record(model, step)
    assert not module_hooks._global_forward_hooks and not module_hooks._global_forward_pre_hooks
    short(model)


# ---- work, syncs --------------------------------------------------------------------------------


def test_work_is_that_of_the_cost_model() -> None:
    from recurx.models import problem_of_model
    from recurx.plan.count import step_stages

    model = tiny()
    found = short(model)
    expected = {s.name: s.flops for s in step_stages(problem_of_model(model, 2))}
    for name in ("qkv", "o", "gate_up", "down"):
        assert found.row(name).flops == expected[name]
    assert found.row("attention").flops == pytest.approx(expected["attention"], rel=0.2)
    rows, inner = 2 * model.config.tokens, model.config.inner_width(64)
    moved = 12 * 4 * (rows * 64 + 64 * 2 * inner + rows * 2 * inner)  # fp32: in, weight, out
    assert found.row("gate_up").bytes == moved


def test_bytes_count_a_broadcast_once() -> None:
    assert counts.nbytes(torch.zeros(1, 8).expand(100, 8)) == 32
    assert counts.work("add", (torch.zeros(4, 4), torch.zeros(1, 1).expand(4, 4)), {},
                       torch.zeros(4, 4)) == (16.0, 64 + 4 + 64)  # fmt: skip


def test_host_syncs_are_found_with_their_place() -> None:
    model = tiny()
    batch = random_batch(model, 2)
    inner = supervision_step(model.eval(), batch, initial_carry(model, batch))
    x = torch.arange(6.0)

    def step() -> None:
        inner()
        if (x > 2).any():  # sync: bool
            x.sum().item()  # sync: item
        x.nonzero()  # sync: nonzero
        x.unique()  # sync: unique
        x[x > 3]  # sync: mask
        x.add(1)

    found = recurx.profile(model, run=step, seconds=0.05, halting_steps=0, compare=False)
    kinds = sorted(sync.text.partition("# sync: ")[2] for sync in found.syncs)
    assert kinds == ["bool", "item", "mask", "nonzero", "unique"]
    assert all(sync.count == 1 and __file__ in sync.place for sync in found.syncs)
    assert not short(model).syncs  # the model's own step has none
    assert "# sync: unique" in str(found)


def test_syncs_in_inference_mode_and_composite_operators() -> None:
    """Inference mode hands composite operators to a dispatch mode whole."""
    model = build("trm")
    carry, batch = lookalike.inputs(model)

    @torch.inference_mode()
    def step() -> None:
        model(carry, batch)
        bool(batch["inputs"].any())

    found = recurx.profile(model, run=step, seconds=0.05, halting_steps=0, compare=False)
    assert found.row("qkv").flops == profile(model).row("qkv").flops
    assert [sync.count for sync in found.syncs] == [1]


# ---- halting, advice, ceilings ------------------------------------------------------------------


def test_halting_histogram() -> None:
    model = tiny(halt_max_steps=4)
    with torch.no_grad():
        model.inner.q_head.bias.fill_(3.0)
    found = short(model, seconds=5.0, halting_steps=4, batch_size=3)
    assert found.halting == {1: 3} and found.halting_open == 0
    with torch.no_grad():
        model.inner.q_head.bias.fill_(-3.0)
    found = short(model, seconds=5.0, halting_steps=4, batch_size=3)
    assert not found.halting and found.halting_open == 3
    assert "later" in str(found)


def test_advice_names_what_would_be_replaced_and_measures_it() -> None:
    model = build("trm")
    found = profile(model, compare=True, seconds=0.2)
    text = "\n".join(found.advice)
    assert "would replace the recursion (trm(2, 2), 6 net calls)" in text
    assert "Predicted" in text and "Measured here: on recurx" in text
    assert "not patched, runs on PyTorch" in text  # recurx.explain
    refused = profile(build("trm", frozenset({"scaled residual"})), compare=True)
    assert any("off by" in line for line in refused.advice)
    assert not any("Measured here" in line for line in refused.advice)


def test_advice_swaps_the_rest_of_a_training_step() -> None:
    model = tiny(batch_size=2)
    optimizer, average = AdamATan2(model.parameters()), Average(model)
    found = short(model, train=True, optimizer=optimizer, ema=average, compare=True)
    text = "\n".join(found.advice)
    assert "recurx.train.swap would replace the inside of ACTLossHead (" in text
    assert "with the recursion on recurx as well" in text
    assert "step" not in vars(optimizer) and "update" not in vars(average)
    assert model.inner.backend == "eager"


def test_an_optimiser_with_a_step_of_its_own_is_still_the_optimiser() -> None:
    """`recurx.train.swap` replaces `step` in the instance, where torch's hooks do not see it."""
    model = tiny(batch_size=2)
    optimizer = AdamATan2(model.parameters())
    function = optimizer.step
    optimizer.step = lambda: torch.zeros(3).add_(1)  # type: ignore[method-assign]
    found = short(model, train=True, optimizer=optimizer)
    assert [o.name for o in found.ops if o.stage == "optimizer"] == ["zeros", "add_"]
    assert optimizer.step is not function and vars(optimizer)["step"].__name__ == "<lambda>"


def test_ceilings_bound_the_stages() -> None:
    found = short(tiny())
    assert found.ceilings.gbs > 0.1 and found.ceilings.tflops["float32"] > 0
    row = found.row("gate_up")
    seconds = found.ceilings.bound(row.flops, row.bytes)
    assert row.of_roof == pytest.approx(seconds / (row.ms * 1e-3))
    assert row.tflops == pytest.approx(row.flops / row.ms / 1e9)


# ---- files --------------------------------------------------------------------------------------


def check_nesting(events: list[dict[str, Any]]) -> None:
    """Ranges of one track nest or are apart."""
    open_ends: list[float] = []
    for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_ends and open_ends[-1] <= e["ts"] + 1e-6:
            open_ends.pop()
        assert not open_ends or e["ts"] + e["dur"] <= open_ends[-1] + 1e-6, e
        open_ends.append(e["ts"] + e["dur"])


def test_ranges_that_overlap_are_seen() -> None:
    with pytest.raises(AssertionError):
        check_nesting([{"ts": 0.0, "dur": 2.0}, {"ts": 1.0, "dur": 2.0}])


def test_trace_nests_and_names_the_domain(tmp_path: Path) -> None:
    found = profile(build("trm"), train=True)
    found.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "range"]
    operators = [e for e in events if e.get("cat") == "operator"]
    check_nesting(ranges)
    names = {e["name"] for e in ranges}
    assert {"training step", "backward", "cycle 1", "call 5: net L", "block 1", "RoPE"} <= names
    (step,) = [e for e in ranges if e["name"] == "training step"]
    assert all(step["ts"] - 1e-6 <= e["ts"] for e in operators)
    assert sum(e["name"] == "call 0: net L" for e in ranges) == 1
    assert len(operators) == len(found.ops)
    leaves = sum(e["dur"] for e in ranges if e["name"] in {r.label for r in found.rows})
    assert leaves == pytest.approx(step["dur"], rel=1e-6)


def test_timeline_of_the_cuda_engine_in_the_same_trace() -> None:
    found = short(TRM(TRMConfig.tiny(7, 9), backend="cpu"), timeline=EVENTS)
    events = [e for e in chrome_trace(found)["traceEvents"] if e.get("cat") == "phase"]
    assert [(e["tid"], e["name"], e["dur"]) for e in events] == [
        (0, "qkv", 2.0), (0, "attention", 2.0), (1, "qkv", 2.0)
    ]  # fmt: skip
    recursion = next(
        e for e in chrome_trace(found)["traceEvents"] if e["name"] == "recurx::recurse"
    )
    assert events[0]["ts"] == pytest.approx(recursion["ts"])  # starts with its op
    assert found.to_dict()["timeline"] == {
        "owners": 2, "span_ms": 0.004,
        "phases_ms": {"qkv": 0.002, "attention": 0.001, "(between phases)": pytest.approx(0.001)},
    }  # fmt: skip
    assert "2 owners" in str(found)


def test_timeline_is_recorded_where_the_cuda_engine_tells_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for the backend: one more step runs inside its `timeline()`."""
    model = TRM(TRMConfig.tiny(7, 9), backend="cpu")
    inside: list[bool] = []

    class Engine:
        open, device_types = False, ("cuda",)

        def runs_on(self, device_type: str) -> bool:
            return False  # for recurx.explain

        def library(self) -> Any:
            return type("Library", (), {"has_timeline": True})

        @contextlib.contextmanager
        def timeline(self) -> Iterator[Any]:
            self.open = True
            yield type("Recorded", (), {"events": [e | {"sample": 2} for e in EVENTS]})
            self.open = False

    engine = Engine()
    real = backends.get
    monkeypatch.setattr(backends, "get", lambda name: engine if name == "cuda" else real(name))
    monkeypatch.setattr(fused, "_resolve", lambda *_: "cuda")
    batch = random_batch(model, 2)
    todo = supervision_step(model.eval(), batch, initial_carry(model, batch))

    def step() -> None:
        inside.append(engine.open)
        todo()

    found = recurx.profile(model, run=step, seconds=0.05, halting_steps=0, compare=False)
    assert inside.count(True) == 1 and found.timeline is not None
    assert len(found.timeline.events) == 3
    phases = [e for e in chrome_trace(found)["traceEvents"] if e.get("cat") == "phase"]
    assert phases[0]["args"] == {"call": 0, "block": 0, "sample": 2}


def test_a_bad_timeline_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="without phase"):
        Timeline.of([{k: v for k, v in EVENTS[0].items() if k != "phase"}])
    with pytest.raises(InvalidArgument, match="end_ns >= start_ns"):
        Timeline.of([EVENTS[0] | {"end_ns": 0}])


def test_json_holds_all_numbers(tmp_path: Path) -> None:
    found = profile(build("hrm"))
    found.save_json(tmp_path / "profile.json")
    read = json.loads((tmp_path / "profile.json").read_text())
    assert read["ms"] == found.ms and len(read["calls"]) == 6
    assert {row["name"]: row["ms"] for row in read["rows"]} == {r.name: r.ms for r in found.rows}
    assert read["ceilings"]["gbs"] == found.ceilings.gbs


# ---- GPU paths, with stand-ins ------------------------------------------------------------------


class Event:
    """What the code reads of torch.profiler's FunctionEvent."""

    def __init__(self, name: str, parent: Any = None, kernels: Any = (), device: str = "CPU",
                 start: float = 0.0, end: float = 1.0) -> None:  # fmt: skip
        self.name, self.cpu_parent, self.device_type = name, parent, f"DeviceType.{device}"
        self.kernels = [type("Kernel", (), {"name": n, "duration": us}) for n, us in kernels]
        self.time_range = type("Range", (), {"start": start, "end": end})


def test_kernels_find_their_operator() -> None:
    found = profile(build("trm"))
    mark = Event("recurx#3")
    launch = Event("cudaLaunchKernel", Event("aten::mm", mark), [("gemm<128>", 7.0)])
    stray = Event("aten::add", None, [("add", 1.0)])
    device = Event("gemm<128>", device="CUDA", start=110.0, end=117.0)
    annotation = Event("recurx#3", device="CUDA", start=110.0, end=117.0)
    step = Event("recurx::step", start=100.0, end=200.0)
    kernels = attach([step, mark, launch, stray, device, annotation], found.ops)
    assert kernels == [("gemm<128>", 10.0, 7.0)]
    assert found.ops[3].kernels == [("gemm<128>", 7.0)]
    assert not found.ops[2].kernels
    ms = [0.007 if op.kernels else 0.0 for op in found.ops]
    rows = make_rows(found.ops, ms, 1.0, found.ceilings, [*kernels, ("flash", 50.0, 3.0)])
    other = next(row for row in rows if row.name == "other")
    assert sum(row.launches for row in rows) == 2 and other.launches == 1
    assert other.ms == pytest.approx(0.003) and sum(row.ms for row in rows) == pytest.approx(0.01)


def test_nsight_lines() -> None:
    lines = commands("python x.py", [("void at::gemm_kernel<float>(int)", 0, 5), ("b", 0, 1)])
    assert any('-k "regex:gemm_kernel"' in line and "ncu" in line for line in lines)
    assert any(line.startswith("nsys profile") and line.endswith("python x.py") for line in lines)
    assert any("rx_" in line for line in commands("python x.py", []))


def test_nvtx_ranges_are_what_nsys_records(monkeypatch) -> None:
    """The calls that a GPU would get: -c cudaProfilerApi records the block, to its last kernel."""
    said: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: said.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waits"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: said.append("push"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), nvtx_ranges(model):
        said.append("step")
        raise KeyError
    assert said == ["waits", "start", "step", "waits", "stop"]
    assert any("nvtx_ranges(model)" in line for line in commands("python x.py", []))


def test_nvtx_ranges_nest_by_module() -> None:
    model, depth, seen = build("trm"), [0], []

    def push(name: str) -> None:
        seen.append((depth[0], name))
        depth[0] += 1

    def pop() -> None:
        depth[0] -= 1

    carry, batch = lookalike.inputs(model)
    with nvtx_ranges(model, push, pop):
        model(carry, batch)
    assert depth == [0]
    assert seen[0][1].startswith("loss") and (2, "supervision step") in seen
    assert (3, "call 5: net L") in seen and (4, "block 1") in seen and (6, "QKV product") in seen
    assert not module_hooks._global_forward_hooks
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="NVTX"), nvtx_ranges(model):
            pass


# ---- arguments ----------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="a torch module"):
        recurx.profile(3)
    with pytest.raises(InvalidArgument, match="no config"):
        recurx.profile(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="with run="):
        recurx.profile(tiny(), run=lambda: None, train=True)
    with pytest.raises(InvalidArgument, match="update"):
        recurx.profile(tiny(), ema=3)


def test_command_line_on_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recurx.commands import main

    config = {"puzzle_emb_ndim": 64, "num_puzzle_identifiers": 3}
    recurx.save_checkpoint(tmp_path / "m.safetensors", tiny(**config))
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--seconds", "0.05"]
    assert main(["profile", *arguments, "--batch", "3", "--train", "--backend", "eager"]) == 0
    out = capsys.readouterr().out
    assert "B=3" in out and "sign SGD of puzzle rows" in out and "net calls (6)" in out


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recurx.commands import main

    files = [tmp_path / name for name in ("t.json", "p.json", "p.html")]
    arguments = [
        "--trace",
        str(files[0]),
        "--json",
        str(files[1]),
        "--html",
        str(files[2]),
        "--seconds",
        "0.1",
    ]
    assert main(["profile", "--preset", "small", "--batch", "2", "--train", *arguments]) == 0
    out = capsys.readouterr().out
    assert "training step, B=2" in out and "recursion, by stage" in out and "EMA" in out
    assert "--nvtx" in out  # the Nsight lines run this command
    assert all(json.loads(path.read_text()) for path in files[:2])
    assert files[2].read_text().startswith("<!doctype html>")
    if not torch.cuda.is_available():
        assert main(["profile", "--nvtx"]) == 2
        assert "CUDA" in capsys.readouterr().err
