"""Bugs planted in the source of the engine's window, a stage each: the judgement rejects them all.

The sources are copied, every bug is written into the copy behind a number, and the copy is compiled
once: portable code for what all cores share, and the cores of bf16 instructions for their own
stages, with the instructions where this processor has them.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from recurx import Schedule
from recurx.backends import cpu
from recurx.nets import ATTENTION, TOKEN_MLP
from tests.cpu import build
from tests.cpu.test_cpu_beside import given_of as beside_given
from tests.cpu.test_cpu_beside import learned_given
from tests.cpu.test_cpu_variant_window import given_of
from tests.cpu.test_cpu_variants import spec_of
from tests.cpu.windows import assert_right, case, on_engine
from tests.kernels.compare import ERROR_RATIO

TRM = dict(schedule=Schedule.trm(1, 1))
WINDOW = dict(schedule=Schedule.trm(2, 1))
MANY = dict(schedule=Schedule.trm(1, 1), batch=40)  # each call is summed alone
TOKENS = dict(schedule=Schedule.trm(1, 1), kind=TOKEN_MLP)
DEEP = dict(schedule=Schedule.trm(1, 1), hidden=32, inner=530, blocks=1, tokens=5)
PAIRS = dict(schedule=Schedule.trm(1, 1), isa="avx512_bf16", dtype=torch.bfloat16)
LONG_PAIRS = dict(**PAIRS, tokens=150, hidden=32, inner=32, heads=1, blocks=1, batch=1)
TILES = {**PAIRS, "isa": "amx"}
SPLIT = dict(schedule=Schedule.trm(1, 1), isa="amx_split")
TWO_SLICES = dict(schedule=Schedule.trm(1, 1), batch=90, hidden=32, inner=32)


def _of(variant: str, **more: object) -> dict:
    return dict(variant=variant, **more)


# name: (file, text, text with `bug` for whether the bug is there, the case that shows it)
BUGS = {
    "rotation of q and k not taken back": (
        "head_rows.hpp", "turned = rotate", "turned = !bug && rotate", TRM
    ),
    "scale of the gradient of q": (
        "heads.hpp", "s.d_q, wide(), scale(),", "s.d_q, wide(), bug ? 1.f : scale(),", TRM
    ),
    "base of the scores in the gradient of k": (
        "heads.hpp", "s.d_k, wide(), 1.f / kLog2e,", "s.d_k, wide(), bug ? 1.f : 1.f / kLog2e,", TRM
    ),
    "another panel of a weight": (
        "block_backward.hpp", "job.weights[at], first + i,",
        "job.weights[at], bug ? 0 : first + i,", TRM,
    ),
    "a slice of a weight's rows times the first slice's gradient": (
        "block_backward.hpp", "dy.at(0, begin)", "dy.at(0, bug ? 0 : begin)", DEEP
    ),
    "a slice that begins in the up rows": (
        "weight_rows.hpp", "(long)part * p.half()", "(long)(bug ? 0 : part) * p.half()", DEEP
    ),
    "pairs: scale of the gradient of q": (
        "pair_heads.hpp", "s.d_q, wide, scale,", "s.d_q, wide, bug ? 1.f : scale,", PAIRS
    ),
    "pairs: base of the scores in the gradient of k": (
        "pair_heads.hpp", "s.d_k, wide, 1.f / kLog2e,", "s.d_k, wide, bug ? 1.f : 1.f / kLog2e,",
        PAIRS,
    ),
    "pairs: softmax without its sum": (
        "pair_heads.hpp", "(v0 - delta0)", "(bug ? v0 : v0 - delta0)", PAIRS
    ),
    "pairs: weights of another query's sum": (
        "pair_heads.hpp", "exp2<Core::kCoarse>(v0 - lse0)",
        "exp2<Core::kCoarse>(v0 - (bug ? lse1 : lse0))", LONG_PAIRS,
    ),
    "pairs: a block of queries lost": (
        "pair_heads.hpp", "first < tokens; first +=", "first < (bug ? 1 : tokens); first +=",
        LONG_PAIRS,
    ),
    "pairs: a block of queries overwrites the one before": (
        "pair_heads.hpp", "into(s.d_k, first > 0)", "into(s.d_k, !bug && first > 0)", LONG_PAIRS
    ),
    "pairs: the queries' gradient from other keys": (
        "pair_heads.hpp", "turn_pairs(s.k,", "turn_pairs(bug ? s.v : s.k,", PAIRS
    ),
    "pairs: queries for keys' columns": (
        "pair_heads.hpp", "s.d_out, wide, s.d_out_columns",
        "bug ? s.q : s.d_out, wide, s.d_out_columns", PAIRS,
    ),
    "pairs: rows turned over in the wrong order": (
        "pack_rows.hpp", "(V)(even | odd << 16)", "(V)(bug ? odd | even << 16 : even | odd << 16)",
        PAIRS,
    ),
    "pairs: sums of the softmax lost": (
        "../attention_dot.hpp", "lse[(long)(row + r) * heads] = top",
        "lse[(long)(row + r) * heads] = (bug ? 1 : 0) + top", PAIRS,
    ),
    "tiles: sums of the softmax lost": (
        "../attention_amx.hpp", "lse[(long)row * heads] = top",
        "lse[(long)row * heads] = (bug ? 1 : 0) + top", TILES,
    ),
    "split: the third part of a weight's rows lost": (
        "pack_rows.hpp", "parts[i] = __builtin_convertvector(of[i], VU);",
        "parts[i] = bug && i == 2 ? VU{} : __builtin_convertvector(of[i], VU);", SPLIT,
    ),
    "split: panels that are packed at use overwrite each other": (
        "block_backward.hpp", "ws.panels, i);", "ws.panels, bug ? 0 : i);", SPLIT
    ),
    "softmax without its sum": (
        "heads.hpp", "(load(d_s + i) - delta)", "(load(d_s + i) - (bug ? 0.f : delta))", TRM
    ),
    "only the first queries count": (
        "heads.hpp", "first < tokens; first +=", "first < (bug ? 1 : tokens); first +=",
        dict(schedule=Schedule.trm(1, 1), tokens=40),
    ),
    "gate and up swapped": (
        "finishes.hpp",
        "store(d_gate_up.at(row, col), d * up * slope);\n"
        "        store(d_gate_up.at(row, width + col)",
        "store(d_gate_up.at(row, bug ? width + col : col), d * up * slope);\n"
        "        store(d_gate_up.at(row, bug ? col : width + col)", TRM,
    ),
    "slope of silu": (
        "finishes.hpp", "sigmoid + silu * (1.f - sigmoid)",
        "sigmoid + (bug ? V{} : silu * (1.f - sigmoid))", TRM,
    ),
    "norm without its mean": (
        "row_passes.hpp", "y(row, col) * mean)", "y(row, col) * (bug ? 0.f : mean))", TRM
    ),
    "norm over padded tokens": (
        "row_passes.hpp", "reduce_add(products) / width",
        "reduce_add(products) / (bug ? padded : width)", TOKENS,
    ),
    "residual path lost": (
        "block_backward.hpp", "return load(sum + row * ld + col); }",
        "return bug ? V{} : load(sum + row * ld + col); }", TRM,
    ),
    "token MLP's middle taken from the wrong slab": (
        "block_backward.hpp", "k.token_gate_up + (long)first * D * 2 * inner",
        "k.token_gate_up + (bug ? 0 : (long)first * D * 2 * inner)",
        dict(schedule=Schedule.trm(1, 1), kind=TOKEN_MLP, batch=3, hidden=544, tokens=5, blocks=1),
    ),
    "weight gradient of the wrong input": (
        "block_backward.hpp", "sum_rows(mixer_in, ws.wide, RowsOf<State>{k.h, D, D})",
        "sum_rows(mixer_in, ws.wide, RowsOf<State>{bug ? k.mid : k.h, D, D})", TRM,
    ),
    "calls overwrite each other's weight gradient": (
        "block_backward.hpp", "ws.fresh[at] = false;", "ws.fresh[at] = bug;", MANY
    ),
    "a gathered call is lost": (
        "window.hpp", "place{filled * rows(),",
        "place{(bug ? ws.group[net] - 1 : filled) * rows(),", TRM,
    ),
    "window off by one": (
        "window.hpp", "if (!ws.active[call]) continue;\n      find(",
        "if (!ws.active[call] || (bug && call == 0)) continue;\n      find(", WINDOW,
    ),
    "gradient of an overwritten state survives": (
        "window.hpp", "    if (!ws.given[step.write]) return;",
        "    if (bug) ws.given[step.write] = true;\n"
        "    if (bug || !ws.given[step.write]) return;",
        dict(schedule=Schedule.hrm(1, 2, window="full")),
    ),
    "stale z_H": (
        "window_forward.hpp", "write(step, ws.blocks[net.num_blocks - 1].out);",
        "if (!bug || call > 0) write(step, ws.blocks[net.num_blocks - 1].out);",
        dict(schedule=Schedule.trm(2, 1, window="full")),
    ),
    "the last sample of a slice lost": (
        "window_forward.hpp", "{ return slice.end - slice.begin; }",
        "{ return slice.end - slice.begin - (bug && slice.begin > 0); }", TWO_SLICES,
    ),
    "another block's weight": (
        "block_backward.hpp", "job.weights[at],", "job.weights[bug ? which : at],", TRM
    ),
    # ---- variants: (file, text, the bug in its place, the spec that shows it)
    "a norm before f": (
        "sublayer_backward.hpp", "store(p, load(p) + d);", "store(p, bug ? load(p) : load(p) + d);",
        _of("pre-LayerNorm, ReLU"),
    ),
    "the weight of a norm after f": (
        "sublayer_backward.hpp", "weight + 2, true", "bug ? weight : weight + 2, true",
        _of("sandwich"),
    ),
    "what a layer norm subtracts": (
        "variant_passes.hpp", "n.kind == Norm::layer ? reduce_add(sum)",
        "!bug && n.kind == Norm::layer ? reduce_add(sum)", _of("post-LayerNorm, GELU"),
    ),
    "the weight of a norm left out": (
        "variant_passes.hpp", "if (n.weight) g *=", "if (!bug && n.weight) g *=",
        _of("norm weights"),
    ),
    "the gradient of a norm's weight": (
        "variant_passes.hpp", "return d(row, col) * hat(row, col);",
        "return d(row, col) * (bug ? x(row, col) : hat(row, col));", _of("a norm alone"),
    ),
    "the constant of a learned scale": (
        "sublayer_backward.hpp", "columns, constant", "columns, bug ? 1.f : constant",
        _of("scalar scales"),
    ),
    "the factor of h lost": (
        "sublayer_backward.hpp", "left(row, col) * end.skip.at(col)", "left(row, col) * "
        "(bug ? splat(1.f) : end.skip.at(col))", _of("channel skips"),
    ),
    "the gradient of a factor of h, of f's result": (
        "sublayer_backward.hpp", "v.skip_scale, entered)",
        "v.skip_scale, [&](int row, int col) { return bug ? result(row, col) : entered(row, col); "
        "})", _of("channel skips, sandwich"),
    ),
    "the norm of h without its factor": (
        "sublayer_backward.hpp", "entered(row, col) * end.skip.at(col)",
        "entered(row, col) * (bug ? splat(1.f) : end.skip.at(col))", _of("scalar skips"),
    ),
    "the scale of f's result": (
        "sublayer_backward.hpp", "store(narrow.at(row, col), left(row, col) * by(row, col));",
        "store(narrow.at(row, col), bug ? left(row, col) : left(row, col) * by(row, col));",
        _of("channel scales"),
    ),
    "the bias of up is that of gate": (
        "sublayer_backward.hpp", "load(dy.at(row, half * p.padded_half() + col))",
        "load(dy.at(row, (bug ? 0 : half) * p.padded_half() + col))",
        _of("token MLP, pre-norm, biases"),
    ),
    "slope of gelu": (
        "../activations.hpp", "fma(x * 0.39894228f,", "fma(x * (bug ? 0.f : 0.39894228f),",
        _of("post-LayerNorm, GELU"),
    ),
    "slope of gelu by tanh": (
        "../activations.hpp", "splat(0.134145f)", "splat(bug ? 0.044715f : 0.134145f)",
        _of("inner norm, GEGLU"),
    ),
    "slope of relu": (
        "../activations.hpp", "x > V{} ? splat(1.f) : V{};", "x > V{} ? splat(1.f) : splat(bug);",
        _of("pre-LayerNorm, ReLU"),
    ),
    "slope of relu squared": (
        "../activations.hpp", "at_least(V{}, x) * 2.f", "at_least(V{}, x) * (bug ? 1.f : 2.f)",
        _of("no mixer, ReLU²"),
    ),
    "slope of sigmoid": (
        "../activations.hpp", "return s * (1.f - s);", "return bug ? s : s * (1.f - s);",
        _of("sigmoid"),
    ),
    "taps of a convolution in the wrong order": (
        "variant_passes.hpp", "(t + width - 1 - j) * kStrip",
        "(t + (bug ? j : width - 1 - j)) * kStrip", _of("ConvSwiGLU"),
    ),
    "the weight of another tap": (
        "variant_passes.hpp", "v * load(strip + (t + j) * kStrip + c)",
        "v * load(strip + (t + (bug ? 0 : j)) * kStrip + c)", _of("convolution before the gate"),
    ),
    "the activation after a convolution": (
        "variant_passes.hpp", "if (activates) v *=", "if (!bug && activates) v *=",
        _of("ConvSwiGLU"),
    ),
    "up convolved as gate": (
        "variant_passes.hpp", "/ padded * inner + in_half",
        "/ padded * (bug ? 0 : inner) + in_half", _of("convolution before the gate"),
    ),
    "an inner norm left out": (
        "variant_backward.hpp", "if (m.norm >= 0)", "if (!bug && m.norm >= 0)",
        _of("inner norm, GEGLU"),
    ),
    "the gate of a norm of the product": (
        "variant_backward.hpp", "fma(g, up,", "fma(bug ? V{} : g, up,", _of("norm of the product")
    ),
    "the gate of attention": (
        "variant_backward.hpp", "* gate * (1.f - gate);", "* gate * (bug ? gate : 1.f - gate);",
        _of("grouped heads, gate, prefix"),
    ),
    "a gate's way to h lost": (
        "variant_backward.hpp", "if (enters) add_back(own.mixed,",
        "if (!bug && enters) add_back(own.mixed,", _of("grouped heads, gate, prefix"),
    ),
    "the norm before o left out": (
        "variant_backward.hpp", "if (v.attn_norm != Norm::none)",
        "if (!bug && v.attn_norm != Norm::none)", _of("norm of the product"),
    ),
    "one head alone of those that share a key": (
        "variant_backward.hpp", "(part ? group : 1)", "(part && !bug ? group : 1)",
        _of("grouped heads, gate, prefix"),
    ),
    "the norm of k left out": (
        "variant_backward.hpp", "part < 2; ++part", "part < (bug ? 1 : 2); ++part",
        _of("causal window, QK-norm"),
    ),
    "keys before the prefix ends": (
        "../softmax.hpp", "| (key < prefix);", "| (key < (bug ? 0 : prefix));",
        _of("grouped heads, gate, prefix"),
    ),
    "a window of one side": (
        "../softmax.hpp", "(query - key < window) &", "(bug | (query - key < window)) &",
        _of("plain QK-norm, window"),
    ),
    "pairs: the mask of other queries": (
        "pair_heads.hpp", "near + W, key", "bug ? near : near + W, key",
        _of("causal window, QK-norm", isa="avx512_bf16", dtype=torch.bfloat16, tokens=40),
    ),
    "lines of a grid left out": (
        "variant_backward.hpp", "own.d_lines + this->line_of(row) * wide",
        "own.d_lines + (bug ? row : this->line_of(row)) * wide", _of("axial, columns"),
    ),
    "a token MLP's result turned over": (
        "variant_backward.hpp", "RowsOfMat<Act>{one.narrow}",
        "RowsOfMat<Act>{bug ? one.normed : one.narrow}", _of("token MLP normed over D"),
    ),
    "a token MLP's rows turned back": (
        "variant_backward.hpp", "leave_back(slab);", "if (!bug) leave_back(slab);",
        _of("token MLP with inner norms"),
    ),
    # ---- what is read beside h: cases of test_cpu_beside.py
    "the draws of another call": (
        "window.hpp", "beside(call, i)}, back}", "beside(bug ? 0 : call, i)}, back}",
        dict(beside="dropout"),
    ),
    "the draws of another block": (
        "window_forward.hpp", "{slice.begin, rec.steps[call].number, block}",
        "{slice.begin, rec.steps[call].number, bug ? 0 : block}", dict(beside="no mixer"),
    ),
    "the draws of another branch": (
        "../drops.hpp", "2 * (uint32_t)number", "2 * (uint32_t)(bug ? 1 : number)",
        dict(beside="dropout"),
    ),
    "the paths' draws for elements": (
        "../drops.hpp", "factors(path, use + 4,", "factors(path, bug ? use : use + 4,",
        dict(beside="no mixer"),
    ),
    "columns drawn from a whole four": (
        "../drops.hpp", "col = -(int)(first % 4)", "col = bug ? 0 : -(int)(first % 4)",
        dict(beside="over T"),
    ),
    "rows drawn for columns": (
        "sublayer_backward.hpp", "one.first < 0 ? drops.of_row(row, to)",
        "bug || one.first < 0 ? drops.of_row(row, to)", dict(beside="over T"),
    ),
    "what was dropped has a gradient": (
        "sublayer_backward.hpp", "return dropped ? scale *", "return dropped && !bug ? scale *",
        dict(beside="paths, pre-norm"),
    ),
    "a scale's gradient of what was dropped": (
        "sublayer_backward.hpp", "return dropped ? result(row, col)",
        "return dropped && !bug ? result(row, col)", dict(beside="paths, pre-norm"),
    ),
    "the same after a norm": (
        "sublayer_backward.hpp", "if (end.drops.matter())\n", "if (!bug && end.drops.matter())\n",
        dict(beside="over T, sandwich"),
    ),
    "keys of another sample": (
        "../drops.hpp", "(beside.sample + row / rec.tokens) *",
        "(bug ? 0 : beside.sample + row / rec.tokens) *", dict(beside="padding"),
    ),
    "keys of a row for a column": (
        "../drops.hpp", "columns = v.axial[0]", "columns = !bug && v.axial[0]",
        dict(beside="everything, columns"),
    ),
    # ---- learned factors of steps
    "what is damped has no part in the gradient": (
        "window.hpp", "less ? load(x", "less && !bug ? load(x", dict(factors=3),
    ),
    "a learned scale multiplies the factor's gradient": (
        "window_forward.hpp", "store(scaled + at, total);",
        "store(scaled + at, bug ? total * scale_of(step, at) : total);", dict(factors=3),
    ),
    "a learned scale is lost on the way back": (
        "window.hpp", "if (enters && scales(step))", "if (!bug && enters && scales(step))",
        dict(factors=3),
    ),
    "an injected state gets the scale": (
        "window.hpp", "for (int i = 0; enters && i < step.num_inject; ++i)",
        "if (bug && enters && scales(step)) each_own([&](size_t at) {\n"
        "  store(ws.sum + at, load(ws.sum + at) * scale_of(step, at)); });\n"
        "      for (int i = 0; enters && i < step.num_inject; ++i)",
        dict(factors=3),
    ),
    "a learned share takes all": (
        "window.hpp", "step.share_each ? 1.f - share_of(step, at)",
        "step.share_each && !bug ? 1.f - share_of(step, at)", dict(factors=3),
    ),
    "what was damped is the value of another call": (
        "window_forward.hpp", "store(ws.blocks[0].before + at, entered);",
        "store(ws.blocks[0].before + at, bug ? load(out + at) : entered);", dict(factors=3),
    ),
    "the factors of another column": (
        "window.hpp", "load(step.share_each + at % rec.hidden)",
        "load(step.share_each + (bug ? 0 : at % rec.hidden))", dict(factors=3),
    ),
    "a factor's gradient of the last slice alone": (
        "window.hpp", "{to, false}", "{to, bug}", dict(factors=150),
    ),
    "padding has a gradient": (
        "../softmax.hpp", "if (keys) sees &= key", "if (keys && !bug) sees &= key",
        dict(beside="padding"),
    ),
}  # fmt: skip


PAIR_CORES = ("avx512_bf16", "amx", "amx_split")
PRETEND = [*build.have(PAIR_CORES), "-DRX_PRETEND_ISA"]
PRETEND += [] if "amx" in build.usable() else ["-DRX_EMULATE_AMX"]
# Of an engine that their table names and no bug needs.
STUBS = """#include "cpu/engines.hpp"
int rx_planted = 0;
namespace rx::cpu { const Engine avx512_f32{}, avx512_bf16{}; }
"""


def _compile() -> Path:
    import pybind11

    compiler = build.native_tools.find_compiler()
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-w", "-DRX_MODULE_NAME=_cpu_planted"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = sorted((build.ROOT / "csrc" / "cpu").rglob("*.?pp"))
    digest = hashlib.sha256(repr((compiler, flags, BUGS)).encode())
    for file in (*sources, *sorted((build.ROOT / "csrc").glob("*.?pp"))):
        digest.update(file.read_bytes())
    folder = build.ROOT / "build" / "cpu_planted" / digest.hexdigest()[:16]
    module = folder / f"_cpu_planted{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build.ROOT / "csrc" / "cpu", folder / "cpu")
    for file in (build.ROOT / "csrc").glob("*.?pp"):
        shutil.copy(file, folder)
    for number, (name, text, planted, _) in enumerate(BUGS.values(), 1):
        file = folder / "cpu" / "backward" / name
        before = file.read_text()
        assert before.count(text) == 1, f"{name} has {before.count(text)} times {text!r}"
        file.write_text(before.replace(text, planted.replace("bug", f"(rx_planted == {number})")))
    vectors = folder / "cpu" / "vec.hpp"
    vectors.write_text(
        vectors.read_text().replace("#pragma once", "#pragma once\nextern int rx_planted;")
    )
    (folder / "planted.cpp").write_text(STUBS)
    files = [folder / "bindings.cpp", folder / "planted.cpp"]
    others = tuple(f"_{isa}" for isa in build.native_tools.ISA_FLAGS if isa not in PAIR_CORES)
    files += [f for f in sorted((folder / "cpu").glob("*.cpp")) if not f.stem.endswith(others)]

    flags = [*flags, *PRETEND, f"-I{folder}"]
    build.compile_all(compiler, flags, files, folder, module.name, ["-shared"])
    return module


@pytest.fixture(scope="module")
def planted():
    """(the backend over the portable engine with all bugs, the number of the one that is there)."""
    try:
        path = _compile()
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the engine: {missing}")
    engine = cpu.Cpu(build.load(path, "_cpu_planted"))
    return engine, ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "rx_planted")


def given_by(shown: dict):
    if "factors" in shown:
        return learned_given(torch.float32, batch=shown["factors"])
    if "beside" in shown:
        return beside_given(shown["beside"], torch.float32)
    if "variant" in shown:
        sizes = {name: value for name, value in shown.items() if name not in ("variant", "isa")}
        return given_of(spec_of(shown["variant"]), **{"dtype": torch.float32, **sizes})
    given = {"kind": ATTENTION, "dtype": torch.float32, **shown}
    return case(**{name: value for name, value in given.items() if name != "isa"})


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_rejected(planted, name, monkeypatch) -> None:
    shown = BUGS[name][-1]
    monkeypatch.setenv("RECURX_CPU_ISA", shown.get("isa", "portable"))
    engine, number = planted
    ratio = 2 if {"variant", "beside", "factors"} & {*shown} else ERROR_RATIO  # of one draw
    given = given_by(shown)
    assert_right(on_engine(engine, given), given, ratio)
    number.value = list(BUGS).index(name) + 1
    try:
        with pytest.raises(AssertionError, match=r"gradients: error|any\(\)"):
            assert_right(on_engine(engine, given), given, ratio)
    finally:
        number.value = 0
