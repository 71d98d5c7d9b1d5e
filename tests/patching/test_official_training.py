"""Training patched and unpatched is the same training, by the published loops themselves.

Official TRM and HRM: the whole `launch` of their `pretrain.py`, with its evaluation, EMA and
checkpoint, on made puzzles (needs checkouts, see `tests/official.py`). lucidrains: the package's
own `Trainer`. nano-trm: tests/patching/test_official_nano.py. What the loops import for logging and
configuration is stood in for, and "cuda" means the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.train import AdamATan2
from tests import official

STEPS = 24
CASES = [
    ("trm", {}),
    ("trm", {"mlp_t": True, "pos_encodings": "none"}),
    ("single_z", {}),
    ("hier6", {}),
    ("hrm", {}),
    ("hrm_in_trm", {}),
]
NAMES = ["-".join([system, *map(str, fields)]) for system, fields in CASES]
EVERY_CASE = pytest.mark.parametrize("system,fields", CASES, ids=NAMES)
# Errors are relative to the largest value of a loss or a weight. On PyTorch all bits are equal. An
# engine sums in another order, and a carry that goes on for 24 steps is chaotic: a change of all
# weights by one bit is as far off. So each of its steps, and each evaluation, starts from where the
# unpatched run stood.
ALLOWED = {"eager": 0.0, "auto": 1e-6}


class _OnTheCPU(ModuleType):
    """torch to the loop, for which "cuda" is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(_: str) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def zeros(*sizes: Any, device: str, **how: Any) -> Tensor:
        return torch.zeros(*sizes, **how)


def _stand_ins(log: list[tuple[int, dict[str, Any]]]) -> dict[str, ModuleType]:
    anything: Any = lambda *_, **__: None  # noqa: E731
    values: dict[str, dict[str, Any]] = {
        "wandb": {"init": anything, "finish": anything, "Settings": anything, "run": None,
                  "log": lambda said, step: log.append((step, said))},
        "coolname": {"generate_slug": lambda _: "a-name"},
        "hydra": {"main": lambda **_: lambda function: function},
        "omegaconf": {"DictConfig": dict},
        "adam_atan2": {"AdamATan2": AdamATan2},
        "argdantic": {"ArgParser": anything},
    }  # fmt: skip
    made = {name: ModuleType(name) for name in values}
    for name, module in made.items():
        vars(module).update(values[name])
    return made


