"""Reading official checkpoints and our own, and writing ours.

An official checkpoint is `torch.save` of a state_dict whose names carry the wrappers of the moment
(`_orig_mod.`, `module.`, `model.`). Ours is one safetensors file with the configuration in its
metadata. Neither is ever unpickled beyond tensors, and of a large puzzle embedding only the rows
that are asked for leave the disk.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from recurx.atomic import save_tensors
from recurx.errors import CheckpointError, bad_argument
from recurx.models.act import RecursiveModel
from recurx.models.config import ModelConfig, TRMConfig, config_class
from recurx.models.infer import TABLE, check_names_and_shapes, infer_config, untrained

_WRAPPERS = {"_orig_mod", "module", "model"}  # torch.compile, DDP, the loss head
_NESTED = ("state_dict", "model_state_dict", "model")  # where larger files keep a state_dict
_CONFIG, _EXTRA = "recurx.config", "recurx.extra"  # metadata keys of our files
_OFFICIAL_CONFIG = "all_config.yaml"  # what the official training leaves beside its checkpoints


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
        _explain_where(self.path, lambda: check_names_and_shapes(config, self.state_dict))
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
    config: ModelConfig | Mapping[str, Any] | None = None,
    **fields: Any,
) -> Checkpoint:
    """Read a checkpoint of TRM or HRM: an official one of any name, or a safetensors file.

    Args:
        path: a file of `torch.save` (official: `step_N`, no suffix) or of safetensors.
        puzzle_rows: numbers of the rows of the puzzle embedding to read, in the order wanted;
            None for all. The table then has just these rows, so puzzle ids count in them.
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
    rows = None if puzzle_rows is None else _row_numbers(puzzle_rows)
    state, metadata = _read(path, rows)
    if rows is not None and TABLE not in state:
        raise CheckpointError(f"{path}: puzzle_rows was given, but there is no {TABLE!r} in it.")
    known = {**_official_config(path), **_stored_config(path, metadata), **given}
    if rows is not None:
        known["num_puzzle_identifiers"] = len(rows)
    certain, assumed = _explain_where(path, lambda: infer_config(state, known))
    _explain_where(path, lambda: check_names_and_shapes(certain, state))
    extra = json.loads(metadata.get(_EXTRA, "{}"))
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
    state = {name: tensor.detach().contiguous() for name, tensor in inner.state_dict().items()}
    state = {_official_name(name): tensor for name, tensor in state.items()}
    metadata = {
        "format": "pt",
        _CONFIG: inner.config.to_json(),
        _EXTRA: json.dumps(dict(extra or {})),
    }
    save_tensors(path, state, metadata)


# ---- reading -------------------------------------------------------------------------------


def read_own(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a file that `save_checkpoint` wrote, of whatever model."""
    state, metadata = _read(path, None)
    if _CONFIG not in metadata:
        raise CheckpointError(f"{path}: not written by recurx: no {_CONFIG} in its metadata.")
    return state, _own_values(path, metadata)


def _read(path: Path, rows: Tensor | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under official names, and the metadata of a safetensors file."""
    with open(path, "rb") as file:
        head = file.read(9)
    if len(head) < 9:
        raise CheckpointError(f"{path}: the file has {len(head)} bytes: empty or truncated.")
    if head[8:9] == b"{":  # safetensors: the length of a JSON header, and the header
        return _read_safetensors(path, rows)
    return _read_torch(path, rows), {}


def _read_safetensors(path: Path, rows: Tensor | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = _official_names(path, file.keys())
            state = {}
            for official, stored in names.items():
                if official == TABLE and rows is not None:
                    state[official] = _slices(path, file.get_slice(stored), rows)
                else:
                    state[official] = file.get_tensor(stored)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}.") from error
    return state, metadata


def _read_torch(path: Path, rows: Tensor | None) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "_use_new_zipfile_serialization" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a plain state_dict: it holds pickled code or objects, which recurx does "
            f"not run. Save `model.state_dict()` instead. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged, truncated, or no checkpoint of torch.save: {_first_line(error)}."
        ) from error
    flat = _state_dict_in(path, loaded)
    state: dict[str, Tensor] = {}
    for official, stored in _official_names(path, flat).items():
        tensor = flat[stored]
        if official != TABLE:
            state[official] = tensor.clone()  # off the file, which its owner may overwrite
        elif rows is None:
            state[official] = tensor  # stays on the map: gigabytes
        else:
            _check_rows(path, rows, tensor.shape)
            state[official] = tensor.index_select(0, rows)
    return state


def _state_dict_in(path: Path, loaded: Any) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: expected a state_dict, got {type(loaded).__name__}.")
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: key {key!r} holds {type(value).__name__}, expected a tensor."
            )
    return dict(loaded)


def _official_names(path: Path, stored: Iterable[str]) -> dict[str, str]:
    """{official name: name in the file}."""
    names: dict[str, str] = {}
    stored = list(stored)
    bare = any(_official_name(name) == "embed_tokens.embedding_weight" for name in stored)
    for name in stored:
        official = f"inner.{_official_name(name)}" if bare else _official_name(name)
        if official in names:
            raise CheckpointError(
                f"{path}: keys {names[official]!r} and {name!r} both mean {official!r}."
            )
        names[official] = name
    return names


def _official_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _row_numbers(rows: Iterable[int] | Tensor) -> Tensor:
    numbers = rows if isinstance(rows, Tensor) else torch.tensor(list(rows))
    if numbers.ndim != 1 or numbers.numel() == 0 or numbers.is_floating_point():
        raise bad_argument(
            "load_checkpoint", "puzzle_rows", "one row number or more, or None for all rows",
            f"{numbers.dtype} {list(numbers.shape)}",
        )  # fmt: skip
    return numbers.to("cpu", torch.int64)


def _check_rows(path: Path, rows: Tensor, shape: Iterable[int]) -> None:
    shape = list(shape)
    bad = rows[(rows < 0) | (rows >= shape[0])]
    if bad.numel():
        raise CheckpointError(
            f"{path}: {TABLE!r} is {shape}: it has no row {int(bad[0])} (of puzzle_rows)."
        )


def _slices(path: Path, table: Any, rows: Tensor) -> Tensor:
    _check_rows(path, rows, table.get_shape())
    return torch.cat([table[row : row + 1] for row in rows.tolist()])


# ---- configuration -------------------------------------------------------------------------


def _stored_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in the metadata of our own files."""
    if _CONFIG not in metadata:
        return {}
    values = _own_values(path, metadata)
    if "encoder_width" in values:
        raise CheckpointError(f"{path}: a hybrid: recurx.hybrid.HybridReasoner.load reads it.")
    try:
        return config_class(values.get("variant")).from_dict(values).to_dict()
    except ValueError as error:
        raise _unreadable(path, error) from error


def _own_values(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(metadata[_CONFIG])
    except ValueError as error:
        raise _unreadable(path, error) from error
    return values


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: unreadable {_CONFIG} in its metadata: {error}")


def _official_config(path: Path) -> dict[str, Any]:
    """The `arch` section that the official training leaves beside its checkpoints, if readable."""
    file = path.parent / _OFFICIAL_CONFIG
    if not file.is_file():
        return {}
    try:
        import yaml
    except ImportError:  # optional: without it the published values are assumed, and said so
        return {}
    arch = (yaml.safe_load(file.read_text()) or {}).get("arch", {})
    fields = {name for name in TRMConfig.__dataclass_fields__}
    return {name: value for name, value in arch.items() if name in fields}


def _explain_where(path: Path, check: Any) -> Any:
    """Run `check` with the path put before the message of a CheckpointError."""
    try:
        return check()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
