"""One rank of two: gradients and sparse steps on half a batch, compared by rank 0 with one rank.

    torchrun --nproc-per-node 2 -m tests.train.ddp_worker BACKEND

On GPUs the same with backend="nccl" and tensors on `cuda:LOCAL_RANK`.
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from recurx.models import TRM, ACTLossHead
from recurx.train import AdamATan2, CapturedStep, SampleQueue, SparseSignSGD
from recurx.train.ranks import join_torchrun

SLOTS, TOKENS, VOCAB = 8, 5, 6


def model(backend: str, slots: int, emb: int = 0) -> TRM:
    torch.manual_seed(0)
    made = TRM(
        hidden_size=32, num_heads=2, expansion=2.0, inner_multiple=16, L_layers=1, H_cycles=2,
        L_cycles=1, seq_len=TOKENS, vocab_size=VOCAB, batch_size=slots, puzzle_emb_ndim=emb,
        num_puzzle_identifiers=4, puzzle_emb_len=1, forward_dtype="float32", halt_max_steps=2,
        halt_exploration_prob=0.0, backend=backend,
    )  # fmt: skip
    with torch.no_grad():
        made.inner.q_head.weight.normal_(std=0.1)
    return made


def batch(rows: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, VOCAB, (SLOTS, TOKENS), generator=generator)
    labels = torch.randint(0, VOCAB, (SLOTS, TOKENS), generator=generator)
    ids = torch.tensor([0, 1, 1, 2, 0, 1, 2, 2], dtype=torch.int32)
    full = {"inputs": inputs, "labels": labels, "puzzle_identifiers": ids}
    return {key: value[rows] for key, value in full.items()}


def gradients(head: nn.Module, inner: ACTLossHead, rows: slice) -> list[torch.Tensor]:
    """Mean loss over these rows, backward; DDP averages over ranks."""
    data = batch(rows)
    _, loss, *_ = head(carry=inner.initial_carry(data), batch=data)
    (loss / len(data["inputs"])).backward()
    return [p.grad for p in inner.parameters()]


def captured(backend: str, rows: slice, world: int) -> list[torch.Tensor]:
    """Weights and table after three steps of the step object, all-reducing where ranks are two."""
    slots = rows.stop - rows.start
    inner = ACTLossHead(model(backend, slots, emb=16), "fused_stablemax_cross_entropy")
    optimizers = [
        AdamATan2(inner.parameters(), lr=0.01, betas=(0.9, 0.95)),
        SparseSignSGD(inner.model.puzzle_emb.buffers(), lr=0.01, world_size=world),
    ]
    weights = {id(p) for p in inner.parameters()}

    def average(grads: list[torch.Tensor]) -> None:
        owners = {id(p.grad) for p in inner.parameters() if id(p) in weights}
        for grad in grads:
            if id(grad) in owners:  # the sparse rows are gathered, not averaged
                dist.all_reduce(grad)
                grad.div_(world)

    queue = SampleQueue(lambda count: batch(rows), slots)
    step = CapturedStep(inner, optimizers, queue, synchronize=average if world > 1 else None)
    for _ in range(3):
        step()
    return [*inner.parameters(), inner.model.puzzle_emb.weights]


def compare(backend: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    half = slice(rank * SLOTS // world, (rank + 1) * SLOTS // world)

    inner = ACTLossHead(model(backend, SLOTS // world), "fused_stablemax_cross_entropy")
    got = gradients(nn.parallel.DistributedDataParallel(inner), inner, half)
    alone = ACTLossHead(model(backend, SLOTS // world), "fused_stablemax_cross_entropy")
    lonely = gradients(alone, alone, half)  # planted: ranks that do not talk
    stepped = captured(backend, half, world)
    if rank == 0:
        whole = ACTLossHead(model(backend, SLOTS), "fused_stablemax_cross_entropy")
        want = gradients(whole, whole, slice(0, SLOTS))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(lonely, want, strict=True))
        for a, b in zip(stepped, captured(backend, slice(0, SLOTS), 1), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        print("ranks agree", flush=True)
    dist.barrier()


def tell_threads() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads of gloo at the end: {[name for name in names if 'gloo' in name]}", flush=True)


def main() -> None:
    atexit.register(tell_threads)  # the last handler to run
    join_torchrun(torch.device("cpu"))
    compare(sys.argv[1])


if __name__ == "__main__":
    main()
