"""Predictions beside the measured rows: `recurx.plan` with the ceilings of the same run.

They are made from a result file's own numbers, when it is written and again when it is shown, so
an old file is judged by the model of today. A shared machine's speed wanders by tens of per cent
from group to group: the medians of all groups' ceilings are what the model gets. NOTE: a median
row can be predicted no better than the machine kept its speed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from recurx.bench.cases import CASES, DTYPES, SOLVE_STEPS
from recurx.bench.step_cost import solve_seconds, step_seconds, train_seconds
from recurx.bench.variants import Variant
from recurx.errors import BackendUnavailable
from recurx.plan import Device, LaunchPlan
from recurx.plan.device import AMX, WIDE, cpu_device, gpu_device
from recurx.problem import Problem

# For files of before these were measured: of a Zen 3.
OPERATOR_US, CACHE_BYTES = 12.6, 32 << 20
# A thread's, of a Xeon with AVX-512 (Granite Rapids: 25 to 29 at 4 to 56 MB); a Zen 3's is unseen.
STREAM_GBS = 28.0
# Flag -> the engine's name, of files that do not say it.
ISAS = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}


def device_of(document: dict[str, Any]) -> Device | None:
    """The processor of a result file by its own ceilings, None before any was measured; a GPU by
    its published rates."""
    facts = document["provenance"]
    if facts["device"] == "cuda":
        gpu = facts["gpu"]
        return gpu_device(gpu["name"], tuple(gpu["capability"]), gpu["multiprocessors"])
    found = [group["ceilings"] for group in document["groups"] if group.get("ceilings")]
    if not found:
        return None
    middle = {name: _median(name, found) for name in ("copy_gbs", "operator_us", "cache_bytes")}
    rates = {f"{d}_tflops": _median(f"large_{d}_tflops", found) for d in DTYPES}
    flags = facts["cpu"]["flags"]
    isa = next((isa for flag, isa in ISAS.items() if flag in flags), "portable")
    isa = facts["cpu"].get("engine") or isa
    if isa in AMX:  # a square product is not where matrix units are fastest
        rates["bf16_tflops"] = max(
            ceilings[f"{kind}_bf16_tflops"] for ceilings in found for kind in ("case", "large")
        )
    stream = STREAM_GBS * facts["threads"] if isa in WIDE else 0.0
    return cpu_device(
        facts["threads"], middle["copy_gbs"], **rates,
        operator_us=middle["operator_us"] or OPERATOR_US,
        cache_bytes=int(middle["cache_bytes"] or CACHE_BYTES),
        isa=isa, stream_gbs=_median("stream_gbs", found) or stream,
        barrier_us=_median("barrier_us", found), split_us=_median("split_us", found),
    )  # fmt: skip


def _median(name: str, ceilings: Sequence[dict[str, Any]]) -> float:
    values = [found[name] for found in ceilings if name in found]
    return statistics.median(values) if values else 0.0


def predict(document: dict[str, Any]) -> None:
    """Write `predicted_ms` into every timed row: of eager PyTorch and of backends with plans, else
    None."""
    device = device_of(document)
    for group in document["groups"]:
        known = device is not None and group["case"] in CASES
        problems = {d: problem_of(group, d, document) for d in DTYPES} if known else {}
        for row in group["rows"]:
            if row["status"] != "timed":
                continue
            seconds = None
            if device is not None and problems:
                seconds = _seconds(group["mode"], row, problems[row["dtype"]], device)
            row["predicted_ms"] = None if seconds is None else round(1e3 * seconds, 4)


def problem_of(group: dict[str, Any], dtype: str, document: dict[str, Any]) -> Problem:
    """The recursion of a group in a dtype."""
    from recurx.bench.problems import problem_of_config

    config = CASES[group["case"]].make(forward_dtype=DTYPES[dtype])
    return problem_of_config(config, group["batch"], document["provenance"]["device"])


def _seconds(mode: str, row: dict[str, Any], problem: Problem, device: Device) -> float | None:
    variant = Variant(row["engine"], row["dtype"])
    if not (variant.ours or variant.engine in ("eager", "eager-halt")):
        return None  # nothing here models a compiler
    try:
        if device.kind != "cpu":  # no GPU is modelled beyond its recursion
            picked = LaunchPlan.pick(problem, device, variant.backend)
            return picked.seconds(device) if mode == "step" else None
        if mode == "solve":
            return solve_seconds(problem, device, variant.backend, row["steps_mean"], SOLVE_STEPS)
        seconds = {"step": step_seconds, "train": train_seconds}[mode]
        return seconds(problem, device, variant.backend)
    except (BackendUnavailable, ImportError):
        return None  # a backend without plans, or without one for this
