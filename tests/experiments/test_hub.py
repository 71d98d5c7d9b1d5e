"""Nets on the Hugging Face Hub: what is saved comes back whole, from a folder or a cache, and what
is pushed is that folder. No test asks a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import recurx
from recurx.experiments import hub
from recurx.models import HRM, TRM, ACTLossHead, HRMConfig, TRMConfig

EXTRA = {"task": "sudoku-4x4", "solve": {"max_steps": 3, "select": "rules", "rollouts": 2}}
ROOT = Path(recurx.__file__).parents[1]
FILES = ["README.md", "config.json", "model.safetensors"]


def small(kind: type = TRM) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {TRM: TRMConfig, HRM: HRMConfig}[kind].tiny(6, 16, hidden_size=16, num_heads=2)
    return kind(config).eval()


def same(model: torch.nn.Module, net: recurx.checkpoint.Checkpoint) -> None:
    built = net.build()
    assert net.config == model.config and net.extra == EXTRA and not net.assumed
    for name, tensor in model.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", [TRM, HRM])
def test_a_folder_gives_back_the_net_with_its_task_and_settings(kind, tmp_path) -> None:
    model = small(kind)
    hub.save_pretrained(tmp_path / "net", ACTLossHead(model, "softmax_cross_entropy"), EXTRA)
    assert sorted(file.name for file in (tmp_path / "net").iterdir()) == FILES
    net = hub.from_pretrained(tmp_path / "net")
    same(model, net)
    same(model, recurx.load_checkpoint(tmp_path / "net" / hub.FILE))
    assert net.recommended["rollouts"] == 2 and callable(net.recommended["select"])
    config = json.loads((tmp_path / "net" / hub.CONFIG).read_text())
    assert config == json.loads(model.config.to_json())
    assert "library_name: recurx" in (tmp_path / "net" / "README.md").read_text()
    # A further save replaces weights and configuration, and takes what load_checkpoint takes.
    hub.save_pretrained(tmp_path / "net", small(HRM), {})
    assert hub.from_pretrained(tmp_path / "net", halt_max_steps=5).config.halt_max_steps == 5


def test_without_a_network_the_cache_answers(tmp_path) -> None:
    """In a process whose environment says HF_HUB_OFFLINE=1, as huggingface_hub reads it once."""
    hub.save_pretrained(tmp_path / "net", small(), EXTRA)
    commit, cached = "0" * 40, tmp_path / "cache" / "models--somebody--net"
    shutil.copytree(tmp_path / "net", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = f"""
from recurx.experiments import hub
net = hub.from_pretrained("somebody/net", cache_dir={str(tmp_path / "cache")!r})
assert net.extra == {EXTRA!r} and net.build()
try:
    hub.from_pretrained("somebody/else", cache_dir={str(tmp_path / "cache")!r})
except Exception as error:
    print(type(error).__module__, error)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.stdout.startswith("huggingface_hub.errors") and "local cache" in told.stdout


def test_what_is_pushed_is_the_folder(tmp_path, monkeypatch) -> None:
    from huggingface_hub import hub_mixin

    asked: dict[str, object] = {}

    class Api:
        def __init__(self, token=None) -> None:
            asked["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            asked.update(repo_id=repo_id, private=private, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **more) -> str:
            shutil.copytree(folder_path, tmp_path / "remote")
            asked.update(more)
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    model = small()
    where = hub.push_to_hub("somebody/net", model, EXTRA, private=True, commit_message="A net")
    assert where == "https://huggingface.co/somebody/net/commit/1"
    assert asked["repo_id"] == "somebody/net" and asked["private"] and asked["exist_ok"]
    assert asked["commit_message"] == "A net" and asked["token"] is None
    assert sorted(file.name for file in (tmp_path / "remote").iterdir()) == FILES
    same(model, hub.from_pretrained(tmp_path / "remote"))


def test_mistakes_are_told(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        hub.from_pretrained(tmp_path)
    with pytest.raises(recurx.InvalidArgument, match="a TRM or HRM"):
        hub.save_pretrained(tmp_path / "net", torch.nn.Linear(2, 2))
    hub._mixin.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: hub.from_pretrained("somebody/net"),
        lambda: hub.save_pretrained(tmp_path / "net", small()),
        lambda: hub.push_to_hub("somebody/net", small()),
    ):
        with pytest.raises(recurx.InvalidArgument, match=r"pip install 'recurx\[hub\]'"):
            call()
    assert recurx.save_checkpoint(tmp_path / "a.safetensors", small()) is None  # needs no extra
