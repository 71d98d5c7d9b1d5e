"""Tensors out of files of weights, safetensors or `torch.save`; nothing else is unpickled.

Names come without the wrappers of the moment, and of a large puzzle embedding only the rows that
are asked for leave the disk.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from recurx.errors import CheckpointError, bad_argument, reading
from recurx.models.infer import TABLE
from recurx.state_names import AVERAGE, official_names

# Where larger files keep a state_dict, and an average of it.
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_NESTED_AVERAGES = ("ema_state_dict", "ema_model", "ema")


def read(
    path: Path, rows: Tensor | None, ema: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under official names (`ema`: see `official_names`), and the metadata of a safetensors
    file."""
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.is_file())
        names = ", ".join(inside[:8]) or "no files"
        raise CheckpointError(f"{path}: a folder: expected one file of it; it has {names}.")
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 9:
        raise CheckpointError(f"{path}: the file has {len(head)} bytes: empty or truncated.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a git-lfs pointer, not the file itself: run git lfs pull.")
    with reading(path, "damaged, truncated, or not a file of weights"):
        if head[8:9] == b"{":  # safetensors: the length of a JSON header, and the header
            return _read_safetensors(path, rows, ema)
        mapped = head.startswith(b"PK\x03\x04")  # else it was written before torch 1.6
        return _read_torch(path, rows, ema, mapped), {}


def _read_safetensors(
    path: Path, rows: Tensor | None, ema: bool | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = official_names(path, file.keys(), ema)
        state = {}
        for official, stored in names.items():
            if official == TABLE and rows is not None:
                table = file.get_slice(stored)
                _check_rows(path, rows, table.get_shape())
                state[official] = torch.cat([table[row : row + 1] for row in rows.tolist()])
            else:
                state[official] = file.get_tensor(stored)
    return state, metadata


def _read_torch(
    path: Path, rows: Tensor | None, ema: bool | None, mapped: bool
) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise CheckpointError(
            f"{path}: not a plain state_dict: it holds pickled code or objects, which recurx does "
            f"not run. Save `model.state_dict()` instead. ({reason})"
        ) from error
    flat = _state_dict_in(path, loaded)
    size = path.stat().st_size
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in flat.values())
    if wanted > 2 * size:  # tied tensors count twice; expanded ones would take all memory
        raise CheckpointError(
            f"{path}: its tensors are {wanted:,} bytes, the file has {size:,}: they repeat memory. "
            f"Save them with `.clone()`."
        )
    state: dict[str, Tensor] = {}
    for official, stored in official_names(path, flat, ema).items():
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
    average: Mapping[Any, Any] = {}
    for key in (*_NESTED_AVERAGES, *_NESTED):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            if key in _NESTED_AVERAGES:
                average = average or {f"{AVERAGE}.{name}": t for name, t in loaded[key].items()}
            else:
                loaded = loaded[key]
    if average and isinstance(loaded, Mapping):
        loaded = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} | average
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: expected a state_dict, got {type(loaded).__name__}.")
    for key, value in loaded.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        if not isinstance(key, str) or not dense or value.is_quantized or value.is_meta:
            got = type(value).__name__
            raise CheckpointError(f"{path}: key {key!r} holds {got}, expected a tensor.")
    return dict(loaded)


def row_numbers(rows: Iterable[int] | Tensor) -> Tensor:
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
