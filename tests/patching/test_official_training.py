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
# Errors are relative to the norm of a loss, state or weight, or to 1. On PyTorch all bits are the
# same, of evaluation and EMA too. An engine sums in another order (a step of the token MLP is off
# by 1.6e-5, the others by 5e-6), which free steps amplify without end. So
# each of its training steps starts from where the unpatched run stood, and evaluations, which are
# many steps, are not compared.
ALLOWED = {"eager": 0.0, "auto": 5e-5}


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


def _of_a_step(name: str) -> bool:
    return name.startswith("after step") or "z_" in name or "train/" in name


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    assert got.keys() == want.keys()

    def error(name: str) -> float:
        ours, theirs = got[name].double(), want[name].double()
        return float((ours - theirs).norm() / theirs.norm().clamp_min(1))

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
    if backend != "eager":
        got, want = ({n: v for n, v in found.items() if _of_a_step(n)} for found in (got, want))
    error, name = furthest(got, want)
    print(f"{system} {fields} {backend}: {error:.2e} {name}")
    assert error <= ALLOWED[backend], f"{name} differs by {error:.2g}"


@pytest.mark.parametrize("planted", ["window", "step missing"])
def test_a_planted_bug_shows(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Another gradient window, or a call too few, in the patched run alone."""
    from recurx.patching import official as patched

    def other(variant: str, states: int, h_cycles: int, l_cycles: int) -> recurx.Schedule:
        steps = own(variant, states, h_cycles, l_cycles).steps
        if planted == "window":
            return recurx.Schedule(steps, grad_from=len(steps) - 1)
        return recurx.Schedule(steps[1:], grad_from=len(steps) - l_cycles - 2)

    def patch(model: nn.Module) -> None:
        monkeypatch.setattr(patched, "schedule_of", other)
        recurx.patch(model, backend="auto", probe=False)

    own, marks = patched.schedule_of, list[Any]()
    want = train("trm", {}, tmp_path / "plain", lambda model: None, monkeypatch, marks)
    got = train("trm", {}, tmp_path / "patched", patch, monkeypatch, marks, follow=True)
    got, want = ({n: v for n, v in found.items() if _of_a_step(n)} for found in (got, want))
    assert furthest(got, want)[0] > 10 * ALLOWED["auto"]


def lucidrains_trained(patch: bool) -> dict[str, Tensor]:
    lucid = pytest.importorskip("tiny_recursive_model")
    torch.manual_seed(0)
    network = lucid.MLPMixer1D(dim=16, depth=2, seq_len=12)
    model = lucid.TinyRecursiveModel(dim=16, num_tokens=8, network=network)
    with torch.no_grad():  # starts at zero, which would hide a fault
        model.to_halt_pred[1].weight.normal_()
    if patch:
        assert len(recurx.patch(model).report.patched) == 1
    puzzles = torch.randint(0, 8, (24, 2, 12), generator=torch.Generator().manual_seed(1))
    pairs = [(given, wanted) for given, wanted in puzzles]
    losses: list[Tensor] = []
    trainer = lucid.Trainer(
        model, pairs, epochs=2, batch_size=8, max_recurrent_steps=4, warmup_steps=4,
        ema_decay_rate=0.9, learning_rate=1e-2, cpu=True,
    )  # fmt: skip
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss: (losses.append(loss.detach()), backward(loss))
    torch.manual_seed(2)  # the loader shuffles
    trainer()
    assert len(losses) >= 12
    found = {f"loss {number}": loss for number, loss in enumerate(losses)}
    found |= {name: p.detach() for name, p in trainer.ema_model.state_dict().items()}
    found |= {f"trained {name}": p.detach() for name, p in model.named_parameters()}
    answers, steps = model.eval().predict(puzzles[:, 0])
    return found | {"answers": answers, "steps": steps}


def test_the_trainer_of_lucidrains_patched_and_not() -> None:
    """Losses, average, final weights and answers, but for the biases of the token mixing: the layer
    norm behind takes them off, so that their gradient is rounding alone, and Adam scales it up."""
    found = [
        {name: value for name, value in lucidrains_trained(patch).items()
         if not name.endswith(".0.fn.3.bias")}
        for patch in (True, False)
    ]  # fmt: skip
    error, name = furthest(*found)
    assert error <= 1e-6, f"{name} differs by {error:.2g}"
