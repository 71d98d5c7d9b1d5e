"""Reading official checkpoints and our own, and writing ours.

An official checkpoint is `torch.save` of a state_dict whose names carry the wrappers of the moment
(recurx/state_names.py). Ours is one safetensors file with the configuration in its
metadata. Neither is ever unpickled beyond tensors, and of a large puzzle embedding only the rows
that are asked for leave the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recurx import weights_file
from recurx.atomic import save_tensors
from recurx.errors import CheckpointError, bad_argument, reading
from recurx.models.act import RecursiveModel
from recurx.models.config import ModelConfig, TRMConfig, check_values, config_class
from recurx.models.infer import TABLE, check_names_and_shapes, infer_config, untrained
from recurx.state_names import official_name

_CONFIG, _EXTRA = "recurx.config", "recurx.extra"  # metadata keys of our files
_OFFICIAL_CONFIG = "all_config.yaml"  # what the official training leaves beside its checkpoints
LARGEST_YAML = 1 << 18  # bytes; theirs have 2,000, and the parser reads 100,000 a second
_FIELDS = frozenset(TRMConfig.__dataclass_fields__)


@dataclass(eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """Weights under the official names without wrappers, and the model that they belong to.

    A mapping {name: tensor}: `model.load_state_dict(checkpoint)` works; `build` makes the model.

    Args:
        path: the file.
        state_dict: {name: tensor} on the CPU; the puzzle table holds the asked rows only.
        config: configuration of the model (see `assumed`).
        assumed: {field: why} for each field that neither the file nor the caller told.
        puzzle_rows: [rows] int64, the original number of each row of the table; None for all.
        extra: what `save_checkpoint` was given as `extra`.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: ModelConfig
    assumed: dict[str, str] = field(default_factory=dict)
    puzzle_rows: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.state_dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)

    def build(self, backend: str = "auto", **changes: Any) -> RecursiveModel:
        """The model with a copy of these weights, in evaluation mode, on the CPU.

        The table of puzzle embeddings is not copied: models built twice share it.

        Args:
            backend: see `recurx.recurse`.
            changes: fields of the configuration to change, e.g. `halt_max_steps=32`.

        Raises:
            CheckpointError: the weights do not fit the changed configuration.
        """
        config = self.config.replace(**changes)
        with reading(self.path, "its configuration"):
            check_names_and_shapes(config, self.state_dict)
        model = untrained(config, backend)
        rest = dict(self.state_dict)
        if TABLE in rest:  # no second table of gigabytes, not even for a moment
            model.inner.puzzle_emb.weights = rest.pop(TABLE)
        model.load_state_dict(rest, strict=False)  # strict was `check_names_and_shapes`
        return model.eval()

    @property
    def recommended(self) -> dict[str, Any]:
        """Arguments of `recurx.solve` that suit the net: `extra["solve"]`, where "select" may be
        "rules", which becomes the check of the task `extra["task"]`. {} if the file has none.

        Raises:
            CheckpointError: it recommends the rules of a task that it does not name.
        """
        from recurx import tasks

        how = dict(self.extra.get("solve") or {})
        if how.get("select") == "rules":
            if "task" not in self.extra:
                raise CheckpointError(
                    f"{self.path} recommends select='rules' and does not say of which task: pass "
                    f"`**net.extra['solve'] | {{'select': recurx.tasks.get(TASK).accepts}}`."
                )
            how["select"] = tasks.get(self.extra["task"]).accepts
        return how

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.config!r}"]
        lines += [f"  assumed {name}={getattr(self.config, name)!r}: {why}"
                  for name, why in self.assumed.items()]  # fmt: skip
        return "\n".join(lines)


