"""Nets on the Hugging Face Hub, or in a folder as it keeps them, by the mixin of huggingface_hub.

    hub.save_pretrained("net", model, {"task": "sudoku", "solve": {"max_steps": 64}})
    hub.push_to_hub("somebody/net", model, extra)
    hub.from_pretrained("somebody/net").build()

A net is `model.safetensors`, which is `recurx.save_checkpoint`'s file, beside a `config.json` and a
model card (`README.md`) for the Hub; `recurx.load_checkpoint` reads that file too.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from recurx.atomic import write_json
from recurx.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from recurx.errors import InvalidArgument

FILE, CONFIG = "model.safetensors", "config.json"  # the names that the Hub knows


def from_pretrained(name: str | os.PathLike[str], **how: Any) -> Checkpoint:
    """The net of a repository on the Hub, or of a folder that `save_pretrained` wrote.

    Args:
        name: "owner/name", or a folder, which comes first.
        how: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` as
            huggingface_hub has them; whatever else `recurx.load_checkpoint` takes. With
            HF_HUB_OFFLINE=1 in the environment nothing but the cache is asked.

    Raises:
        InvalidArgument: huggingface_hub is not installed.
        CheckpointError, FileNotFoundError: of `recurx.load_checkpoint`, of a folder too.
        huggingface_hub.errors.*: no such repository, no network, or not in the cache.
    """
    return _mixin().from_pretrained(name, **how).checkpoint


def save_pretrained(
    folder: str | os.PathLike[str], model: nn.Module, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a folder that `from_pretrained` reads, and the Hub takes.

    Args:
        model, extra: see `recurx.save_checkpoint`; `extra` comes back whole.

    Raises:
        InvalidArgument: no TRM or HRM, or huggingface_hub is not installed.
    """
    _mixin()(model, extra).save_pretrained(folder)


def push_to_hub(
    name: str, model: nn.Module, extra: Mapping[str, Any] | None = None, **how: Any
) -> str:
    """Make the repository "owner/name" if it is new, and upload the same files in one commit.

    Args:
        model, extra: see `recurx.save_checkpoint`.
        how: `private`, `token`, `branch`, `commit_message`, `create_pr`, ... of huggingface_hub.

    Returns:
        The address of the commit.

    Raises:
        InvalidArgument: no TRM or HRM, or huggingface_hub is not installed.
        huggingface_hub.errors.*: the Hub refuses.
    """
    return str(_mixin()(model, extra).push_to_hub(name, **how))


@functools.cache
def _mixin() -> Any:
    """The class by which the mixin saves and reads a recurx net; it imports huggingface_hub."""
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError as error:
        raise InvalidArgument(
            f"nets on the Hugging Face Hub: {error}. Run: pip install 'recurx[hub]'."
        ) from error

    class Pretrained(ModelHubMixin, library_name="recurx", tags=["recursive-reasoning"]):
        def __init__(self, model: Any = None, extra: Any = None) -> None:
            self.model, self.extra = model, extra
            self.checkpoint: Checkpoint | None = None

        def _save_pretrained(self, save_directory: Path) -> None:
            save_checkpoint(save_directory / FILE, self.model, self.extra)
            config = load_checkpoint(save_directory / FILE).config  # of whatever wraps the model
            write_json(save_directory / CONFIG, json.loads(config.to_json()))

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **how: Any) -> Pretrained:
            asked = {name: how.pop(name) for name in _OF_THE_HUB}
            if os.path.isdir(model_id):
                path = os.path.join(model_id, FILE)
            else:
                path = hf_hub_download(repo_id=model_id, filename=FILE, **asked)
            found = cls()
            found.checkpoint = load_checkpoint(path, **how)
            return found

    return Pretrained


_OF_THE_HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token")
