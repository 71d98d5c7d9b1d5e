"""Drive the grid kernel (csrc/cuda/grid_sm80/) by its C interface, in the emulator or on a GPU.

python -m emulator.grid --tokens 33 --hidden 64 --ctas 4 --seeds 3      # a report of outcomes
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recurx import Schedule
from recurx.backends import cuda_grid
from recurx.backends.cuda_abi import RxBlock, RxGridPlan, RxPack, RxRecursion
from recurx.backends.cuda_launch import call_words
from recurx.nets import ATTENTION, Net
from recurx.operands import Span
from recurx.plan import LaunchPlan
from recurx.problem import Problem

from .build import Emulated, load_kernels

FILES = ["grid_sm80/launch.cu", "grid_sm80/pack.cu", "runtime.cu"]
ENTRY = "rx_grid_sm80_run"
GUARD = 4096  # bytes behind a state that nobody may write


@dataclass(frozen=True)
class Plan:
    """Settings of a launch: CTAs, row groups and depth splits of each product, shared memory."""

    ctas: int = 3
    row_groups: tuple[int, ...] = (1, 2, 1, 3)
    k_splits: tuple[int, ...] = (1, 2, 4, 8)
    shared_bytes: int = 100 * 1024
    fp8: bool = False
    cluster: int = 1

    @staticmethod
    def of(plan: LaunchPlan) -> Plan:
        """The settings that recurx picked."""
        made = cuda_grid.settings(plan)
        groups, splits = tuple(made.row_groups), tuple(made.k_splits)
        return Plan(made.ctas, groups, splits, made.shared_bytes, bool(made.fp8), made.cluster)

    def struct(self) -> RxGridPlan:
        four = ctypes.c_int32 * 4
        groups, splits = four(*self.row_groups), four(*self.k_splits)
        shared = self.shared_bytes
        return RxGridPlan(self.ctas, groups, splits, shared, self.fp8, self.cluster)


class Guarded:
    """Device memory for a tensor, 128-byte aligned, with guard bytes behind; 0x7f first: NaN."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        raw = torch.full((size + GUARD + 128,), 0x7F, dtype=torch.uint8, device=device)
        skip = -raw.data_ptr() % 128
        self.size, self.bytes = size, raw[skip : skip + size + GUARD]

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def as_bf16(self, shape: torch.Size) -> Tensor:
        assert (self.bytes[self.size :] == 0x7F).all(), "bytes behind an output were written"
        return self.bytes[: self.size].view(torch.bfloat16).view(shape).clone()


