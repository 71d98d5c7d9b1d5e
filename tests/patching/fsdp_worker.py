"""One rank of two: FSDP2 by block, by net, at the root; patched training and the unpatched one.

torchrun --nproc-per-node 2 -m tests.patching.fsdp_worker BACKEND
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import recurx
from tests import lookalike, lookalike_nano

STEPS = 4


def shard(model: nn.Module, where: str, **policy: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    blocks = [m for m in model.modules() if isinstance(m, lookalike.Layer)]
    nets = [m for m in model.modules() if isinstance(m, lookalike.Stack)]
    linears = [m for m in model.modules() if isinstance(m, lookalike.Gated)]
    parts = {"root": [], "blocks": blocks, "nets": nets, "deep": linears + blocks + nets}
    for module in parts[where.removesuffix(" alone")]:
        fully_shard(module, mesh=mesh, **policy)
    if not where.endswith("alone"):
        fully_shard(model, mesh=mesh, **policy)


def train(model: nn.Module, rank: int) -> list[Tensor]:
    """Losses, carries and the whole weights of some steps, each rank on a batch of its own."""
    if isinstance(model, lookalike_nano.Nano):
        return [
            getattr(t, "full_tensor", lambda t=t: t)() for t in lookalike_nano.train(model, STEPS)
        ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    carry, batch = lookalike.inputs(model, batch=4)
    batch["inputs"] = batch["inputs"].roll(rank, 0)
    trace = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        carry, logits, loss = model(carry, batch)
        loss.backward()
        optimizer.step()
        trace += [loss.detach(), logits.detach(), *vars(carry).values()]
    with torch.no_grad():  # evaluation, its gather too
        trace.append(model.eval()(carry, batch)[1])
    return trace + [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def compare(build: Any, where: str, order: str, backend: str, rank: int, **policy: Any) -> None:
    want_model, model = build(), build()
    shard(want_model, where, **policy)
    if order == "patch first":
        handle = recurx.patch(model, backend=backend)
        shard(model, where, **policy)
    else:
        shard(model, where, **policy)
        handle = recurx.patch(model, backend=backend)
    assert len(handle.report.patched) == 1, handle.report
    assert "patched" in recurx.explain(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = train(model, rank)
    told = [str(w.message) for w in said if "recurx" in str(w.message)]
    assert bool(told) == bool(policy), (where, order, told)
    assert not policy or "mixed precision" in told[0], told
    want = train(want_model, rank)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)
        allowed = 0 if backend == "eager" and not policy else 1e-4
        assert error <= allowed, f"{where}, {order}: value {number} differs by {error}"


def main() -> None:
    backend = sys.argv[1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for build in (lookalike.build, lambda: lookalike.build("hrm"), lookalike_nano.build):
        for where in ("root", "blocks", "nets", "deep", "blocks alone"):
            for order in ("patch first", "shard first"):
                compare(build, where, order, backend, rank)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    compare(lookalike.build, "blocks", "patch first", backend, rank, mp_policy=low)
    dist.barrier()
    if rank == 0:
        print("sharded training is the same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
