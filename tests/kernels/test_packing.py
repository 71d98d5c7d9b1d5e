"""Who packs weights when: writers beside this thread, how often it happens, what a freeze holds."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.backends import cpu, weight_cache
from tests.kernels.writes import ENGINES, Stack, answer, of_copies, same

WRITER = """
import sys
import numpy as np
values = np.memmap(sys.argv[1], np.float32, "r+")
for line in sys.stdin:
    at, value = line.split()
    values[int(at)] = float(value)
    print("done", flush=True)
"""


def test_another_process_writes_to_shared_memory(native, tmp_path) -> None:
    stack, picks = Stack(), random.Random(0)
    linear = stack.layers[1].mlp.gate_up_proj
    path, count = tmp_path / "weight", linear.weight.numel()
    linear.weight.detach().numpy().tofile(path)
    shared = torch.from_file(str(path), shared=True, size=count).view_as(linear.weight)
    linear.weight = nn.Parameter(shared)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    before = answer(stack, "cpu", "eval")
    for _ in range(20):
        writer.stdin.write(f"{picks.randrange(count)} {picks.choice((-9, 9))}\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "done\n"
        now = answer(stack, "cpu", "eval")
        assert not same(now, before) and same(now, of_copies(stack, "cpu", "eval"))
        before = now
    writer.stdin.close()
    assert writer.wait() == 0


def test_a_write_while_packing_only_makes_it_pack_again(native, monkeypatch) -> None:
    """And what was packed of half of each is never taken for either, when the old values return."""
    stack = Stack()
    weight = stack.linears()[0].weight
    old, pack, packed = weight.detach().clone(), cpu._pack, []

    def racing(*arguments):
        packed.append(1)
        if len(packed) == 1:
            weight.data.mul_(2)  # after the hash, before the values are read
        return pack(*arguments)

    native.packed.clear()
    monkeypatch.setattr(cpu, "_pack", racing)
    answer(stack, "cpu", "eval")
    doubled = answer(stack, "cpu", "eval")
    assert len(packed) == 2 and same(doubled, answer(stack, "cpu", "eval")) and len(packed) == 2
    monkeypatch.setattr(cpu, "_pack", pack)
    assert same(doubled, of_copies(stack, "cpu", "eval"))
    monkeypatch.setattr(cpu, "_pack", racing)
    native.packed.clear()
    packed.clear()
    weight.data.copy_(old)
    answer(stack, "cpu", "eval")  # the race again
    weight.data.copy_(old)
    assert same(answer(stack, "cpu", "eval"), of_copies(stack, "cpu", "eval"))


@pytest.mark.parametrize("kind", ["tiled", "persistent"])
def test_training_rounds_for_each_forward_and_for_the_backward(kind: str, monkeypatch) -> None:
    from recurx.packed import PackedNets

    fills, fill = [], PackedNets.fill
    monkeypatch.setattr(PackedNets, "fill", lambda s, weights: fills.append(1) or fill(s, weights))
    with ENGINES[f"triton {kind}"]() as backend:
        answer(Stack(), backend, "training")
        assert len(fills) == 2, "the window, which is all calls here, and its backward"
        answer(stack := Stack(), backend, "eval")
        answer(stack, backend, "eval")
        assert len(fills) == 4
        with weight_cache.frozen_weights():
            answer(stack, backend, "eval")
            answer(stack, backend, "eval")
        assert len(fills) == 5


@pytest.mark.parametrize("engine", ["cpu", "triton persistent"])
def test_a_freeze_holds_for_its_memory_alone(engine: str) -> None:
    """Weights that lie where frozen ones lay are looked at, and no other thread is bound by it."""
    with ENGINES[engine]() as backend, weight_cache.frozen_weights():
        stack = Stack()
        before = answer(stack, backend, "eval")
        stack.linears()[0].weight.data.mul_(2)  # against the promise, and so not seen
        assert same(answer(stack, backend, "eval"), before)
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(answer, stack, backend, "eval").result()
        assert same(elsewhere, of_copies(stack, backend, "eval"))
        for seed in range(1, 4):
            values = [linear.weight.detach() for linear in Stack(seed).linears()]
            for linear, new in zip(stack.linears(), values, strict=True):
                linear.weight = None
                linear.weight = nn.Parameter(new.clone())
            assert same(answer(stack, backend, "eval"), of_copies(stack, backend, "eval"))


def test_solve_hashes_once_and_sees_what_was_written_before_it(native, monkeypatch) -> None:
    from recurx.models import TRM, TRMConfig

    sizes = dict(hidden_size=64, num_heads=2, inner_multiple=32)
    model = TRM(TRMConfig.tiny(7, 13, **sizes), "cpu").eval()
    batch = {"inputs": torch.randint(0, 7, (2, 13))}
    asked, digest = [], native.packed._digest
    monkeypatch.setattr(native.packed, "_digest", lambda w: asked.append(1) or digest(w))

    def solved() -> Tensor:
        return recurx.solve(model, batch, max_steps=3, halt=None, logits=True).logits

    first = solved()
    assert len(asked) == 2, "before and after packing"
    assert torch.equal(solved(), first) and len(asked) == 3
    model.inner.L_level.layers[0].mlp.down_proj.weight.data.mul_(3)
    changed = solved()
    assert not torch.equal(changed, first)
    model.inner.backend = "eager"
    torch.testing.assert_close(solved(), changed, rtol=1e-3, atol=1e-3)
