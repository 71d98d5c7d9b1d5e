"""What the CPU benchmark runs: cases (models), variants (ways to run them), and their worker.

A worker process holds one variant of one case, because torch.compile with freezing leaks settings
between compiled variants. It answers one-line JSON commands on its standard input.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurx.models import HRM, TRM
from recurx.models.config import HRMConfig, TRMConfig

CASES: dict[str, Callable[..., Any]] = {
    "trm-att": lambda **c: TRM(TRMConfig.sudoku_att(**c)),
    "trm-mlp": lambda **c: TRM(TRMConfig.sudoku_mlp(**c)),
    "hrm": lambda **c: HRM(HRMConfig.sudoku(**c)),
}

# variant -> (forward dtype, backend, how PyTorch runs it)
VARIANTS = {
    "recurx": ("bfloat16", "cpu", "eager"),
    "eager": ("bfloat16", "eager", "eager"),  # official style: masters cast on every call
    "compile": ("bfloat16", "eager", "compile"),
    "tuned": ("bfloat16", "eager", "tuned"),  # pre-cast weights, freezing, max-autotune
    "recurx-fp32": ("float32", "cpu", "eager"),
    "eager-fp32": ("float32", "eager", "eager"),
    "compile-fp32": ("float32", "eager", "compile"),
}


def build(case: str, variant: str) -> torch.nn.Module:
    """The model of a case with one seed's weights, in the variant's dtype, on its backend."""
    dtype, backend, mode = VARIANTS[variant]
    torch.manual_seed(0)
    model = CASES[case](forward_dtype=dtype).eval()
    model.inner.backend = backend
    with torch.no_grad():  # zero embeddings and a zero q head would not exercise their products
        model.inner.puzzle_emb.weights.normal_()
        model.inner.q_head.weight.normal_(std=0.02)
        for name, start in model.inner.named_buffers():
            if name.endswith("_init"):  # same start in every dtype
                generator = torch.Generator().manual_seed(len(name))
                start.copy_(torch.randn(start.shape, generator=generator))
    return model.to(torch.bfloat16) if mode == "tuned" else model


def sample(model: torch.nn.Module, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Seeded tokens and a seeded carry: real data, since zeros run faster on AMX."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    tokens = torch.randint(
        1, config.vocab_size, (batch, config.seq_len), generator=generator, dtype=torch.int32
    )
    carry = {
        name: torch.randn(batch, config.tokens, config.hidden_size, generator=generator)
        for name in model.inner.schedule.states
    }
    ids = torch.zeros(batch, dtype=torch.int32)
    carry = {name: state.to(config.dtype) for name, state in carry.items()}
    return {"inputs": tokens, "puzzle_identifiers": ids}, carry


def step_function(model: torch.nn.Module, mode: str) -> Callable[..., Any]:
    """One supervision step with embedding and heads, compiled as the mode says."""
    if mode == "eager":
        return model.inner
    if mode == "compile":
        return torch.compile(model.inner)
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(model.inner, mode="max-autotune-no-cudagraphs")


def _peak_rss_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _rss_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


class Worker:
    """Holds one variant, and answers `start` and `time`."""

    def __init__(self, case: str, variant: str, batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.mode = VARIANTS[variant][2]
        self.model = build(case, variant)
        self.batch, self.carry = sample(self.model, batch)
        self.run = step_function(self.model, self.mode)

    @torch.no_grad()
    def start(self, output: str) -> dict[str, Any]:
        """The first step: its logits and states go to `output`; its seconds (compiling and packing
        included) and its peak of resident memory above the loaded model, in MiB (packed weights,
        scratch and the states that leave included)."""
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak below
        before = _rss_kib()
        begin = time.perf_counter()
        states, logits, _ = self.run(self.carry, self.batch)
        first = time.perf_counter() - begin
        peak = (_peak_rss_kib() - before) / 1024
        if self.mode != "eager":
            self.run(self.carry, self.batch)
        torch.save({"logits": logits.float(), **{k: v.float() for k, v in states.items()}}, output)
        return {"first_seconds": first, "first_peak_mib": peak}

    @torch.no_grad()
    def time(self) -> dict[str, Any]:
        begin = time.perf_counter()
        self.run(self.carry, self.batch)
        return {"seconds": time.perf_counter() - begin}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to standard output; keep replies apart
    worker = Worker(**arguments)
    for line in sys.stdin:
        command = json.loads(line)
        reply = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
