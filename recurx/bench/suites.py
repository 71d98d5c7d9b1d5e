"""Suites: which groups (case, mode, batch) one run measures, most important first."""

from __future__ import annotations

from dataclasses import dataclass

from recurx.bench import variants
from recurx.errors import bad_argument


@dataclass(frozen=True)
class Group:
    """One table: a case in a mode at a batch size.

    Args:
        engines: "all", or names of ways (see `variants`), with "/fp32" for that dtype alone;
            "recurx" stands for every backend.
        dtypes: "bf16", "fp32".
        seconds: about how long its rounds take, starts not counted.
        interleave: False runs one variant after the other: for batches of which only one fits
            into the device's memory at a time.
    """

    case: str
    mode: str
    batch: int
    engines: tuple[str, ...] = ("all",)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    seconds: float = 10.0
    interleave: bool = True


FAIR = ("recurx", "eager")
BF16, FP32 = ("bf16",), ("fp32",)
ISSUED = ("recurx", "eager", "graph", "compile", "reduce-overhead", "max-autotune")

SUITES: dict[str, tuple[Group, ...]] = {
    # A quarter of an hour on two cores, most of it for compiling and exporting. Without bf16
    # instructions eager bf16 takes 1.5 s a step at B=1 and 12 s at B=8.
    "cpu": (
        Group("trm-att", "step", 1, seconds=30),
        Group("trm-att", "step", 8, ("recurx", "eager", "compile", "peers"), seconds=25),
        Group("trm-mlp", "step", 1, ("recurx", "eager", "compile", "peers"), seconds=12),
        Group("hrm", "step", 1, ("recurx", "eager", "peers"), seconds=12),
        Group("sudoku-6x6", "solve", 256, ("recurx", "eager", "eager-halt"), FP32, seconds=8),
        Group("trm-att", "train", 1, ("recurx", "eager", "compile"), FP32, seconds=10),
        Group("trm-att", "train", 8, ("recurx", "eager", "compile"), seconds=25),
        Group("arc", "step", 1, ("recurx", "eager", "compile", "peers"), seconds=20),
        Group("small-64", "step", 64, ("recurx", "eager", "compile"), FP32, seconds=4),
        Group("small-64", "train", 64, FAIR, FP32, seconds=5),
        Group("small-256", "step", 64, FAIR, FP32, seconds=5),
        Group("small-64", "step", 1, FAIR, FP32, seconds=3),
    ),
    # Blocks and steps of later systems beside the reference, which does as their own code does.
    "systems": (
        *(
            Group(case, "step", batch, FAIR, seconds=6)
            for case in ("eqr", "urm", "sotaku", "sic", "hrm-text")
            for batch in (1, 8)
        ),
        *(
            Group(case, "train", 1, FAIR, FP32, seconds=8)
            for case in ("eqr", "urm", "sotaku", "sic", "hrm-text", "drops")
        ),
        Group("eqr", "train", 8, FAIR, seconds=12),
    ),
    # Everything that the targets for one GPU name, and small nets.
    "gpu": (
        Group("trm-att", "step", 512, ISSUED, BF16),
        Group("trm-att", "step", 64, ISSUED, BF16),
        Group("trm-att", "step", 1, ISSUED, BF16, seconds=5),
        Group("trm-att", "train", 768, ISSUED, BF16, seconds=5, interleave=False),
        Group("trm-mlp", "step", 512, ISSUED, BF16),
        Group("trm-att", "step", 8, ISSUED, BF16, seconds=5),
        Group("arc", "step", 64, ISSUED, BF16),
        Group("sudoku-6x6", "solve", 4096, ("recurx", "eager", "eager-halt", "compile"), BF16),
        Group("trm-mlp", "step", 64, ISSUED, BF16),
        Group("trm-att", "step", 132, ISSUED, BF16, seconds=5),
        Group("arc", "train", 192, ISSUED, BF16, seconds=5, interleave=False),
        Group("trm-mlp", "train", 768, ISSUED, BF16, seconds=5, interleave=False),
        Group("trm-mlp", "step", 1, ISSUED, BF16, seconds=5),
        Group("trm-mlp", "step", 8, ISSUED, BF16, seconds=5),
        Group("hrm", "step", 64, ISSUED, BF16, seconds=5),
        Group("small-64", "step", 1024, ISSUED, BF16, seconds=3),
    ),
    # The same tables without torch.compile, whose starts take most of the time.
    "gpu-quick": tuple(
        Group(case, mode, batch, ("recurx", "eager", "graph"), BF16, 3, mode != "train")
        for case, mode, batch in (
            ("trm-att", "step", 64), ("trm-att", "step", 1), ("trm-att", "step", 512),
            ("trm-att", "train", 768), ("trm-mlp", "step", 64), ("trm-mlp", "step", 512),
            ("arc", "step", 64), ("trm-att", "step", 8), ("sudoku-6x6", "solve", 4096),
            ("arc", "train", 192),
        )
    ),
    # Seconds: does everything still run? No figure of it means anything.
    "smoke": (
        Group("toy", "step", 2, FAIR, seconds=0.2),
        Group("toy", "train", 2, FAIR, FP32, seconds=0.2),
        Group("toy-solve", "solve", 4, ("recurx", "eager", "eager-halt"), FP32, seconds=0.2),
    ),
}  # fmt: skip


def suite(name: str) -> tuple[Group, ...]:
    """The groups of a suite.

    Raises:
        InvalidArgument: unknown; the known ones are listed.
    """
    if name not in SUITES:
        raise bad_argument("bench", "suite", f"one of {', '.join(SUITES)}", repr(name))
    return SUITES[name]


def variants_of(group: Group, device: str) -> list[variants.Variant]:
    """The variants of a group that exist on a device, the yardsticks of their dtypes included."""
    found = []
    for dtype in group.dtypes:
        wanted = {name.removesuffix(f"/{dtype}") for name in group.engines}
        names = [
            name
            for name in variants.engines(device, group.mode)
            if "all" in wanted
            or name in wanted
            or (name not in variants.WAYS and "recurx" in wanted)
            or (name in variants.WAYS and variants.WAYS[name].package and "peers" in wanted)
        ]
        if variants.YARDSTICK not in names:
            names.append(variants.YARDSTICK)
        found += [
            variants.Variant(name, dtype)
            for name in names
            if name not in variants.WAYS or dtype in variants.WAYS[name].dtypes
        ]
    return found
