"""The int8 core: exact products, the same on all vectors; the engine around it; bugs that show."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import recurx
from recurx import Schedule, comparing, fp8, reference
from recurx.backends import cpu
from recurx.nets import KINDS
from recurx.operands import Operands
from recurx.plan import cpu as plan
from tests.cpu import build
from tests.cpu.test_cpu_engine import run
from tests.factories import make_inputs, make_net, problem_for, quantize_net, rope

MOST_DEPTH = 133144  # csrc/cpu/types.hpp: 127 * 127 of them fit an int32
# Vectors: width, rows of a tile, flags; by the instruction, or by plain code.
PLAIN = {f"plain {w}": (w, r, ["-DRX_EMULATE_DOT"]) for w, r in ((4, 4), (8, 6), (16, 14))}
PLAIN["plain tiles"] = (16, 14, ["-DRX_CHECK_AMX", "-DRX_EMULATE_AMX"])
BY_INSTRUCTION = {"avx512_vnni": (16, 14), "avx2_vnni": (8, 6), "amx": (16, 14)}


def has_instruction(name: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {"avx512_vnni": "avx512_vnni", "avx2_vnni": "avx_vnni", "amx": "amx_int8"}[name] in flags


def variant(name: str) -> tuple[int, int, list[str]]:
    if name in PLAIN:
        return PLAIN[name]
    if not has_instruction(name):
        pytest.skip(f"this processor has no {name}")
    flags = list(build.native_tools.ISA_FLAGS[name][0])
    return (*BY_INSTRUCTION[name], [*flags, "-DRX_CHECK_AMX"] if name == "amx" else flags)


def compiled(name: str, include: Path, program: Path, more: tuple[str, ...] = ()) -> Path:
    width, rows, flags = variant(name)
    try:
        compiler = build.native_tools.find_compiler()
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the check: {missing}")
    sizes = [f"-DRX_VECTOR_WIDTH={width}", f"-DRX_ROW_TILE={rows}"]
    source = str(build.ROOT / "tests" / "cpu" / "int8_check.cpp")
    options = ["-std=c++17", "-O2", "-w", *sizes, *flags, *more, f"-I{include}"]
    build.run(*compiler.command, *options, source, "-o", str(program))
    return program


def product(program: Path, x: np.ndarray, codes: np.ndarray, scales: np.ndarray):
    """(product, codes of the rows, their scales), as the engine computes them."""
    (rows, depth), columns = x.shape, len(codes)
    given, got = program.with_suffix(".in"), program.with_suffix(".out")
    with open(given, "wb") as file:
        for part in (np.array([rows, depth, columns], np.int32), x, codes, scales):
            file.write(np.ascontiguousarray(part).tobytes())
    done = subprocess.run([str(program), str(given), str(got)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = got.read_bytes()
    cut = 4 * rows * columns
    q = np.frombuffer(data[cut : cut + rows * depth], np.uint8).astype(np.int64) - 128
    return (
        np.frombuffer(data[:cut], np.float32).reshape(rows, columns),
        q.reshape(rows, depth),
        np.frombuffer(data[cut + rows * depth :], np.float32),
    )


def check(program: Path, x: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
    """All bits, against int64."""
    got, q, row_scales = product(program, x, codes, scales)
    largest = np.abs(x).max(1)
    assert np.array_equal(row_scales, largest / np.float32(127))
    assert (np.abs(q).max(1) == np.where(largest > 0, 127, 0)).all()
    unit = np.where(row_scales > 0, row_scales, 1).astype(np.float64)[:, None]
    assert np.abs(q - x / unit).max() <= 0.5 + 1e-4
    sums = q @ codes.astype(np.int64).T
    assert np.abs(sums).max() < 2**31
    assert np.array_equal(got, sums.astype(np.float32) * row_scales[:, None] * scales)


def cases():
    """Odd sizes, and the deepest product with codes that make its partial sums wrap."""
    rng = np.random.default_rng(0)
    for rows, depth, columns in (
        (1, 1, 1),
        (17, 33, 70),
        (29, 513, 96),
        (9, 1538, 33),
        (15, 31, 5),
    ):
        x = rng.standard_normal((rows, depth), np.float32) * rng.exponential(9, (rows, 1))
        codes = rng.integers(-127, 128, (columns, depth), np.int8)
        x[rows // 2] *= rows % 3  # a row of zeros
        x = (x.astype(np.float32).view(np.int32) & -65536).view(np.float32)  # that bf16 holds
        yield x, codes, rng.random(columns, np.float32) + np.float32(0.1)
    for sign in (1, -1):
        codes = np.full((2, MOST_DEPTH), 127, np.int8)
        codes[1] *= sign
        yield np.full((1, MOST_DEPTH), 3.0 * sign, np.float32), codes, np.ones(2, np.float32)


@pytest.mark.parametrize("name", [*PLAIN, *BY_INSTRUCTION])
def test_products_are_those_of_int64(name: str, tmp_path: Path) -> None:
    """So all vectors have the same bits."""
    program = compiled(name, build.ROOT / "csrc", tmp_path / "check")
    for case in cases():
        check(program, *case)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_and_alone(wrong: float, tmp_path: Path) -> None:
    program = compiled("plain 8", build.ROOT / "csrc", tmp_path / "check")
    x, codes, scales = list(cases())[1]
    plain, *_ = product(program, x, codes, scales)
    x[3, 20] = wrong
    got, *_ = product(program, x, codes, scales)
    assert np.isnan(got[3]).all()
    others = np.arange(len(x)) != 3
    assert np.array_equal(got[others], plain[others])


GEMM = "gemm_int8.hpp"
PLANTED = {
    "no correction of the 128": ("plain 8", GEMM, "(int32_t)(-128u * (uint32_t)sum)", "0"),
    "the scale of another row": ("plain 8", GEMM, "own.scales[row + r]", "own.scales[row]"),
    "the scales of the other side": ("plain 8", GEMM, "load(scales + W)", "load(scales)"),
    "the last quads left out": ("plain 8", GEMM, "k < count; ++k", "k < 0; ++k"),
    "codes cut, not rounded": ("plain 8", GEMM, "(fixed + 32768)", "fixed"),
    "the panel before": ("plain 8", GEMM, "w + panel * panel_size;", "w + first * panel_size;"),
    "signed activations": (
        "plain 8", "int8.hpp", "((VU)a >> 8 * byte & 255)",
        "(VU)((VI)((VU)a << (24 - 8 * byte)) >> 24)",
    ),
    "tiles: no correction of the 128": (
        "plain tiles", "gemm_int8_amx.hpp", "(VU)load_lanes(starts);", "0;",
    ),
    "tiles: the scale of the first row": (
        "plain tiles", "gemm_int8_amx.hpp", "row_scales[row]", "row_scales[0]",
    ),
    "tiles: one side for both": (
        "plain tiles", "gemm_int8_amx.hpp", "kOtherSide = 64", "kOtherSide = 0",
    ),
    "tiles: the first depth again": ("plain tiles", "gemm_int8_amx.hpp", " + step * 64", ""),
    "tiles: sums that start anew": (
        "plain tiles", "gemm_amx.hpp", "step > 0 ? sums : nullptr", "nullptr",
    ),
    "tiles: signed activations": (
        "plain tiles", "tile.hpp", "(uint32_t)(uint8_t)tiles", "(uint32_t)(int8_t)tiles",
    ),
    "sums that saturate": (
        "avx512_vnni", "int8.hpp", "_mm512_dpbusd_epi32", "_mm512_dpbusds_epi32",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path) -> None:
    name, file, old, new = PLANTED[bug]
    shutil.copytree(build.ROOT / "csrc" / "cpu", tmp_path / "cpu")
    path = tmp_path / "cpu" / file
    assert old in path.read_text(), f"{file} has no {old!r} any more"
    path.write_text(path.read_text().replace(old, new))
    program = compiled(name, tmp_path, tmp_path / "check")
    with pytest.raises(AssertionError):
        for case in cases():
            check(program, *case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain 4", "plain tiles"])
def test_no_access_outside_its_memory(name: str, tmp_path: Path) -> None:
    """Nor undefined behaviour, where partial sums wrap too."""
    more = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = compiled(name, build.ROOT / "csrc", tmp_path / "check", more)
    for case in cases():
        check(program, *case)


# ---- the engine --------------------------------------------------------------------------------


def w8a8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T with int8 codes for the rows of x."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, x / scale, 0).round()
    return (codes * scale) @ weight.T


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_is_w8a8_in_fp64(engine, kind: str, dtype, monkeypatch) -> None:
    """The error against fp64 is that of the format, 1.1e-2 here, whose products in fp64 have it.
    Their codes are the engine's, but for the few that fp32 rounds the other way, and those that
    follow: 3e-3 in fp32 states."""
    schedule, shape = Schedule.single_z(1, 1), dict(tokens=27, hidden=160, heads=2)
    net = quantize_net(make_net(kind, **shape, blocks=1), fp8.INT8)
    x, carry = make_inputs(schedule, batch=3, dtype=dtype, tokens=27, hidden=160)
    cos_sin = rope(**shape) if kind == KINDS[0] else None
    name = schedule.nets[0]
    got = run(engine, schedule, {name: net}, x, carry, cos_sin, 0, 1)
    exact_net = {name: recurx.Net(net.spec, [w.double() for w in net.weights])}
    wide = {key: state.double() for key, state in carry.items()}
    ask = functools.partial(reference.run, schedule, exact_net, x.double(), wide, cos_sin, 0, 1)
    plain = ask()
    monkeypatch.setattr(reference, "linear", w8a8)
    exact = ask()
    (key,) = got
    format_error, error = relative(exact[key], plain[key]), relative(got[key], plain[key])
    assert 1e-2 < format_error < 1.3e-2 and 0.8 * format_error < error < 1.25 * format_error
    if dtype is torch.float32:
        assert relative(got[key], exact[key]) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_reruns_have_the_same_bits(engine, kind, threads, monkeypatch) -> None:
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    schedule, shape = Schedule.trm(1, 1), dict(tokens=27, hidden=160, heads=2)
    net = quantize_net(make_net(kind, **shape), fp8.INT8)
    cos_sin = rope(**shape) if kind == KINDS[0] else None
    for batch in (1, 4):
        x, carry = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, tokens=27, hidden=160)
        found = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(run(engine, schedule, {"L": net}, x, carry, cos_sin))
        assert all(torch.equal(other[k], found[0][k]) for other in found for k in found[0])


def test_codes_count_while_every_net_is_their_product() -> None:
    """Two nets: a change of one, or one without codes, and both run as any other weights."""
    schedule, nets = Schedule.hrm(1, 1), {}
    for seed, name in enumerate(schedule.nets):
        nets[name] = quantize_net(make_net(seed=seed), fp8.INT8)
    x, carry = make_inputs(schedule, batch=2, dtype=torch.bfloat16)
    last = schedule.nets[-1]

    def answer(which) -> dict[str, torch.Tensor]:
        return run(cpu.BACKEND, schedule, which, x, carry, rope())

    def same(a, b) -> bool:
        return all(torch.equal(a[key], b[key]) for key in a)

    def forgetful(net):
        return recurx.Net(net.spec, [weight.clone() for weight in net.weights])

    quantised, plain = answer(nets), answer({k: forgetful(net) for k, net in nets.items()})
    assert not same(quantised, plain)
    assert same(answer({**nets, last: forgetful(nets[last])}), plain)
    weight = nets[last].weights[0]
    before = weight.clone()
    weight.numpy()[3, 5] += 1  # no version counter shows it
    assert same(answer(nets), answer({k: forgetful(net) for k, net in nets.items()}))
    weight.copy_(before)
    assert same(answer(nets), quantised)
    fp8.register(weight, fp8.quantize_weight(weight))  # codes of another format
    assert same(answer(nets), plain)


def test_comparisons_of_a_backend_do_not_see_codes() -> None:
    """Else `auto` would do without the engine for every model of these shapes."""
    schedule, net = Schedule.trm(1, 1), quantize_net(make_net(), fp8.INT8)
    x, carry = make_inputs(schedule, batch=2)
    states = [carry[name] for name in schedule.states]
    operands = Operands(x, states, net.weights, rope())
    assert comparing.right("calls", cpu.BACKEND, problem_for(schedule, {"L": net}, x), operands)
    assert fp8.are_quantized(net.weights, fp8.INT8)


@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_gradients_are_those_of_the_weights(save: str) -> None:
    """A window runs the weights themselves, forward and backward."""
    schedule, net = Schedule.trm(1, 1), quantize_net(make_net(), fp8.INT8)
    plain = recurx.Net(net.spec, [weight.clone() for weight in net.weights])
    x, carry = make_inputs(schedule, batch=2)
    found = []
    for which in (net, plain):
        leaf = x.clone().requires_grad_()
        out = recurx.recurse(
            schedule, {"L": which}, leaf, carry, backend="cpu", cos_sin=rope(), save=save
        )
        out["z_H"].square().sum().backward()
        found.append((out["z_H"].detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    packed = cpu._pack(cpu.BACKEND._engine(), net.spec, net.weights, True, "portable", True, None)
    program = cpu.BACKEND._engine().Program([(0, 1, [1], [0], 0)])
    with pytest.raises(ValueError, match="nets of int8 have no window"):
        cpu.BACKEND._engine().cpu_window_forward(
            [packed], program, (1, 13, 64), [0, 0], [0, 0], 0, 0, 0, (0, 0, 0, 0), 1
        )


def test_weights_may_be_transposed() -> None:
    schedule, net = Schedule.trm(1, 1), quantize_net(make_net(), fp8.INT8)
    turned = recurx.Net(net.spec, [weight.mT.contiguous().mT for weight in net.weights])
    for weight, other in zip(turned.weights, net.weights, strict=True):
        codes, scales = (fp8.registered(other).codes, fp8.registered(other).scales)
        fp8.register(weight, fp8.Codes(codes.mT.contiguous().mT, scales))
        assert not weight.is_contiguous() and not fp8.registered(weight).codes.is_contiguous()
    x, carry = make_inputs(schedule, batch=2)
    found = [run(cpu.BACKEND, schedule, {"L": n}, x, carry, rope()) for n in (net, turned)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in carry)


def test_fp8_is_not_int8_nor_the_other_way_round() -> None:
    """The grid kernel asks for the first."""
    for dtype, other in ((fp8.FP8, fp8.INT8), (fp8.INT8, fp8.FP8)):
        net = quantize_net(make_net(), dtype)
        assert fp8.are_quantized(net.weights, dtype) and not fp8.are_quantized(net.weights, other)
    assert not fp8.are_quantized(net.weights)


def test_what_an_int32_cannot_sum_is_refused() -> None:
    module = cpu.BACKEND._engine()
    isa, scales = module.cpu_isa(), torch.ones(1)
    block = (False, 32, MOST_DEPTH + 1, 2, 16, 0, 0, 1e-5)
    codes = [(scales.data_ptr(), False)] * 4  # refused before anybody reads there
    with pytest.raises(ValueError, match=r"int32 from 1 to 133144, got 133145"):
        module.cpu_pack([block], codes, True, isa, [scales.data_ptr()] * 4)
    with pytest.raises(ValueError, match="scales for all"):
        module.cpu_pack([block], codes, True, isa, [scales.data_ptr()])


def test_why_it_would_be_no_faster() -> None:
    def backend(isa: str, has: bool) -> cpu.Cpu:
        module = types.SimpleNamespace(cpu_isa=lambda: isa, cpu_has_int8=lambda _: has)
        return cpu.Cpu(module)  # type: ignore[arg-type]

    assert backend("avx512_bf16", True).why_not_int8() is None
    assert "no instruction for products of int8" in (backend("avx2", False).why_not_int8() or "")
    assert backend("amx", True).why_not_int8() is None
