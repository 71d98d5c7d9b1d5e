"""`experiment variants` at sizes of seconds, and its verdict by hand."""

from __future__ import annotations

import json

import pytest
from toy_nets import TASK, arguments_of

from recurx.commands import main
from recurx.experiments import variants


def test_variants_command(tmp_path, capsys) -> None:
    toy = ["experiment", "variants", "--task", TASK, "--steps", "4", "--supervision", "2",
           "--batch-size", "8", "--count", "12", "--seeds", "2", "--tries", "2"]  # fmt: skip
    assert main([*toy, "--out", str(tmp_path), "--no-plot"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == list(variants.VARIANTS)
    assert all(set(row["ways"]) == set(variants.WAYS) for row in result["rows"])
    nets = {net["label"]: net for net in result["nets"]}
    assert len(result["nets"]) == 16 and all(net["steps"] == 4 for net in result["nets"])
    assert nets["starts"]["asked"]["train"]["random_starts"]
    assert nets["eqr"]["asked"]["train"]["model"]["damping"] == 0.95
    assert nets["eqr"]["parameters"] == nets["plain"]["parameters"]
    assert 1 < nets["conv"]["parameters"] / nets["plain"]["parameters"] < 1.05
    assert nets["softmax"]["asked"]["train"]["model"]["feedback"] == "softmax"
    assert nets["softmax"]["parameters"] > nets["plain"]["parameters"]
    assert "softmax fed back" in capsys.readouterr().out
    assert main([*toy, "--out", str(tmp_path), "--no-plot", "--variants", "starts"]) == 2
    assert "compares starts with plain, which is missing" in capsys.readouterr().err


def rows(**exact: list[float]) -> list[dict]:
    from recurx.experiments.session import spread

    return [
        {"name": name, "ways": {way: spread([v - 0.1 * n for v in values])
                                for n, way in enumerate(reversed(variants.WAYS))}}
        for name, values in exact.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("starts", "holds"),
    [([0.8, 0.9, 0.85], True), ([0.8, 0.9, 0.59], False), ([0.64, 0.72, 0.62], False)],
)
def test_the_claim_holds_by_its_rule(starts: list[float], holds: bool) -> None:
    """More with every seed, and by more than the seeds differ."""
    verdict = variants._verdict(rows(plain=[0.6, 0.7, 0.6], starts=starts))
    assert verdict["holds"] is holds and len(verdict["findings"]) == 2
    assert "by tries, residual" in verdict["findings"][1]


def test_each_variant_has_its_own_baseline() -> None:
    """ConvSwiGLU with attention is compared with attention, whatever plain TRM does."""
    found = rows(plain=[0.9, 0.9], attention=[0.5, 0.5], **{"attention-conv": [0.6, 0.6]})
    verdict = variants._verdict(found)
    assert verdict["holds"] and "+10.0 points" in verdict["findings"][2]
    assert not variants._verdict(rows(plain=[0.9, 0.9], conv=[0.6, 0.6]))["holds"]


@pytest.mark.parametrize("name", [n for n in variants.VARIANTS if variants._baseline(n) != n])
def test_variants_differ_in_nothing_else(name: str) -> None:
    asked = arguments_of(variants, "--task", TASK)
    baseline = variants._baseline(name)
    plain, changed = (vars(variants.net_config(asked, each, 3)) for each in (baseline, name))
    _, model, training = variants.VARIANTS[name]
    assert changed == plain | training | {"model": plain["model"] | model} != plain
