"""`python -m recurx profile`: where one step spends its time, printed and as files."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from dataclasses import dataclass
from typing import Any

from recurx.bench.paths import check_writable
from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.options import file, option, stated

PRESETS = ("trm-att", "trm-mlp", "hrm", "small")


@dataclass(frozen=True)
class Options(options.Machine):
    checkpoint: str | None = file("official .pt, or .safetensors")
    preset: str | None = option(
        None, "a model with random weights (default small)", choices=PRESETS
    )
    batch: int = option(1, "samples", least=1)
    train: bool = option(False, "a training step: forward, loss, backward, optimiser, EMA")
    seconds: float = options.time(12.0, "for the untraced steps")
    html: str | None = file("one-file report, readable without network")
    trace: str | None = file("for ui.perfetto.dev, chrome://tracing")
    json: str | None = file("all numbers")
    nvtx: bool = option(False, "no profile: run five steps with NVTX ranges, for nsys and ncu")


def run(asked: Options) -> int:
    import recurx

    if asked.checkpoint and asked.preset:
        raise InvalidArgument("--preset: not with --checkpoint, which is a model of its own.")
    device = asked.prepare()
    check_writable(asked.html, asked.trace, asked.json)
    model = _model(asked).to(device)
    if asked.nvtx:
        return _run_under_nvtx(model, asked)
    training = {"train": True, **_training(model)} if asked.train else {}
    plain = dataclasses.replace(asked, html=None, trace=None, json=None, nvtx=True)
    script = f"python -m recurx profile {words(plain)}"  # for the Nsight lines
    profile = recurx.profile(
        model, batch_size=asked.batch, seconds=asked.seconds, script=script, **training
    )
    print(profile)
    for kind in ("html", "trace", "json"):
        if path := getattr(asked, kind):
            getattr(profile, f"save_{kind}")(path)
            print(f"\nwritten: {path}", end="")
    print()
    return 0


def words(asked: Any) -> str:
    """The command line that says what differs from the defaults, where an option has one value."""
    said = {name: getattr(asked, name) for name in stated(type(asked))}
    changed = {k: v for k, v in said.items() if v != getattr(type(asked), k)}
    pairs = [[options.flags([k])] + ([] if v is True else [f"{v}"]) for k, v in changed.items()]
    return shlex.join(word for pair in pairs for word in pair)


def _model(asked: Options) -> Any:
    """The model that is profiled, in the forward dtype of its configuration."""
    import torch

    from recurx.checkpoint import load_checkpoint
    from recurx.models import HRMConfig, TRMConfig
    from recurx.models.act import build_model

    if asked.checkpoint:
        loaded = load_checkpoint(asked.checkpoint)
        return loaded.build(backend=asked.backend, batch_size=asked.batch)
    torch.manual_seed(0)
    make: Any = {
        "trm-att": TRMConfig.sudoku_att,
        "trm-mlp": TRMConfig.sudoku_mlp,
        "hrm": HRMConfig.sudoku,
        "small": functools.partial(TRMConfig.tiny, 11, 81),
    }[asked.preset or "small"]
    return build_model(make(batch_size=asked.batch), asked.backend)


def _training(model: Any) -> dict[str, Any]:
    """The optimiser and the average of a training step."""
    from recurx.train import AdamATan2, Average

    return {"optimizer": AdamATan2(model.parameters(), lr=1e-4), "ema": Average(model)}


def _run_under_nvtx(model: Any, asked: Options) -> int:
    import torch

    from recurx.bench.profiler import nvtx_ranges
    from recurx.bench.profiler.step import (
        initial_carry,
        random_batch,
        supervision_step,
        training_step,
    )

    if not torch.cuda.is_available():
        raise InvalidArgument("--nvtx: needs a CUDA device; run without it for a profile here.")
    batch = random_batch(model, asked.batch)
    carry = initial_carry(model, batch)
    if asked.train:
        extras = _training(model)
        step = training_step(model.train(), batch, carry, [extras["optimizer"]], extras["ema"])
    else:
        step = supervision_step(model.eval(), batch, carry)
    step()
    with nvtx_ranges(model):
        for _ in range(5):
            step()
    print("five steps run under NVTX ranges")
    return 0
