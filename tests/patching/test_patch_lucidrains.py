"""recurx.patch on lucidrains' package from PyPI (pip install tiny-recursive-model)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import BackendUnavailable, UnsupportedModel
from recurx.models.config import TRMConfig
from recurx.models.layers import ReasoningNet
from recurx.patching.handle import installed
from recurx.route import has_fused
from tests import lucidrains

lucid = pytest.importorskip("tiny_recursive_model")

TOKENS, WIDTH, IDS = 12, 16, 8


def foreign(width: int = WIDTH) -> nn.Module:
    """A network that no reader knows; the one that `build` takes if none is given."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def build(
    network: nn.Module | None = None, registers: int = 0, width: int = WIDTH, **fields: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = lucid.TinyRecursiveModel(
        dim=width,
        num_tokens=IDS,
        network=network or foreign(width),
        num_register_tokens=registers,
        num_refinement_blocks=fields.pop("blocks", 3),
        num_latent_refinements=fields.pop("latents", 4),
    )
    with torch.no_grad():
        model.to_halt_pred[1].weight.normal_()
    return model


def puzzles(batch: int = 5) -> Tensor:
    return torch.randint(0, IDS, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def two_steps(model: Any) -> dict[str, Tensor]:
    return lucidrains.two_steps(model, puzzles())


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), f"{name}: {(got[name] - tensor).abs().max()}"


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("blocks,latents", [(3, 4), (2, 1)])
def test_training_and_prediction_have_the_same_bits(
    registers: int, blocks: int, latents: int
) -> None:
    model = build(registers=registers, blocks=blocks, latents=latents)
    want, names = two_steps(model), list(model.state_dict())
    want_pred, want_steps = model.predict(puzzles())
    handle = recurx.patch(model)
    same(two_steps(model), want)
    pred, steps = model.predict(puzzles())
    assert torch.equal(pred, want_pred) and torch.equal(steps, want_steps)
    assert list(model.state_dict()) == names
    text = str(handle.report)
    assert "the network (Sequential, foreign code)" in text and "bit-identical" in text
    handle.remove()
    assert installed(model, "deep_refinement") is None
    same(two_steps(model), want)


def test_copies_and_pickles() -> None:
    model = build()
    want = two_steps(model)
    recurx.patch(model)
    copied = copy.deepcopy(model)
    assert installed(copied, "deep_refinement") is not None
    same(two_steps(copied), want)
    loaded = pickle.loads(pickle.dumps(build_patched()))
    assert installed(loaded, "deep_refinement") is None
    same(two_steps(loaded), two_steps(build()))


def build_patched() -> nn.Module:
    model = build()
    recurx.patch(model)
    return model


def test_autocast_stays_as_the_user_set_it() -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = two_steps(model)
        recurx.patch(model)
        got = two_steps(model)
    assert got["0.pred"].dtype == want["0.pred"].dtype
    for name in ("0.loss", "1.loss", "1.outputs"):
        torch.testing.assert_close(got[name], want[name], rtol=0.05, atol=0.05, check_dtype=False)


def test_a_network_of_recurx_runs_fused() -> None:
    config = TRMConfig.tiny(IDS, TOKENS, hidden_size=64, num_heads=2)
    model = build(ReasoningNet(config, 1), width=64).eval()
    want = model.predict(puzzles())
    handle = recurx.patch(model)
    got = model.predict(puzzles())
    assert "and the network (ReasoningNet)" in str(handle.report)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    if has_fused("cpu"):
        assert "auto -> cpu" in str(handle.report)


def test_classes_and_the_imported_package() -> None:
    for target in (lucid, lucid.TinyRecursiveModel):
        with recurx.patch(target):
            assert installed(build(), "deep_refinement") is not None
        assert installed(build(), "deep_refinement") is None


def test_an_explicit_backend_refuses_foreign_code() -> None:
    with pytest.raises(BackendUnavailable, match="foreign code"):
        recurx.patch(build(), backend="cpu")


def test_losses_at_every_block_are_refused() -> None:
    """The package's second class stops gradient between blocks, and asks for all their outputs."""
    module = pytest.importorskip("tiny_recursive_model.trm_dense_loss")
    model = module.TinyRecursiveModel(dim=WIDTH, num_tokens=IDS, network=foreign())
    with pytest.raises(UnsupportedModel, match="its loop computes something else"):
        recurx.patch(model)


class OtherOrder(lucid.TinyRecursiveModel):
    """Adds in another order, and only there."""

    def refine_latent_then_output_once(
        self, inputs: Tensor, outputs: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.num_latent_refinements):
            latents = self.network(latents + (outputs + inputs))
        return self.network(outputs + latents), latents


class FullGradient(lucid.TinyRecursiveModel):
    """Gradient through every block."""

    def deep_refinement(
        self, inputs: Tensor, outputs: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.num_refinement_blocks):
            outputs, latents = self.refine_latent_then_output_once(inputs, outputs, latents)
        return outputs, latents


class OneMore(lucid.TinyRecursiveModel):
    """One call more at the end."""

    def refine_latent_then_output_once(
        self, inputs: Tensor, outputs: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs, latents = super().refine_latent_then_output_once(inputs, outputs, latents)
        return self.network(outputs), latents


@pytest.mark.parametrize("cls", [OtherOrder, FullGradient, OneMore])
def test_loops_that_differ_are_refused(cls: type[nn.Module]) -> None:
    model = cls(dim=WIDTH, num_tokens=IDS, network=nn.Linear(WIDTH, WIDTH))
    with pytest.raises(UnsupportedModel, match="its loop computes something else"):
        recurx.patch(model)
    assert "deep_refinement" not in vars(model)
    assert isinstance(model.network, nn.Linear), "the stand-in network must be gone"


def test_other_arguments_are_refused() -> None:
    class Masked(lucid.TinyRecursiveModel):
        def deep_refinement(
            self, inputs: Tensor, outputs: Tensor, latents: Tensor, mask: Tensor
        ) -> tuple[Tensor, Tensor]:
            return super().deep_refinement(inputs * mask, outputs, latents)

    with pytest.raises(UnsupportedModel, match="takes"):
        recurx.patch(Masked(dim=WIDTH, num_tokens=IDS, network=nn.Linear(WIDTH, WIDTH)))


def test_refinements_that_change_after_the_patch_are_followed() -> None:
    model, plain = build_patched(), build()
    assert plain.num_latent_refinements != 2
    model.num_latent_refinements = plain.num_latent_refinements = 2
    same(two_steps(model), two_steps(plain))


def test_under_torch_compile() -> None:
    torch._dynamo.reset()
    model = build(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), blocks=2, latents=1)
    outputs, latents = (t.detach() for t in model.get_initial())
    inputs = torch.randn(2, TOKENS, WIDTH)
    want = model.deep_refinement(inputs, outputs, latents)[0]
    recurx.patch(model)

    def loop(inputs: Tensor) -> Tensor:
        return model.deep_refinement(inputs, outputs, latents)[0]

    got = torch.compile(loop, fullgraph=True, backend="eager")(inputs)
    torch.testing.assert_close(got, want)
