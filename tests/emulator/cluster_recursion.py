"""Drive the cluster recursion (csrc/cuda/cluster_sm90a/) in the emulator, judged by numpy.

    python -m emulator.cluster_recursion att --hidden 128 --tokens 70 --seeds 10

The yardstick of the error is the same recursion in plain bf16: every operation rounds its result,
as PyTorch's do. tests/cuda/test_cluster_recursion.py holds the yardstick against PyTorch itself.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recurx.backends import cuda_abi
from recurx.operands import Span
from recurx.program import PLAIN, lower
from recurx.schedule import INPUT, Schedule, Step

from .build import Emulated, EmulatorFault, load_kernels
from .gemm_residual_rms import aligned, from_bf16, to_bf16

FILES = ["cluster_sm90a/launch.cu", "cluster_sm90a/pack.cu", "runtime.cu"]
EPS = 1e-5
HEAD_DIM = 64
GUARD = 2048  # elements behind an output that nobody may write
NAN = 0x7FFF
ATT, MLP = "att", "mlp"
Array = np.ndarray


@dataclass(frozen=True)
class Call:
    """write <- net(sum(state) + (sum(inject))); states by number, "x" is the input."""

    net: int
    write: int
    state: tuple[int | str, ...]
    inject: tuple[int | str, ...] = ()


TRM = (Call(0, 1, (1,), (0, "x")), Call(0, 1, (1,), (0, "x")), Call(0, 0, (0, 1)))
HRM = (Call(0, 1, (1,), (0, "x")), Call(1, 0, (0, 1)), Call(0, 1, (1,), (0, "x")))
SINGLE_Z = (Call(0, 0, (0,), ("x",)), Call(0, 0, (0,)))
SCHEDULES = {"one": TRM[:1], "trm": TRM, "hrm": HRM, "single_z": SINGLE_Z}


@dataclass(frozen=True)
class Shape:
    """One recursion: the kinds of the blocks of each net, and sizes."""

    kinds: tuple[str, ...] = (ATT,)
    hidden: int = 128
    tokens: int = 70
    inner: int = 128
    token_inner: int = 64
    batch: int = 1
    cluster: int = 2
    schedule: str = "one"
    rope: bool = True

    @property
    def calls(self) -> tuple[Call, ...]:
        return SCHEDULES[self.schedule]

    @property
    def nets(self) -> int:
        return 1 + max(call.net for call in self.calls)

    @property
    def states(self) -> int:
        return 1 if self.schedule == "single_z" else 2

    def weight_shapes(self, kind: str) -> tuple[tuple[int, int], ...]:
        d, t, f, ft = self.hidden, self.tokens, self.inner, self.token_inner
        mixer = ((3 * d, d), (d, d)) if kind == ATT else ((2 * ft, t), (t, ft))
        return (*mixer, (2 * f, d), (d, f))


class Case:
    """Inputs of a shape, the right result in fp64, and the error of plain bf16."""

    def __init__(self, shape: Shape, calls: Sequence[Call] | None = None, seed: int = 0) -> None:
        self.shape, self.calls = shape, tuple(calls or shape.calls)
        rng = np.random.default_rng(seed)

        def draw(*size: int, scale: float = 1.0) -> Array:
            out = aligned(size)
            out[:] = to_bf16(rng.standard_normal(size) * scale)
            return out

        self.weights = [
            [
                [draw(*size, scale=size[1] ** -0.5) for size in shape.weight_shapes(kind)]
                for kind in shape.kinds
            ]
            for _ in range(shape.nets)
        ]
        size = (shape.batch, shape.tokens, shape.hidden)
        self.x, self.states = draw(*size), [draw(*size) for _ in range(shape.states)]
        self.cos, self.sin = rope_tables(shape.tokens)
        self.judge()

    def judge(self) -> None:
        self.want = self.reference(np.float64, lambda v: v)
        plain = self.reference(np.float32, round_bf16)
        self.plain_error = [error(p, w) for p, w in zip(plain, self.want, strict=True)]

    def one_call_each(self) -> Iterator[tuple[Call, Case]]:
        """Teacher-forced: each call by itself, from the states of plain bf16."""
        calls = self.calls
        states = self.states
        for call in calls:
            self.calls, self.states = (call,), states
            self.judge()
            yield call, self
            states = [as_bits(v) for v in self.reference(np.float32, round_bf16)]
        self.calls = calls

    def reference(self, dtype: type, rounded: Callable[[Array], Array]) -> list[Array]:
        values = [from_bf16(state).astype(dtype) for state in self.states]
        x = from_bf16(self.x).astype(dtype)

        def total(names: tuple[int | str, ...]) -> Array:
            sum_ = x if names[0] == "x" else values[names[0]]
            for name in names[1:]:
                sum_ = rounded(sum_ + (x if name == "x" else values[name]))
            return sum_

        for call in self.calls:
            h = total(call.state)
            if call.inject:
                h = rounded(h + total(call.inject))
            for kind, weights in zip(self.shape.kinds, self.weights[call.net], strict=True):
                wide = [from_bf16(w).astype(dtype) for w in weights]
                h = self.block(h, kind, wide, rounded)
            values[call.write] = h
        return values

    def block(self, h: Array, kind: str, weights: list[Array], rounded: Callable) -> Array:
        mixer_in, mixer_out, gate_up, down = weights

        def swiglu(v: Array, w_in: Array, w_out: Array) -> Array:
            gate, up = np.split(rounded(v @ w_in.T), 2, axis=-1)
            return rounded(rounded(rounded(gate / (1 + np.exp(-gate))) * up) @ w_out.T)

        def rms(v: Array) -> Array:
            return rounded(v / np.sqrt((v * v).mean(-1, keepdims=True) + EPS))

        if kind == ATT:
            h = rms(rounded(h + self.attention(h, mixer_in, mixer_out, rounded)))
        else:
            columns = h.swapaxes(1, 2)
            h = rms(rounded(columns + swiglu(columns, mixer_in, mixer_out))).swapaxes(1, 2)
        return rms(rounded(h + swiglu(h, gate_up, down)))

    def attention(self, h: Array, qkv: Array, o: Array, rounded: Callable) -> Array:
        batch, tokens, hidden = h.shape
        heads = rounded(h @ qkv.T).reshape(batch, tokens, 3, -1, HEAD_DIM).transpose(2, 0, 3, 1, 4)
        query, key, value = heads
        if self.shape.rope:
            query, key = (rounded(self.rotate(v)) for v in (query, key))
        scores = query @ key.swapaxes(-1, -2) / HEAD_DIM**0.5
        probability = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = rounded(probability) @ value / probability.sum(-1, keepdims=True)
        return rounded(rounded(mixed.swapaxes(1, 2).reshape(batch, tokens, hidden)) @ o.T)

    def rotate(self, v: Array) -> Array:
        half = HEAD_DIM // 2
        turned = np.concatenate([-v[..., half:], v[..., :half]], -1)
        return v * self.cos.astype(v.dtype) + turned * self.sin.astype(v.dtype)

    # ---- running

    def run(self, lib: Emulated) -> list[Array]:
        """The states that the kernel writes, bf16 bits; raises EmulatorFault."""
        outs = [aligned((s.size + GUARD,)) for s in self.states]
        for out in outs:
            out[:] = NAN  # an element that nobody writes shows, and so does a guard
        arguments, keep = self.arguments(lib, outs)
        lib.unwatch_all()
        if lib.checked:
            for i, (out, state) in enumerate(zip(outs, self.states, strict=True)):
                lib.watch(out.ctypes.data, state.nbytes, f"state {i}")
        try:
            lib.call("rx_cluster_sm90a_run", *arguments, None)
        finally:
            lib.unwatch_all()
        del keep
        if any((out[-GUARD:] != NAN).any() for out in outs):
            raise EmulatorFault("elements behind an output were written")
        return [out[:-GUARD].reshape(s.shape) for out, s in zip(outs, self.states, strict=True)]

    def arguments(self, lib: Emulated, outs: list[Array]) -> tuple[tuple[object, ...], object]:
        """The arguments of the C entry, and what must stay alive during the call."""
        shape, r = self.shape, cuda_abi.RxRecursion()
        r.batch, r.tokens, r.hidden = self.x.shape
        r.num_states, r.num_nets, r.num_calls = len(self.states), shape.nets, len(self.calls)
        calls = (cuda_abi.RxCall * len(self.calls))()
        for c, call, stays in zip(calls, self.calls, self.stays(), strict=True):
            number = [len(self.states) if v == "x" else v for v in (*call.state, *call.inject)]
            c.net, c.write, c.num_state, c.num_inject, c.stays = (
                call.net, call.write, len(call.state), len(call.inject), stays,
            )  # fmt: skip
            c.scale, c.keep, c.damping, c.noise, c.number = PLAIN[:5]
            c.state[: c.num_state], c.inject[: c.num_inject] = (
                number[: c.num_state], number[c.num_state :],
            )  # fmt: skip
        tapes = [self.pack(lib, net, r.nets[n]) for n, net in enumerate(self.weights)]
        r.calls, r.x = ctypes.addressof(calls), self.x.ctypes.data
        if shape.rope:
            r.cos, r.sin = self.cos.ctypes.data, self.sin.ctypes.data
        for i, (state, out) in enumerate(zip(self.states, outs, strict=True)):
            r.states_in[i], r.states_out[i] = state.ctypes.data, out.ctypes.data
        plan = cuda_abi.RxClusterPlan(shape.cluster)
        return (ctypes.byref(r), ctypes.byref(plan)), (r, plan, calls, tapes)

    def stays(self) -> list[bool]:
        """RxCall.stays of each call."""

        def named(state: int | str) -> str:
            return INPUT if state == "x" else f"z{state}"

        steps = tuple(
            Step(f"net{c.net}", named(c.write), tuple(map(named, c.state)),
                 tuple(map(named, c.inject)))
            for c in self.calls
        )  # fmt: skip
        return [call.stays for call in lower(Schedule(steps), Span(0, len(steps))).calls]

    def pack(self, lib: Emulated, net: list[list[Array]], to: object) -> Array:
        shape, pack = self.shape, cuda_abi.RxPack()
        pack.hidden, pack.tokens, pack.num_blocks = shape.hidden, shape.tokens, len(net)
        for i, (kind, weights) in enumerate(zip(shape.kinds, net, strict=True)):
            heads = shape.hidden // HEAD_DIM if kind == ATT else 0
            token_inner = 0 if kind == ATT else shape.token_inner
            pack.blocks[i] = (int(kind == MLP), shape.inner, heads, token_inner, EPS)
            pack.weights[4 * i : 4 * i + 4] = [w.ctypes.data for w in weights]
        tape_bytes = lib.library.rx_cluster_sm90a_tape_bytes
        tape_bytes.restype = ctypes.c_int64
        tape = aligned((tape_bytes(ctypes.byref(pack)) // 2,))
        tape[:] = NAN
        pack.tape = tape.ctypes.data
        lib.call("rx_cluster_sm90a_pack", ctypes.byref(pack), None)
        to.num_blocks, to.blocks, to.tape = len(net), pack.blocks, pack.tape
        return tape

    def compare(self, outs: list[Array], factor: float = 1.25) -> str | None:
        """None, or which state is farther from fp64 than `factor` times plain bf16.

        The largest single error may be twice that of plain bf16: it is one draw of many.
        """
        for i, (out, want, (rms, top)) in enumerate(
            zip(outs, self.want, self.plain_error, strict=True)
        ):
            got = from_bf16(out).astype(np.float64)
            own_rms, own_top = error(got, want)
            if own_rms <= factor * rms and own_top <= 2 * factor * top:
                continue
            wrong = ~(np.abs(got - want) <= 2 * factor * top)
            first = tuple(int(v) for v in np.argwhere(wrong)[0]) if wrong.any() else None
            return (
                f"state {i} is wrong: error {own_rms:.2e}, plain bf16 {rms:.2e}; largest "
                f"{own_top:.2e}, plain {top:.2e}; {int(wrong.sum())} elements, first {first}"
            )
        return None

    @property
    def flop(self) -> int:
        rows = self.shape.batch * self.shape.tokens
        return len(self.calls) * sum(
            2 * rows * size[0] * size[1]
            for kind in self.shape.kinds
            for size in self.shape.weight_shapes(kind)
        )


def rope_tables(tokens: int, base: float = 10000.0) -> tuple[Array, Array]:
    frequency = base ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = np.tile(np.arange(tokens)[:, None] * frequency, 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def as_bits(v: Array) -> Array:
    out = aligned(v.shape)
    out[:] = to_bf16(v)
    return out


def round_bf16(v: Array) -> Array:
    return from_bf16(to_bf16(v))


def error(got: Array, want: Array) -> tuple[float, float]:
    """Root mean square and largest absolute difference; infinite where something is not finite."""
    difference = np.abs(got - want)
    if not np.isfinite(difference).all():
        return float("inf"), float("inf")
    return float(np.sqrt((difference**2).mean())), float(difference.max())


def outcome(lib: Emulated, case: Case, **settings: float) -> str:
    """'right', or what was found."""
    lib.configure(**settings)
    try:
        return case.compare(case.run(lib)) or "right"
    except EmulatorFault as fault:
        return str(fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=(ATT, MLP))
    defaults = Shape()
    for name in ("hidden", "tokens", "inner", "token_inner", "batch", "cluster"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name)
        )
    parser.add_argument("--schedule", choices=SCHEDULES, default=defaults.schedule)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="no race checker")
    args = parser.parse_args()
    lib = load_kernels(FILES, not args.plain)
    sizes = ("hidden", "tokens", "inner", "token_inner", "batch", "cluster", "schedule")
    case = Case(Shape(tuple(args.kinds), **{name: getattr(args, name) for name in sizes}))
    for seed in range(1, args.seeds + 1):
        start = time.perf_counter()
        found = outcome(lib, case, seed=seed)
        took = time.perf_counter() - start
        print(
            f"seed {seed}: {took:.2f} s, {case.flop / took * 1e-9:.2f} GFLOP/s: {found}", flush=True
        )


if __name__ == "__main__":
    main()
