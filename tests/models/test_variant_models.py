"""Models whose blocks and steps differ from TRM's: built by a configuration, run and solved."""

from __future__ import annotations

import pytest
import torch

import recurx
from recurx import InvalidArgument, reference
from recurx.models import TRM
from recurx.models.config import TRMConfig
from recurx.nets import read_stack
from recurx.proof import examine

BLOCKS = (
    "conv:2",
    "norm:layer,norm_weight:true,norm_bias:true,placement:pre,biases:qkv+o,activation:relu,"
    "gated:false",
    "kv_heads:1,attn_gate:true,mask:causal,qk_norm:rms,learned_scale:channel,learned_skip:scalar",
    "axial:3+4+1,inner_norm:rms,inner_norm_of:product",
)


def made(**changes: object) -> TRM:
    torch.manual_seed(0)
    return TRM(TRMConfig.tiny(5, 12, H_cycles=2, L_cycles=2, **changes))


def batch(count: int = 3) -> dict[str, torch.Tensor]:
    inputs = torch.randint(0, 5, (count, 12), generator=torch.Generator().manual_seed(1))
    return {"inputs": inputs, "labels": inputs}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_is_the_reference_of_its_spec(block: str) -> None:
    model = made(block=block).eval()
    inner = model.inner
    net = read_stack(inner.L_level)
    assert net.spec.blocks == (inner.config.block_spec,) * 2
    assert examine(inner.L_level, "L", inner.cos_sin() is not None).difference is None
    x = inner.embed(batch()["inputs"])
    want = reference.run(inner.schedule, {"L": net}, x, inner.initial_states(3), inner.cos_sin())
    states, _, _ = inner(inner.initial_states(3), batch())
    for name, state in want.items():
        torch.testing.assert_close(states[name], state, rtol=1e-4, atol=1e-5)
    weight = inner.L_level.layers[0].weights["down"]
    with torch.no_grad():
        weight.mul_(1.5)  # what was remembered of the module is not what it was
    again, _, _ = inner(inner.initial_states(3), batch())
    assert not torch.allclose(again["z_H"], states["z_H"])


def test_gradients_reach_every_weight() -> None:
    model = made(block=BLOCKS[2], damping=0.9, noise=0.1)
    _, logits, _ = model.inner(model.inner.initial_states(3), batch())
    logits.square().sum().backward()
    for name, weight in model.inner.L_level.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_saved_and_loaded(tmp_path) -> None:
    model = made(block=BLOCKS[1], damping=0.9)
    recurx.save_checkpoint(tmp_path / "net.safetensors", model)
    loaded = recurx.load_checkpoint(tmp_path / "net.safetensors").build()
    assert loaded.config == model.config and loaded.inner.schedule == model.inner.schedule
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_solve_answers_as_the_steps_do() -> None:
    model = made(block=BLOCKS[0], damping=0.8).eval()
    answers = recurx.solve(model, batch(), max_steps=3, halt=None)
    states = model.inner.initial_states(3)
    for _ in range(3):
        states, logits, _ = model.inner(states, batch())
    assert torch.equal(answers.predictions.cpu(), logits.argmax(-1))


def test_noise_of_training_is_saved_with_the_weights() -> None:
    """A restart draws what would have been drawn; evaluation moves nothing."""
    model = made(noise=0.5).train()
    start = model.inner.initial_states(3)
    model.inner(start, batch())
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = model.inner(start, batch())[0]["z_H"]
    other = made(noise=0.5).train()
    other.load_state_dict(held)
    assert torch.equal(other.inner(start, batch())[0]["z_H"], want)
    before = model.inner.noise_seed.clone()
    model.eval().inner(start, batch())
    assert torch.equal(model.inner.noise_seed, before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(block="mamba:1"), "mamba"),
        (dict(block="conv:two"), "conv"),
        (dict(block="gated:perhaps"), "gated"),
        (dict(block="kv_heads:3"), "kv_heads"),
        (dict(noise=-1.0), "noise"),
        (dict(block=3), "block"),
    ],
)
def test_impossible_variants_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        made(**changes)
