"""`python -m recurx bench run` end to end, on nets that take milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from recurx import backends
from recurx.bench import results, runner, suites, variants
from recurx.commands import main

ROOT = Path(__file__).parents[2]
# A backend that forgets z_H in the first call: stale states are what a fused kernel gets wrong.
WRONG_BACKEND = """
import sys, types
from recurx import backends, reference
from recurx.backends.eager import Eager

class Wrong(Eager):
    name = "wrong"
    def run(self, problem, operands, span):
        name = problem.schedule.states
        states = [0 * s if n == "z_H" else s for n, s in zip(name, operands.states)]
        return super().run(problem, operands._replace(states=states), span)

module = types.ModuleType("recurx.backends.wrong")
module.BACKEND = Wrong()
sys.modules[module.__name__] = module
if "wrong" not in backends.ORDER:
    backends.ORDER += ("wrong",)
    backends.NAMES += ("wrong",)
"""


def run(tmp_path, *options):
    """The document that a run writes; options go to `bench run`."""
    path = tmp_path / "result.json"
    assert main(["bench", "run", "--threads", "1", "--out", str(path), *options]) == 0
    return results.load(path).document


def rows_of(document, group=0):
    return {row["variant"]: row for row in document["groups"][group]["rows"]}


@pytest.fixture
def wrong_backend(tmp_path, monkeypatch):
    """The name of a module that registers a wrong backend, here and in workers."""
    monkeypatch.setattr(backends, "ORDER", backends.ORDER)  # put back afterwards
    monkeypatch.setattr(backends, "NAMES", backends.NAMES)
    (tmp_path / "planted_wrong_backend.py").write_text(WRONG_BACKEND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield "planted_wrong_backend"
    sys.modules.pop("planted_wrong_backend", None)
    sys.modules.pop("recurx.backends.wrong", None)


@pytest.mark.slow
def test_a_step_in_worker_processes(tmp_path, wrong_backend):
    options = ("--case", "toy", "--engine", "recurx", "--seconds", "3", "--dtype", "fp32")
    document = run(tmp_path, *options, "--import", wrong_backend)
    assert document["status"] == "complete"
    facts = document["provenance"]
    assert facts["command"].startswith("python -m recurx") and facts["threads"] == 1
    assert facts["commit"] is None or len(facts["commit"]) == 40
    group, rows = document["groups"][0], rows_of(document)
    assert group["cache"].startswith("other") or "caches" in group["cache"]
    assert group["ceilings"]["copy_gbs"] > 0 and group["ceilings"]["case_fp32_tflops"] > 0

    eager = rows["eager/fp32"]  # the yardstick, though nobody asked for it
    assert eager["status"] == "timed" and eager["launches"] > 100 and eager["energy_j"] is None
    assert eager["p20_ms"] <= eager["p50_ms"] <= eager["p80_ms"]
    assert len(eager["times_ms"]) == eager["rounds"] >= runner.FEWEST_ROUNDS
    assert eager["predicted_ms"] > 0 and eager["of_floor"] > 0 and eager["drift"]["one call"] == 0

    wrong = rows["recurx-wrong/fp32"]
    assert wrong["status"] == "wrong" and "one call: drift" in wrong["reason"]
    assert not {"p50_ms", "times_ms", "tflops"} & wrong.keys()

    ours = rows["recurx-cpu/fp32"]
    if backends.get("cpu").why_unavailable() is None:
        assert ours["status"] == "timed" and ours["launches"] < eager["launches"]
    else:
        assert ours["status"] == "refused" and ours["reason"]


@pytest.mark.slow
def test_peers_run_the_exported_step(tmp_path, workers_here):
    document = run(tmp_path, "--case", "toy", "--engine", "peers", "--seconds", "0.05")
    rows = rows_of(document)
    assert {"openvino/bf16", "openvino/fp32", "onnxruntime/fp32"} <= rows.keys()
    assert "onnxruntime/bf16" not in rows
    for name, row in rows.items():
        assert row["status"] == "timed", row
        assert name.startswith("eager") or 0 < row["drift"]["z_H"] <= row["allowed"]["z_H"]


def test_a_peer_that_is_not_installed_is_no_lane(monkeypatch):
    assert "openvino" in variants.engines("cpu", "step")
    monkeypatch.setattr(variants.importlib.util, "find_spec", lambda name: None)
    assert "openvino" not in variants.engines("cpu", "step")
    assert "compile" in variants.engines("cpu", "step")


@pytest.mark.parametrize("mode", ["step", "train"])
def test_nets_that_are_compiled_one_by_one(tmp_path, workers_here, monkeypatch, mode):
    compiled = []

    def as_it_is(net, **_):
        compiled.append(net)
        return net

    monkeypatch.setattr(torch, "compile", as_it_is)
    document = run(tmp_path, "--case", "toy", "--mode", mode, "--dtype", "fp32", "--engine",
                   "compile", "--unit", "net", "--seconds", "0.05")  # fmt: skip
    row = rows_of(document)["compile/fp32"]
    assert row["status"] == "timed" and compiled, row


def test_training_and_solving(tmp_path, workers_here):
    train = run(tmp_path, "--case", "toy", "--mode", "train", "--dtype", "fp32", "--seconds",
                "0.05", "--engine", "recurx", "--batch", "3")  # fmt: skip
    eager = rows_of(train)["eager/fp32"]
    assert eager["status"] == "timed"
    assert eager["allowed"].keys() == {"loss", "gradient", "gradient of a call"}
    solve = run(tmp_path, "--case", "toy-solve", "--mode", "solve", "--batch", "4", "--dtype",
                "fp32", "--seconds", "0.05", "--engine", "recurx", "eager-halt")  # fmt: skip
    rows = rows_of(solve)
    assert rows["eager/fp32"]["steps_mean"] == 16 and rows["eager/fp32"]["puzzles_per_s"] > 0
    assert rows["eager-halt/fp32"]["status"] == "timed"
    assert 0 <= rows["eager/fp32"]["exact"] <= 1


def test_the_shipped_net_solves_and_halts():
    """Else its time to solve would mean nothing."""
    from recurx.bench.subjects import SolveSubject

    subject = SolveSubject("sudoku-6x6", variants.Variant("eager-halt", "fp32"), 64, "cpu", "", "")
    subject.step()
    facts = subject.facts()
    assert facts["exact"] > 0.8 and 2 < facts["steps_mean"] < 14, facts


def test_a_wrong_gradient_gets_no_time(tmp_path, workers_here, monkeypatch):
    """Planted: a gradient window of one call too many. The forward is the same, bit for bit."""
    from recurx.bench import training

    right = training.build

    def longer_window(name, dtype, backend, batch):
        model = right(name, dtype, backend, batch)
        if backend == "cpu":
            schedule = model.inner.schedule
            model.inner.schedule = schedule.with_window(schedule.window + 1)
        return model

    monkeypatch.setattr(training, "build", longer_window)
    document = run(tmp_path, "--case", "toy", "--mode", "train", "--dtype", "fp32", "--engine",
                   "recurx-cpu", "--seconds", "0.05")  # fmt: skip
    row = rows_of(document)["recurx-cpu/fp32"]
    if row["status"] == "refused":
        pytest.skip(row["reason"])
    assert row["status"] == "wrong" and row["reason"].startswith("gradient: drift")
    assert row["drift"]["loss"] < 1e-5


def test_ctrl_c_keeps_what_was_measured(tmp_path, workers_here, monkeypatch, capsys):
    count = 0
    ask, receive = workers_here.ask, workers_here.receive

    def interrupted(self, do, timeout=0.0, **arguments):
        nonlocal count
        if do != "time":
            return ask(self, do, timeout, **arguments)
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return {"seconds": 0.01}  # however busy the machine is

    def started(self, timeout):
        return receive(self, timeout) | {"first_seconds": 0.01}

    monkeypatch.setattr(workers_here, "receive", started)
    monkeypatch.setattr(workers_here, "ask", interrupted)
    path = tmp_path / "result.json"
    options = ["--case", "toy", "small-64", "--engine", "eager", "--seconds", "0.5"]
    assert main(["bench", "run", "--threads", "1", "--out", str(path), *options]) == 130
    document = results.load(path).document
    assert document["status"] == "partial" and len(document["groups"]) == 1
    timed = [row for row in document["groups"][0]["rows"] if row["status"] == "timed"]
    # two samples to warm up, then six in rounds of two variants
    assert [row["rounds"] for row in timed] == [3, 3]
    assert {row["p50_ms"] for row in timed} == {10}
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_signal_to_a_real_run_keeps_results_and_leaves_no_worker(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-u", "-m", "recurx", "bench", "run", "--case", "toy"]
    command += ["--engine", "eager", "--dtype", "fp32", "--seconds", "60", "--threads", "1"]
    command += ["--out", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        for line in process.stdout:
            if "rounds" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    document = results.load(path).document
    assert document["status"] == "partial" and rows_of(document)["eager/fp32"]["rounds"] >= 1
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_worker_that_fails_or_hangs_becomes_a_reason(tmp_path):
    from recurx.bench.remote import Remote, WorkerFailed

    arguments = dict(case="toy", mode="step", variant="recurx-nowhere/fp32", batch=1, device="cpu",
                     unit="net", threads=1, folder=str(tmp_path), imports=[])  # fmt: skip
    with open(tmp_path / "log", "wb") as log:
        remote = Remote(log, **arguments)
        with pytest.raises(WorkerFailed, match=r"InvalidArgument: .*nowhere"):
            remote.ask("start", 120, output=str(tmp_path / "out.pt"))
        remote.close()
        remote = Remote(log, **arguments)
        with pytest.raises(WorkerFailed, match="no answer within 0 s"):
            remote.ask("start", 0.0, output=str(tmp_path / "out.pt"))
        assert remote.process.poll() is not None


def test_time_limit_leaves_groups_out_and_says_partial(tmp_path, workers_here):
    path = tmp_path / "result.json"
    assert main(["bench", "run", "--case", "toy", "--time-limit", "0", "--out", str(path)]) == 0
    document = results.load(path).document
    assert document["status"] == "partial" and document["groups"] == []


def test_bad_options_are_refused(capsys):
    for options, message in (
        (["--engine", "elgar"], "elgar"),
        (["--suite", "cpu", "--case", "toy"], "--suite"),
        (["--case", "trm-att", "--mode", "solve"], "no trained net"),
        (["--cold", "--device", "cpu"], "--cold"),
    ):
        case = [] if "--case" in options else ["--case", "toy"]
        case = [] if "--suite" in options and "--case" in options else case
        assert main(["bench", "run", *case, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", suites.SUITES)
def test_suites_are_made_of_what_exists(name, device):
    seen = set()
    for group in suites.suite(name):
        if device == "cuda" or not name.startswith("gpu"):
            variants.check_engines(group.engines, device, group.mode)
        made = [v.name for v in suites.variants_of(group, device)]
        assert len(made) == len(set(made))
        assert {f"eager/{dtype}" for dtype in group.dtypes} <= set(made)
        keys = {(group.case, group.mode, group.batch, v) for v in made}
        assert not keys & seen, "one row twice in a suite"
        seen |= keys


def test_the_suite_of_gpus_covers_the_published_targets():
    shapes = {(g.case, g.mode, g.batch) for g in suites.suite("gpu")}
    wanted = {("trm-att", "step", b) for b in (1, 8, 64, 132, 512)}
    wanted |= {("trm-mlp", "step", b) for b in (1, 8, 64, 512)}
    wanted |= {("trm-att", "train", 768), ("trm-mlp", "train", 768)}
    wanted |= {("arc", "step", 64), ("arc", "train", 192), ("sudoku-6x6", "solve", 4096)}
    assert wanted <= shapes


def test_importing_the_package_imports_no_torch():
    source = """
        import sys, recurx.bench, recurx.bench.command, recurx.bench.suites
        print([m for m in ("torch", "matplotlib", "triton") if m in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.replace("'", '"')) == []
