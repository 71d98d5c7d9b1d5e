"""What the compiled engine is given, it checks itself: no size and no number ends the process.

Each case runs in this very process, so a fault of the processor fails the whole file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import recurx
from recurx import Schedule, reference
from recurx.backends import cpu
from recurx.nets import KINDS, Net, NetSpec
from tests.factories import make_inputs, make_net, rope

engine = cpu._load()[0]
pytestmark = pytest.mark.skipif(engine is None, reason="recurx._C is not built")

HUGE = (0, -1, -(2**31), 2**20 + 1, 2**30, 2**31 - 1)
ATTENTION = dict(token_mlp=False, D=64, F=64, H=2, dim=32, T=0, token_inner=0, eps=1e-5)
TOKENS = dict(token_mlp=True, D=64, F=64, H=0, dim=0, T=9, token_inner=32, eps=1e-5)


def pack(shape: dict[str, Any]) -> Any:
    """Weights of 1 MB each, far more than the sound shapes read."""
    weights = torch.zeros(4, 1 << 18)
    pointers = [(w.data_ptr(), False) for w in weights]
    return engine.cpu_pack([tuple(shape.values())], pointers, False, "portable")


def call(
    net: Any, *, B: int = 1, T: int = 9, D: int = 64, threads: int = 1, steps: Any = None
) -> None:
    program = engine.Program([(0, 1, [1], [0], 0)] if steps is None else steps)
    x, out = torch.zeros(2, 1 << 16)
    pointers = [x.data_ptr(), x.data_ptr()]
    engine.cpu_run([net], program, (B, T, D), pointers, [0, out.data_ptr()], 0, 0, threads)


def test_sound_ones_run() -> None:
    for shape in (ATTENTION, TOKENS):
        net = pack(shape)
        for batch in (0, 1, 3):
            call(net, B=batch, threads=2)
        call(net, steps=[])


@pytest.mark.parametrize(
    ("base", "name"),
    [(ATTENTION, "D"), (ATTENTION, "F"), (ATTENTION, "H"), (ATTENTION, "dim"),
     (TOKENS, "D"), (TOKENS, "F"), (TOKENS, "T"), (TOKENS, "token_inner")],
    ids=lambda p: p if isinstance(p, str) else "token_mlp" if p["token_mlp"] else "attention",
)  # fmt: skip
def test_shapes(base: dict[str, Any], name: str) -> None:
    for value in HUGE:
        with pytest.raises(ValueError, match="recurx cpu engine: expected"):
            pack({**base, name: value})


def test_odd_shapes() -> None:
    for change in ({"D": 48}, {"dim": 24}, {"dim": 8}, {"H": 3}, {"eps": float("nan")}):
        with pytest.raises(ValueError, match="recurx cpu engine: expected"):
            pack({**ATTENTION, **change})


@pytest.mark.parametrize("name", ["B", "T", "D"])
@pytest.mark.parametrize("base", [ATTENTION, TOKENS], ids=["attention", "token_mlp"])
def test_sizes_of_a_call(base: dict[str, Any], name: str) -> None:
    net = pack(base)
    for value in HUGE[1:3] if name == "B" else HUGE:
        with pytest.raises(ValueError, match="recurx cpu engine: expected"):
            call(net, **{name: value})


@pytest.mark.parametrize("threads", [0, -1, 1025, 100_000, 2**31 - 1])
def test_threads(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads from 1 to 1024, got {threads}"):
        call(pack(ATTENTION), threads=threads)


@pytest.mark.parametrize(
    "step", [(1, 1, [1], [0], 0), (-1, 1, [1], [0], 0), (0, 0, [1], [0], 0), (0, 2, [1], [0], 0),
             (0, 1, [2], [0], 0), (0, 1, [-1], [0], 0), (0, 1, [1], [2], 0), (0, 1, [], [0], 0)],
)  # fmt: skip
def test_steps_that_name_what_is_not_there(step: Any) -> None:
    with pytest.raises(ValueError, match="recurx cpu engine: expected"):
        call(pack(ATTENTION), steps=[step])


def test_nothing_to_run() -> None:
    with pytest.raises(ValueError, match="four weights"):
        engine.cpu_pack([tuple(ATTENTION.values())], [], False, "portable")
    with pytest.raises(ValueError, match="expected a block"):
        call(engine.cpu_pack([], [], False, "portable"))
    with pytest.raises(ValueError, match="expected nets"):
        engine.cpu_run([], engine.Program([]), (1, 9, 64), [0], [0], 0, 0, 1)


# ---- the same through the front door -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "cpu", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "tokens"), [(0, 1), (1, 1), (2, 1), (0, 33), (7, 3)], ids=lambda n: f"{n}"
)
def test_small_sizes(backend: str, kind: str, batch: int, tokens: int) -> None:
    schedule, shape = Schedule.trm(1, 1), dict(tokens=tokens, hidden=32)
    net = make_net(kind, **shape, inner=1, heads=1, token_inner=1)
    x, carry = make_inputs(schedule, batch=batch, **shape)
    tables = rope(**shape, heads=1)
    got = recurx.recurse(schedule, {"L": net}, x, carry, backend=backend, cos_sin=tables)
    want = reference.run(schedule, {"L": net}, x, carry, tables)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "auto", "eager"])
@pytest.mark.parametrize(
    "change", [{"inner": 0}, {"num_heads": 0}, {"hidden": 0}, {"num_heads": 5}]
)
def test_zero_sizes(backend: str, change: dict[str, int]) -> None:
    """The answer or a refusal of the project's own, for every part that can be zero."""
    schedule, net = Schedule.trm(1, 1), make_net(KINDS[0])
    x, carry = make_inputs(schedule)
    with pytest.raises((recurx.InvalidArgument, recurx.BackendUnavailable)):
        spec = NetSpec(tuple(dataclasses.replace(b, **change) for b in net.spec.blocks))
        weights = [torch.zeros(shape) for block in spec.blocks for shape in block.weight_shapes]
        small = x[..., : spec.hidden], {name: s[..., : spec.hidden] for name, s in carry.items()}
        out = recurx.recurse(schedule, {"L": Net(spec, weights)}, *small, backend=backend)
        assert backend != "cpu" and all(s.isfinite().all() for s in out.values())
        raise recurx.InvalidArgument("answered")


@pytest.mark.parametrize("backend", ["cpu", "auto", "eager"])
def test_no_tokens(backend: str) -> None:
    schedule = Schedule.trm(1, 1)
    x, carry = make_inputs(schedule, tokens=0)
    net = {"L": make_net(KINDS[0])}
    if backend == "cpu":
        with pytest.raises(recurx.BackendUnavailable, match="T=0"):
            recurx.recurse(schedule, net, x, carry, backend=backend)
    else:
        assert recurx.recurse(schedule, net, x, carry, backend=backend)["z_H"].shape == x.shape
