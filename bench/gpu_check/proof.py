"""Each family against fp64, then run again and again: python -m bench.gpu_check.proof FAMILY...

One net call may be at most 1.25 times as far from fp64 as plain PyTorch's in bf16; a whole
supervision step must have the same bits every time.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

import recurx
from bench.gpu_check import sizes
from bench.gpu_check.child import ABSENT
from bench.gpu_check.families import FAMILIES, Family, held, why_not
from bench.gpu_check.journal import emit
from recurx import reference
from recurx.bench.cases import build
from recurx.bench.checks import FACTOR, distance
from recurx.models import RecursiveModel
from recurx.nets import Net, read_stack
from recurx.plan import Device
from recurx.problem import Problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="+", choices=tuple(FAMILIES))
    parser.add_argument("--small", action="store_true", help="a small net, few samples")
    asked = parser.parse_args()
    cases = (sizes.SMALL_CASE,) if asked.small else sizes.PROVED_CASES
    batches = (2,) if asked.small else sizes.PROVED_BATCHES
    reruns = sizes.SMALL_RERUNS if asked.small else sizes.RERUNS
    found = [
        prove(name, case, batch, reruns)
        for name in asked.families
        for case in cases
        for batch in batches
    ]
    if set(found) <= {"absent", "refused"}:
        return ABSENT
    return int("wrong" in found or "differs" in found)


def prove(name: str, case: str, batch: int, reruns: int) -> str:
    """Lines for one call and for reruns; right, wrong, differs, refused or absent."""
    family = FAMILIES[name]
    said: dict[str, object] = {"family": name, "case": case, "batch": batch}
    model = build(case, "bf16", family.backend, 1).cuda()
    said["seed"] = torch.seed()  # other inputs at every call: what is right is right for any
    x, carry = _inputs(model, batch)
    schedule, tables = model.inner.schedule, model.inner.cos_sin()
    nets = {key: _rounded(read_stack(net)) for key, net in model.inner.nets().items()}
    specs = tuple((key, nets[key].spec) for key in schedule.nets)
    problem = Problem(
        schedule, specs, *x.shape, x.dtype, x.device.type, rope=tables is not None
    )  # fmt: skip
    with held(family), torch.no_grad():
        missing = why_not(family, problem, Device.of("cuda"))
        if missing is not None:
            emit("proof", **said, verdict=missing[0], why=missing[1])
            return missing[0]

        def run(stop: int | None = None) -> dict[str, Tensor]:
            torch.full((sizes.POISON_BYTES // 4,), float("nan"), device="cuda")
            return recurx.recurse(
                schedule, nets, x, carry, backend=family.backend, cos_sin=tables, stop_after=stop
            )

        verdict, facts = _judged(run(1), schedule, nets, x, carry, tables)
        emit("proof", **said, verdict=verdict, plan=_plan(family, problem), **facts)
        first, differing = run(), 0
        finite = all(bool(state.isfinite().all()) for state in first.values())
        for _ in range(reruns):
            again = run()
            differing += any(not torch.equal(first[key], again[key]) for key in first)
        emit("reruns", **said, reruns=reruns, differing=differing, finite=finite)
    if verdict == "right" and (differing or not finite):
        return "differs"
    return verdict


def _inputs(model: RecursiveModel, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    config = model.config
    shape = (batch, config.tokens, config.hidden_size)
    x, *states = (
        torch.randn(shape).to(config.dtype).cuda()
        for _ in range(1 + len(model.inner.schedule.states))
    )
    return x, dict(zip(model.inner.schedule.states, states, strict=True))


def _rounded(net: Net) -> Net:
    """fp32 masters whose values bf16 holds: their rounding is no engine's error."""
    return Net(net.spec, [w.detach().bfloat16().float() for w in net.weights])


def _judged(
    got: dict[str, Tensor], schedule: recurx.Schedule, nets: dict[str, Net], x: Tensor,
    carry: dict[str, Tensor], tables: tuple[Tensor, Tensor] | None,
) -> tuple[str, dict[str, object]]:  # fmt: skip
    """The state after one call against fp64 and against plain bf16."""
    wide = {key: Net(net.spec, [w.double() for w in net.weights]) for key, net in nets.items()}
    states = {key: state.double() for key, state in carry.items()}
    exact = reference.run(schedule, wide, x.double(), states, tables, 0, 1)
    plain = reference.run(schedule, nets, x, carry, tables, 0, 1)
    state = schedule.steps[0].write
    error = distance(got[state].double(), exact[state])
    allowed = FACTOR * distance(plain[state].double(), exact[state])
    facts: dict[str, object] = {"error": error, "allowed": allowed}
    untouched = all(torch.equal(got[key], carry[key]) for key in carry if key != state)
    if error <= allowed and untouched:
        return "right", facts
    apart = (got[state].double() - exact[state]).abs()
    wrong = ~(apart <= 8 * allowed * exact[state].abs().mean())
    first = torch.nonzero(wrong)[:1].flatten().tolist()
    facts |= {"wrong": int(wrong.sum()), "of": wrong.numel(), "first": first}
    return "wrong", facts | {"others untouched": untouched}


def _plan(family: Family, problem: Problem) -> str:
    from recurx import backends

    engine = backends.get(family.backend)
    return str(engine.plan(problem, torch.device("cuda")))  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
