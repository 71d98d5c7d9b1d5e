"""Whatever draws from a generator says where: under `with torch.device("cuda")` it would be there,
and a CPU generator is refused. Without a GPU nothing else shows it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "recurx"


def silent_draws(source: str) -> Iterator[int]:
    """Lines with torch.x(..., generator=g) or torch.x(...).x_(generator=g) without a device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not any(k.arg == "generator" for k in node.keywords):
            continue
        call = node
        owner = getattr(node.func, "value", None)
        if isinstance(owner, ast.Call):  # a method of a new tensor
            call = owner
        function = call.func
        of_torch = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch"
        if of_torch and not any(k.arg in ("device", None) for k in call.keywords):
            yield node.lineno


def test_every_draw_of_the_library_says_its_device() -> None:
    found = [
        f"{path}:{line}"
        for path in ROOT.rglob("*.py")
        if not {"bench", "experiments"} & set(path.parts)
        for line in silent_draws(path.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    "line", ["torch.randn(3, generator=g)", "torch.empty(3).uniform_(generator=g)"]
)
def test_it_bites(line: str) -> None:
    assert list(silent_draws(line))
    assert not list(silent_draws(line.replace("3", "3, device='cpu'")))
