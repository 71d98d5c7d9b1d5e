"""`recurx.export_onnx`: another engine computes the same step from the file."""

from __future__ import annotations

import importlib.util

import onnx
import onnxruntime
import pytest
import torch

import recurx
from recurx.commands import main
from recurx.models import HRM, TRM, HRMConfig, TRMConfig

FEW = {"H_cycles": 2, "L_cycles": 1, "forward_dtype": "float32"}  # an export takes a second a call
MODELS = {
    "attention": lambda: TRM(TRMConfig.tiny(7, 9, **FEW, puzzle_emb_ndim=64)),
    "tokens": lambda: TRM(TRMConfig.tiny(7, 9, **FEW, mlp_t=True, pos_encodings="none")),
    "single-z": lambda: TRM(TRMConfig.tiny(7, 9, **FEW, variant="single_z")),
    "hrm": lambda: HRM(HRMConfig.tiny(7, 9, **FEW)),
}


def step(model, batch):
    """The arguments of one step, and what the model gives."""
    generator = torch.Generator().manual_seed(1)
    data = {
        "inputs": torch.randint(0, 7, (batch, 9), generator=generator, dtype=torch.int32),
        "puzzle_identifiers": torch.zeros(batch, dtype=torch.int32),
    }
    carry = {
        name: torch.randn(z.shape, generator=generator)
        for name, z in model.inner.empty_carry(batch).items()
    }
    with torch.no_grad():
        states, logits, (q_halt, q_continue) = model.inner(carry, data)
    want = {f"new_{name}": z for name, z in states.items()}
    return data | carry, want | {"logits": logits, "q_halt": q_halt, "q_continue": q_continue}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_another_engine_gives_the_same_step(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    torch.nn.init.normal_(model.inner.q_head.weight)
    model.backend = "eager"
    path = tmp_path / "step.onnx"
    path.write_text("an older file")
    recurx.export_onnx(model, path, batch_size=3)
    assert model.training and model.backend == "eager"
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"]
    feeds, want = step(model.eval(), 3)
    session = onnxruntime.InferenceSession(path)
    feeds = {i.name: feeds[i.name].numpy() for i in session.get_inputs()}
    got = dict(zip(want, session.run(list(want), feeds), strict=True))
    for name, value in want.items():
        assert (torch.from_numpy(got[name]) - value).norm() < 1e-4 * value.norm(), name
    # Weights are shared by all net calls: those of the file are those of the model.
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    assert stored < 1.2 * sum(p.nbytes for p in model.parameters()) + 1e5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "net"), [("attention", "L"), ("tokens", "L"), ("hrm", "H")])
def test_a_net_alone(kind, net, tmp_path, capsys):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    checkpoint, out = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    recurx.save_checkpoint(checkpoint, model)
    words = ["export", str(checkpoint), str(out), "--batch", "2", "--net"]
    assert main([*words, net]) == 0
    h = torch.randn(2, model.config.tokens, model.config.hidden_size)
    with torch.no_grad():
        want = model.inner.nets()[net](h, model.inner.cos_sin())
    (got,) = onnxruntime.InferenceSession(out).run(["new_h"], {"h": h.numpy()})
    assert (torch.from_numpy(got) - want).norm() < 1e-5 * want.norm()
    other = {"L": "H", "H": "L"}[net]
    if other in model.inner.nets():  # the limit tells one net from the other
        with torch.no_grad():
            wrong = model.inner.nets()[other](h, model.inner.cos_sin())
        assert (wrong - want).norm() > 0.1 * want.norm()
    assert main([*words, "Q"]) == 2 and "--net" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    with pytest.raises(recurx.InvalidArgument, match=r"needs onnx;.*recurx\[onnx\]"):
        recurx.export_onnx(MODELS["hrm"](), tmp_path / "step.onnx")
    with pytest.raises(recurx.InvalidArgument, match=r"a recurx\.models\.TRM or HRM"):
        recurx.export_onnx(torch.nn.Linear(2, 2), tmp_path / "step.onnx")


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    checkpoint, out = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    recurx.save_checkpoint(checkpoint, MODELS["attention"]())
    assert main(["export", str(checkpoint), str(out), "--batch", "2"]) == 0
    assert str(out) in capsys.readouterr().out
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert main(["export", str(tmp_path / "none.pt"), str(out)]) == 2