@contextlib.contextmanager
def loop(system: str, log: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Their `pretrain` module, ready to run here; nothing of it stays imported."""
    before = set(sys.modules)
    with official.importable(system), monkeypatch.context() as patching:
        patching.setenv("DISABLE_COMPILE", "1")
        for name, module in _stand_ins(log).items():
            patching.setitem(sys.modules, name, module)
        try:
            pretrain = importlib.import_module("pretrain")
            pretrain.torch = _OnTheCPU("torch")
            patching.setattr(Tensor, "cuda", lambda tensor: tensor)
            yield pretrain
        finally:
            for name in set(sys.modules) - before:
                if name.split(".")[0] in ("pretrain", "puzzle_dataset", "utils", "dataset"):
                    del sys.modules[name]


def settings(system: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    module, model = official.SYSTEMS[system][1], official.config(system, **fields)
    with official.importable(system):
        name = official.import_parts(system)["model"].__name__
    given = ("batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers")
    arch: dict[str, Any] = {key: value for key, value in model.items() if key not in given}
    arch["name"] = f"{module.removeprefix('models.')}@{name}"
    arch["loss"] = {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"}
    config = dict(
        arch=arch, global_batch_size=4, epochs=STEPS, eval_interval=STEPS // 2, lr=1e-4,
        lr_min_ratio=1.0, lr_warmup_steps=4, weight_decay=0.1, beta1=0.9, beta2=0.95,
        puzzle_emb_lr=1e-2, puzzle_emb_weight_decay=0.1, checkpoint_path=str(folder),
    )  # fmt: skip
    if system == "hrm":
        return config | {"data_path": "made", "eval_save_outputs": ["logits", "q_halt_logits"]}
    more = {"eval_save_outputs": ["logits", "q_halt_logits"], "ema": True, "ema_rate": 0.9}
    return config | more | {"data_paths": ["made"]}


def train(
    system: str, fields: dict[str, Any], folder: Path, patch: Any,
    monkeypatch: pytest.MonkeyPatch, marks: list[Any], follow: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Everything that `launch` logs and saves, and the weights after each step.

    Args:
        marks: gets what each step starts from; with `follow`, what each one shall start from.
    """
    log: list[tuple[int, dict[str, Any]]] = []
    after: dict[str, Tensor] = {}
    folder.mkdir()
    config = settings(system, fields, folder)
    with loop(system, log, monkeypatch) as pretrain:
        metadata = SimpleNamespace(
            vocab_size=7, seq_len=16, num_puzzle_identifiers=5, total_groups=4,
            mean_puzzle_examples=1, sets=["all"],
        )  # fmt: skip

        def loader(config: Any, split: str, **_: Any) -> Any:
            seeds = range(100, 102) if split == "test" else range(STEPS // 2)
            return [("all", official.batch(seed=seed), 4) for seed in seeds], metadata

        make = pretrain.create_model

        def create_model(*args: Any, **kwargs: Any) -> Any:
            model, *rest = make(*args, **kwargs)
            with torch.no_grad():  # starts at zero, which would hide a fault
                model.model.inner.q_head.weight.normal_(generator=torch.Generator().manual_seed(3))
            patch(model)
            return model, *rest

        step_of_theirs, numbers = pretrain.train_batch, iter(range(STEPS))

        def train_batch(config: Any, state: Any, *rest: Any, **how: Any) -> Any:
            number = next(numbers)
            parts = [state.model, *state.optimizers]
            if not follow:
                mark = [part.state_dict() for part in parts], state.carry
                marks.append(copy.deepcopy((mark, torch.get_rng_state())))
            else:
                (states, state.carry), random = copy.deepcopy(marks[number])
                for part, saved in zip(parts, states, strict=True):
                    part.load_state_dict(saved)
                torch.set_rng_state(random)
            said = step_of_theirs(config, state, *rest, **how)
            after.update(
                {f"after step {number} {name}": tensor.detach().clone()
                 for name, tensor in state.model.state_dict().items()}
            )  # fmt: skip
            after.update(
                {f"step {number} {name}": z for name, z in vars(state.carry.inner_carry).items()}
            )
            return said

        pretrain.create_dataloader, pretrain.create_model = loader, create_model
        pretrain.train_batch = train_batch
        pretrain.launch(config)
    trace = {
        f"step {step}, entry {number}, {name}": torch.as_tensor(value, dtype=torch.float64)
        for number, (step, said) in enumerate(log)
        for name, found in said.items()
        for name, value in (found if isinstance(found, dict) else {name: found}).items()
    }
    assert sum("train/lm_loss" in name for name in trace) == STEPS
    assert any(name.endswith(", exact_accuracy") for name in trace), "it was not evaluated"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if "yaml" not in file.name:
            saved = torch.load(file, weights_only=True)
            trace |= {f"{file.name}: {name}": tensor for name, tensor in saved.items()}
    return trace | after


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    assert got.keys() == want.keys()

    def error(name: str) -> float:
        ours, theirs = got[name].double(), want[name].double()
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))

    return max((error(name), name) for name in want)


@EVERY_CASE
@pytest.mark.parametrize("backend", ALLOWED)
def test_the_official_loop_patched_and_not(
    system: str, fields: dict[str, Any], backend: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def patch(model: nn.Module) -> None:
        handle = recurx.patch(model, backend=backend)
        assert len(handle.report.patched) == 1

    marks: list[Any] = []
    want = train(system, fields, tmp_path / "plain", lambda model: None, monkeypatch, marks)
    got = train(system, fields, tmp_path / "patched", patch, monkeypatch, marks, backend == "auto")
    error, name = furthest(got, want)
    print(f"{system} {fields} {backend}: {error:.2e} {name}")
    assert error <= ALLOWED[backend], f"{name} differs by {error:.2g}"
