"""State dicts of every system that has a look-alike: a patch changes no name, shape or value.

Files go both ways: into a patched model that has already run with other weights, and out of it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import recurx
from tests import lookalike, lookalike_nano
from tests.patching import test_patch_systems as systems
from tests.patching.test_patch import VARIANTS, step

Results = dict[str, Tensor]
FP32 = {"forward_dtype": "float32"}


def nano(model: Any) -> Results:
    """What it returns in six steps of training; the model is left as it was."""
    torch.manual_seed(1)
    return dict(enumerate(lookalike_nano.train(copy.deepcopy(model))))  # type: ignore[arg-type]


# name -> (makes one, runs one)
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Results]]] = {
    **{
        f"{name} {more}": (lambda name=name, more=more: lookalike.build(name, **FP32, **more), step)
        for name, more in VARIANTS
    },
    "nano": (lookalike_nano.build, nano),
    "nano, token MLP": (lambda: lookalike_nano.build(use_mlp_t=True), nano),
    **{
        name: (lambda name=name: systems.build(name), systems.results) for name in systems.MODELS
    },
}  # fmt: skip


def through_a_file(model: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moved(model: Any) -> Any:
    """The model with other weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight))
    return model


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_is_the_same_on_either_side(name: str) -> None:
    make, run = MODELS[name]
    own, patched, back = moved(make()), make(), make()
    for model in (own, patched, back):
        if hasattr(getattr(model, "L_level", None), "noise_scale"):
            model.L_level.noise_scale = 0.0  # EqR's draws other numbers
    want, before = run(own), patched.state_dict()
    recurx.patch(patched, backend="eager")  # the bits of its code: others are told by weights alone
    after = patched.state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    with pytest.raises(AssertionError):
        systems.agree(run(patched), want)  # of other weights

    patched.load_state_dict(through_a_file(own))  # strict
    systems.agree(run(patched), want)
    back.load_state_dict(through_a_file(moved(patched)))
    systems.agree(run(back), run(patched))