def load_checkpoint(
    path: str | os.PathLike[str],
    puzzle_rows: Iterable[int] | Tensor | None = None,
    *,
    ema: bool | None = None,
    config: ModelConfig | Mapping[str, Any] | None = None,
    **fields: Any,
) -> Checkpoint:
    """Read a checkpoint of TRM or HRM: an official one of any name, or a safetensors file.

    Args:
        path: a file of `torch.save` (official: `step_N`, no suffix) or of safetensors.
        puzzle_rows: numbers of the rows of the puzzle embedding to read, in the order wanted;
            None for all. The table then has just these rows, so puzzle ids count in them.
        ema: of a file that holds the weights and their average: True takes the average, False the
            weights as trained; None refuses such a file.
        config: configuration, or part of one; what it does not say is read from the file's
            metadata, from the shapes, from `all_config.yaml` beside the file, or taken as
            published (and listed in `.assumed`).
        fields: single fields of the configuration, e.g. `seq_len=81`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, holds pickled code, or names and shapes that are
            not those of a TRM or HRM; the message names keys and shapes.
    """
    path = Path(path)
    given = config.to_dict() if isinstance(config, ModelConfig) else dict(config or {})
    given |= fields
    rows = None if puzzle_rows is None else weights_file.row_numbers(puzzle_rows)
    state, metadata = weights_file.read(path, rows, ema)
    if rows is not None and TABLE not in state:
        raise CheckpointError(f"{path}: puzzle_rows was given, but there is no {TABLE!r} in it.")
    check_values("load_checkpoint", given)
    stored = _own_values(path, metadata) if _CONFIG in metadata else {}
    if "encoder_width" in stored:
        raise CheckpointError(f"{path}: a hybrid: recurx.hybrid.HybridReasoner.load reads it.")
    known = {**_official_config(path), **stored, **given}
    if rows is not None:
        known["num_puzzle_identifiers"] = len(rows)
    with reading(path, "its configuration"):
        certain, assumed = infer_config(state, known)
        check_names_and_shapes(certain, state)
    with reading(path, f"unreadable {_EXTRA} in its metadata"):
        extra = _json_object(metadata.get(_EXTRA, "{}"))
        how, named = extra.get("solve") or {}, extra.get("task", "")
        if not isinstance(how, dict) or not isinstance(named, str):
            raise TypeError("expected a name under `task`, and arguments of solve under `solve`")
    return Checkpoint(path, state, certain, assumed, rows, extra)


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, extra: Mapping[str, Any] | None = None
) -> None:
    """Write the weights of a TRM or HRM (wrapped in whatever) as one safetensors file, atomically.

    The file appears under its name complete or not at all (`recurx.atomic`).

    Args:
        path: where; an existing file is replaced.
        model: a `TRM` or `HRM`, also inside a loss head, DDP or `torch.compile`.
        extra: values that JSON can hold (step, metrics, ...), returned by `load_checkpoint`.
    """
    path = Path(path)
    inner = next((m for m in model.modules() if isinstance(m, RecursiveModel)), None)
    if inner is None:
        raise bad_argument("save_checkpoint", "model", "a TRM or HRM", type(model).__name__)
    state: dict[str, Tensor] = {}
    seen: set[int] = set()  # tied weights are written twice: the format refuses shared memory
    for name, tensor in inner.state_dict().items():
        whole = tensor.detach().contiguous()
        place = whole.untyped_storage().data_ptr()
        state[official_name(name)] = whole.clone() if place in seen else whole
        seen.add(place)
    metadata = {
        "format": "pt",
        _CONFIG: inner.config.to_json(),
        _EXTRA: json.dumps(dict(extra or {})),
    }
    save_tensors(path, state, metadata)


def read_own(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a file that `save_checkpoint` wrote, of whatever model."""
    state, metadata = weights_file.read(path, None)
    if _CONFIG not in metadata:
        raise CheckpointError(f"{path}: not written by recurx: no {_CONFIG} in its metadata.")
    return state, _own_values(path, metadata)


def _own_values(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in the metadata of our own files."""
    with reading(path, f"unreadable {_CONFIG} in its metadata"):
        values = _json_object(metadata[_CONFIG])
        if "encoder_width" not in values:  # a hybrid checks its own
            values = config_class(values.get("variant")).from_dict(values).to_dict()
    return values


def _json_object(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError(f"expected a JSON object, got {text[:80]!r}")
    return values


def _official_config(path: Path) -> dict[str, Any]:
    """The `arch` section that the official training leaves beside its checkpoints, if readable."""
    file = path.parent / _OFFICIAL_CONFIG
    if not file.is_file():
        return {}
    try:
        import yaml
    except ImportError:  # optional: without it the published values are assumed, and said so
        return {}
    hint = "Mend it, or move it away and pass what the shapes do not tell (config=...)."
    with reading(file, "unreadable", hint):
        if file.stat().st_size > LARGEST_YAML:
            raise ValueError(f"{file.stat().st_size:,} bytes are no configuration")
        # Comments and paths may be in any encoding; the names and numbers of `arch` are ASCII.
        read = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
        arch = read.get("arch", {}) if isinstance(read, dict) else read
        if not isinstance(arch, dict):
            raise ValueError(f"expected fields under `arch:`, got {repr(arch)[:80]}")
        fields = {name: value for name, value in arch.items() if name in _FIELDS}
        check_values("arch", fields)
    return fields
