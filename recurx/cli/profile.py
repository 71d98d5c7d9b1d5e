"""`python -m recurx profile`: where one step spends its time, printed and as files."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from recurx.cli import options

PRESETS = ("trm-att", "trm-mlp", "hrm", "small")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", metavar="FILE", help="official .pt, or .safetensors")
    which.add_argument("--preset", choices=PRESETS, default="small",
                       help="a model with random weights (default small)")  # fmt: skip
    parser.add_argument("--batch", type=options.positive, default=1, metavar="N")
    parser.add_argument("--train", action="store_true", help="a training step: forward, loss, "
                        "backward, optimiser, EMA")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=12.0,
                        help="for the untraced steps (default 12)")  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="one-file report, readable without network")
    parser.add_argument("--trace", metavar="FILE", help="for ui.perfetto.dev, chrome://tracing")
    parser.add_argument("--json", metavar="FILE", help="all numbers")
    parser.add_argument("--nvtx", action="store_true", help="no profile: run five steps with NVTX "
                        "ranges, for nsys and ncu")  # fmt: skip
    options.add_machine(parser)


def run(arguments: argparse.Namespace) -> int:
    import recurx

    device = options.prepare_machine(arguments)
    model = _model(arguments).to(device)
    if arguments.nvtx:
        return _run_under_nvtx(model, arguments)
    training = {"train": True, **_training(model)} if arguments.train else {}
    profile = recurx.profile(
        model, batch_size=arguments.batch, seconds=arguments.seconds, script=_script(), **training
    )
    print(profile)
    for path, save in (
        (arguments.html, "save_html"),
        (arguments.trace, "save_trace"),
        (arguments.json, "save_json"),
    ):
        if path:
            getattr(profile, save)(path)
            print(f"\nwritten: {path}", end="")
    print()
    return 0


def _model(arguments: argparse.Namespace) -> Any:
    """The model that is profiled, in the forward dtype of its configuration."""
    import torch

    from recurx.checkpoint import load_checkpoint
    from recurx.models import HRM, TRM, HRMConfig, TRMConfig

    if arguments.checkpoint:
        loaded = load_checkpoint(arguments.checkpoint)
        return loaded.build(backend=arguments.backend, batch_size=arguments.batch)
    torch.manual_seed(0)
    size = {"batch_size": arguments.batch}
    if arguments.preset == "hrm":
        return HRM(HRMConfig.sudoku(**size), backend=arguments.backend)
    config = {
        "trm-att": TRMConfig.sudoku_att,
        "trm-mlp": TRMConfig.sudoku_mlp,
        "small": lambda **size: TRMConfig.tiny(11, 81, **size),
    }[arguments.preset]
    return TRM(config(**size), backend=arguments.backend)


def _training(model: Any) -> dict[str, Any]:
    """The optimiser and the average of a training step."""
    from recurx.train import AdamATan2, Average

    return {"optimizer": AdamATan2(model.parameters(), lr=1e-4), "ema": Average(model)}


def _script() -> str:
    """This command with --nvtx instead of its outputs, for the Nsight lines."""
    kept, skip = [], False
    for word in sys.argv[1:]:
        name = word.partition("=")[0]
        if not skip and name in ("--html", "--trace", "--json"):
            skip = "=" not in word
            continue
        if not skip:
            kept.append(word)
        skip = False
    return " ".join(["python -m recurx", *(kept or ["profile"]), "--nvtx"])


def _run_under_nvtx(model: Any, arguments: argparse.Namespace) -> int:
    import torch

    from recurx.errors import InvalidArgument
    from recurx.profiler import nvtx_ranges
    from recurx.profiler.step import (
        initial_carry,
        random_batch,
        supervision_step,
        training_step,
    )

    if not torch.cuda.is_available():
        raise InvalidArgument("--nvtx: needs a CUDA device; run without it for a profile here.")
    batch = random_batch(model, arguments.batch)
    carry = initial_carry(model, batch)
    if arguments.train:
        extras = _training(model)
        step = training_step(model.train(), batch, carry, [extras["optimizer"]], extras["ema"])
    else:
        step = supervision_step(model.eval(), batch, carry)
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with nvtx_ranges(model):
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    print("five steps run under NVTX ranges")
    return 0