class GridKernel:
    """`run` has the signature of `recurx.recurse` without its backend.

    `library` is an emulated build, or an object with the same `call` and `library` for a GPU.
    `progress` is what the flag of the first row tile came to in the last launch.
    """

    def __init__(self, library: Emulated, plan: Plan | None = None) -> None:
        self.library, self.plan, self.progress = library, plan or Plan(), 0

    def run(
        self,
        schedule: Schedule,
        nets: Mapping[str, Net],
        x: Tensor,
        carry: Mapping[str, Tensor],
        cos_sin: tuple[Tensor, Tensor] | None = None,
        start_from: int = 0,
        stop_after: int | None = None,
    ) -> dict[str, Tensor]:
        order = schedule.nets
        steps = schedule.steps[start_from:stop_after]
        specs = tuple((name, nets[name].spec) for name in order)
        problem = Problem(schedule, specs, *x.shape, x.dtype, x.device.type)
        span = Span(start_from, start_from + len(steps))
        words = torch.tensor(call_words(problem, span), dtype=torch.int32, device=x.device)
        p, keep = RxRecursion(), [words]
        p.batch, p.tokens, p.hidden = x.shape
        p.num_states, p.num_nets, p.num_calls = len(schedule.states), len(order), len(steps)
        p.calls = words.data_ptr()
        for i, name in enumerate(order):
            keep.append(self._fill_net(p, i, nets[name]))
        x = x.contiguous()
        p.x = x.data_ptr()
        if cos_sin is not None:
            p.cos, p.sin = (table.data_ptr() for table in cos_sin)
        inputs = [carry[name].contiguous() for name in schedule.states]
        outs = [Guarded(state.numel() * 2, x.device) for state in inputs]
        for i, (state, out) in enumerate(zip(inputs, outs, strict=True)):
            p.states_in[i], p.states_out[i] = state.data_ptr(), out.address
        need = self._bytes("rx_grid_sm80_scratch_bytes", p, self.plan.struct())
        scratch = Guarded(need, x.device)
        p.scratch, p.scratch_bytes = scratch.address, need
        self.library.unwatch_all()
        if self.library.checked:
            # Of rows that a cluster gets by copies, whoever sends for them fences the proxies.
            self.library.configure(reader_may_fence=self.plan.cluster > 1)
        if self.library.checked:  # writes of one CTA and reads of another, under the race checker
            self.library.watch(scratch.address, need, "scratch")
            for name, out in zip(schedule.states, outs, strict=True):
                self.library.watch(out.address, out.size, f"state {name}")
        try:
            plan = self.plan.struct()
            self.library.call(ENTRY, ctypes.byref(p), ctypes.byref(plan), None)
        finally:
            self.library.unwatch_all()
        self.progress = int(scratch.bytes[:4].view(torch.int32))
        assert (scratch.bytes[need:] == 0x7F).all(), "bytes behind scratch were written"
        return {
            name: out.as_bf16(state.shape)
            for name, state, out in zip(schedule.states, inputs, outs, strict=True)
        }

    def _fill_net(self, p: RxRecursion, index: int, source: Net) -> Tensor:
        net, pack = p.nets[index], RxPack(p.hidden, p.tokens, len(source.spec.blocks))
        net.num_blocks = len(source.spec.blocks)
        for i, spec in enumerate(source.spec.blocks):
            token_mlp = spec.kind != ATTENTION
            block = RxBlock(token_mlp, spec.inner, spec.num_heads, spec.token_inner, spec.eps)
            net.blocks[i] = pack.blocks[i] = block
        tape = cuda_grid.pack(source.spec, source.weights, self.plan.fp8)
        assert self._bytes("rx_grid_sm80_tape_bytes", pack, int(self.plan.fp8)) == tape.nbytes
        net.tape = tape.data_ptr()
        return tape

    def fixed_shared_bytes(self, batch: int, tokens: int, nets: Mapping[str, Net]) -> int:
        """Shared memory of a CTA before its first weight, as the kernel reckons it."""
        p = RxRecursion(batch, tokens, next(iter(nets.values())).spec.hidden, 1, len(nets))
        keep = [self._fill_net(p, i, net) for i, net in enumerate(nets.values())]
        found = self._bytes("rx_grid_sm80_fixed_shared_bytes", p, self.plan.struct())
        del keep
        return found

    def _bytes(self, entry: str, *arguments: ctypes.Structure | int) -> int:
        function = getattr(self.library.library, entry)
        function.restype = ctypes.c_int64
        return function(*(a if isinstance(a, int) else ctypes.byref(a) for a in arguments))


def main() -> None:
    from tests.factories import make_inputs, make_net, rope

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default=ATTENTION)
    for name, default in (("tokens", 17), ("hidden", 64), ("inner", 96), ("heads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("batch", 2), ("ctas", 3), ("cluster", 1), ("seeds", 3), ("h-cycles", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plain", action="store_true", help="no race checker")
    args = parser.parse_args()
    schedule = Schedule.trm(args.h_cycles, 2)
    shape = dict(tokens=args.tokens, hidden=args.hidden)
    nets = {"L": make_net(args.kind, **shape, inner=args.inner, heads=args.heads)}
    x, carry = make_inputs(schedule, batch=args.batch, dtype=torch.bfloat16, **shape)
    library = load_kernels(FILES, checked=not args.plain)
    groups = (1, 1, 1, 1) if args.cluster > 1 else Plan.row_groups
    kernel = GridKernel(library, Plan(args.ctas, groups, cluster=args.cluster))
    for seed in range(1, args.seeds + 1):
        library.configure(seed=seed)
        start = time.perf_counter()
        out = kernel.run(schedule, nets, x, carry, rope(**shape, heads=args.heads))
        print(
            f"seed {seed}: {time.perf_counter() - start:.2f} s, |z_H| {out['z_H'].float().norm()}"
        )


if __name__ == "__main__":
    main()
