"""What a call does before its engine runs: the second one finds everything decided and made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import recurx
from recurx import Schedule, backends
from recurx.bench import host
from recurx.models import HRM, TRM, HRMConfig, TRMConfig
from recurx.nets import TOKEN_MLP
from tests.factories import HIDDEN, make_inputs, make_net, rope

FOLDER = str(Path(recurx.__file__).parent)
# What may run once for a kind of call: whole files, and functions of others.
FILES = ("plan/", "program.py", "choices.py", "comparing.py", "schedule.py", "nets.py")
FUNCTIONS = {
    "encode", "decode", "decide", "_check", "_remember", "lower", "call_words", "_prepare", "_pack",
    "__post_init__", "_pick", "_try", "subject_of", "why_unsupported", "why_unavailable",
}  # fmt: skip
CHEAP = {"engine_threads", "__getitem__"}  # arithmetic on sizes; a setting of a plan


def expensive(run) -> set[str]:
    """The functions of recurx that a run calls and that only a first one may."""
    seen: set[str] = set()

    def note(frame, event, argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDER):
            inside = code.co_filename[len(FOLDER) + 1 :]
            once = inside.startswith(FILES) or code.co_name in FUNCTIONS
            if once and code.co_name not in CHEAP and not code.co_name.startswith("<"):
                seen.add(f"{inside}:{code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


def model_of(backend: str, dtype: str = "bfloat16", hrm: bool = False):
    sizes = dict(forward_dtype=dtype, hidden_size=128, num_heads=2, inner_multiple=64)
    if hrm:
        return HRM(HRMConfig.tiny(7, 33, **sizes), backend).eval().inner
    return TRM(TRMConfig.tiny(7, 33, **sizes), backend).eval().inner


@pytest.mark.parametrize("hrm", [False, True], ids=["trm", "hrm"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "cuda"])
def test_the_second_call_plans_encodes_and_lowers_nothing(backend: str, hrm: bool) -> None:
    engine = "cpu" if backend == "auto" else backend
    reason = None if engine == "cuda" else backends.get(engine).why_unavailable()
    if reason is not None and "needs a GPU" not in reason:
        pytest.skip(f"backend {engine} {reason}")
    inner = model_of(backend, hrm=hrm)
    arrived: list[object] = []
    x = torch.randn(3, 33, 128).bfloat16()
    carry = {name: torch.randn_like(x) for name in inner.schedule.states}
    schedule, nets, tables = inner.schedule, inner.nets(), inner.cos_sin()

    def call() -> None:
        with torch.no_grad():
            recurx.recurse(schedule, nets, x, carry, backend=backend, cos_sin=tables)

    if backend == "auto":
        call()  # compared with the real engine

    def reached(*given: object) -> None:
        if not given or not str(given[0]).endswith("_pack"):  # weights are packed at every call
            arrived.append(1)

    with host.stubbed(engine, reached):
        first = expensive(call)
        for _ in range(3):  # Triton captures at the second
            call()
        before = len(arrived)
        assert before and (first or backend == "auto"), "the first call plans, all reach the engine"
        assert expensive(call) == set()
        assert len(arrived) == before + 1


def test_training_routes_its_second_step_by_a_look_up(native) -> None:
    schedule, net = Schedule.trm(2, 1), make_net(requires_grad=True)
    x, carry = make_inputs(schedule)

    def call() -> None:
        recurx.recurse(schedule, {"L": net}, x, carry, cos_sin=rope())

    call()
    assert not {f for f in expensive(call) if "decide" in f or "choices" in f or "plan/" in f}


# ---- what is remembered of a module -------------------------------------------------------------


def small(**changes):
    config = TRMConfig.tiny(7, 13, hidden_size=64, num_heads=2, inner_multiple=32, **changes)
    return TRM(config, "cpu").eval().inner


def answer(inner, **more):
    x, carry = make_inputs(inner.schedule)
    with torch.no_grad():
        out = recurx.recurse(
            inner.schedule, inner.nets(), x, carry, backend="eager", cos_sin=inner.cos_sin(), **more
        )
    return out["z_H"]


def replaced_parameter(layer):
    layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.detach() * 2)


def replaced_data(layer):
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * 2


def replaced_module(layer):
    layer.mlp.down_proj = type(layer.mlp.down_proj)(96, HIDDEN)


def causal(layer):
    layer.self_attn.causal = True


def another_eps(layer):
    layer.norm_eps = 0.5


def other_heads(layer):
    layer.self_attn.num_heads = layer.self_attn.num_key_value_heads = 1


def parametrised(layer):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(layer.mlp.down_proj, "weight", Twice())


@pytest.mark.parametrize(
    "change",
    [replaced_parameter, replaced_data, replaced_module, another_eps, causal, parametrised],
)
def test_a_changed_module_is_read_anew(change) -> None:
    inner = small(expansion=2.0)
    before = answer(inner)
    assert torch.equal(answer(inner), before)
    change(inner.L_level.layers[0])
    changed = answer(inner)
    assert not torch.equal(changed, before)
    fresh = small(expansion=2.0)
    change(fresh.L_level.layers[0])
    fresh.load_state_dict(inner.state_dict())
    assert torch.equal(answer(fresh), changed)


def test_what_no_longer_fits_is_still_refused() -> None:
    inner = small()
    answer(inner)
    other_heads(inner.L_level.layers[0])
    with pytest.raises(recurx.InvalidArgument, match="head_dim"):
        answer(inner)
    inner = small()
    answer(inner)
    weight = inner.L_level.layers[0].mlp.down_proj.weight
    weight.data = weight.data.t()  # same memory, another shape
    with pytest.raises(recurx.InvalidArgument, match=r"\[out, in\]"):
        answer(inner)
    inner = small()
    inner.L_level.layers.append(inner.L_level.layers[0])
    assert isinstance(answer(inner), torch.Tensor)
    for bad in ({"start_from": True}, {"stop_after": 99}, {"save": "none"}):
        with pytest.raises(recurx.InvalidArgument):
            answer(inner, **bad)


def test_one_layer_more_is_seen() -> None:
    inner = small()
    before = answer(inner)
    inner.L_level.layers.append(inner.L_level.layers[0])
    assert not torch.equal(answer(inner), before)


# ---- who watches or transforms operators still sees them -----------------------------------------


def watched(call) -> list[str]:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        call()
    return seen


def test_a_dispatch_mode_and_the_profiler_see_the_op(native) -> None:
    net, schedule = make_net(), Schedule.trm(1, 1)
    x, carry = make_inputs(schedule)

    def call():
        return recurx.recurse(schedule, {"L": net}, x, carry, backend="cpu", cos_sin=rope())

    plain = call()
    assert "recurx.recurse.default" in watched(call)
    with torch.profiler.profile() as profiled:
        seen = call()
    assert any("recurx::recurse" in event.key for event in profiled.key_averages())
    for name, state in plain.items():
        assert torch.equal(seen[name], state)


def test_transforms_and_odd_tensors_never_reach_an_engine_unseen(native) -> None:
    net, schedule = make_net(TOKEN_MLP), Schedule.trm(1, 1)
    x, carry = make_inputs(schedule)

    def call(x, backend="cpu"):
        out = recurx.recurse(schedule, {"L": net}, x, carry, backend=backend, cos_sin=rope())
        return out["z_H"]

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(recurx.RecurxError, match="forward-mode"):
            call(dual)
        found = [torch.autograd.forward_ad.unpack_dual(call(dual, b)) for b in ("auto", "eager")]
        assert torch.equal(found[0].tangent, found[1].tangent) and found[0].tangent.any()
    negative = torch.complex(x, x).conj().imag  # its memory holds the opposite sign
    assert negative.is_neg()
    assert torch.equal(call(negative), call(negative.resolve_neg().clone()))
