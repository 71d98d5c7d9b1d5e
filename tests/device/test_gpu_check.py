"""bench/gpu_check over a double of a GPU: every phase starts, writes, and survives a kill.

The double is `gpu_double.py`, a module that each phase imports first. What a phase writes here is
marked as synthetic and lies in a temporary folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_check import journal, phases, times
from bench.gpu_check.__main__ import environment
from bench.gpu_check.phases import ALONE, BESIDE, ROOT, Phase
from bench.gpu_check.runner import Runner
from emulator.build import unavailable
from recurx.bench import ratios, report, results

DOUBLE = ("--import", "gpu_double")
SMALL = {"RECURX_GPU_CHECK_SIZES": str(Path(__file__).with_name("small_sizes.json"))}


def check(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_check", str(folder), *arguments]


def run(folder: Path, *arguments: str, limit: float = 600, **environ: str) -> str:
    done = subprocess.run(
        check(folder, *arguments), cwd=ROOT, env={**os.environ, **environ}, timeout=limit,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


def result_of(folder: Path) -> dict:
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text())


# ---- the plan ------------------------------------------------------------------------------------


def test_names_choose_phases_and_an_unknown_one_is_refused_with_the_known_ones():
    names = [phase.name for phase in phases.chosen((), ())]
    assert names[0] == "versions" and len(set(names)) == len(names)
    some = [phase.name for phase in phases.chosen(["proof", "times"], ["proof owner"])]
    assert some[0] == "versions" and "proof grid" in some and "times" in some
    assert "proof owner" not in some and "wrappers" not in some
    with pytest.raises(ValueError, match=r"expected one of versions, .*, got 'prof'"):
        phases.chosen(["prof"], ())


def test_every_file_of_tests_that_needs_a_gpu_is_in_a_phase():
    there = {path.stem for path in Path(__file__).parent.glob("test_*_on_gpu.py")}
    assert there == {*phases.TESTS, "test_wrappers_on_gpu"}
    elsewhere = [
        path for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.parent != Path(__file__).parent
    ]  # fmt: skip
    assert elsewhere == []


def test_the_settings_are_known_to_pytest_8():
    text = (ROOT / "bench" / "gpu_check" / "pytest.ini").read_text()
    keys = {line.split("=")[0].strip() for line in text.splitlines() if "=" in line}
    assert keys == {"markers"}
    assert all("-c" in p.command for p in phases.phases() if "pytest" in p.command)


# ---- the runner, over processes that need no torch -----------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a call writes; modules of phases lie beside it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    made = tmp_path / "out"
    made.mkdir()
    return made


def phase(folder: Path, name: str, code: str, limit: float = 30, **fields) -> Phase:
    module = name.replace(" ", "_")
    (folder.parent / f"{module}.py").write_text(code)
    fields.setdefault("needs", ())
    return Phase(name, (*phases.child(), module), limit, **fields)


def runner(folder: Path, seconds: float = 60.0, planned: tuple[str, ...] = ()) -> Runner:
    journal.append(folder / "gpu-x.jsonl", {"phase": "", "kind": "call", "planned": list(planned)})
    return Runner(folder / "gpu-x.json", os.environ, time.monotonic() + seconds)


EMIT = "from bench.gpu_check.journal import emit\nemit('seen', what={})\n"


def by_name(folder: Path) -> dict[str, dict]:
    return {entry["name"]: entry for entry in result_of(folder)["phases"]}


def test_phases_go_on_after_a_failure_a_crash_and_a_program_that_is_missing(folder):
    one = runner(folder)
    one.run([
        phase(folder, "fails", EMIT.format(1) + "print('so it goes')\nraise SystemExit(3)"),
        phase(folder, "absent", "raise SystemExit(77)"),
        phase(folder, "crashes", EMIT.format(2) + "import os\nos.kill(os.getpid(), 11)"),
        Phase("missing", ("no-such-program-anywhere",), 20, ()),
        phase(folder, "passes", EMIT.format(3)),
    ])  # fmt: skip
    found = by_name(folder)
    assert {n: e["status"] for n, e in found.items()} == {
        "fails": "failed", "absent": "absent", "crashes": "failed", "missing": "missing",
        "passes": "passed",
    }  # fmt: skip
    assert "so it goes" in found["fails"]["tail"]
    assert found["crashes"]["lines"] == [{"kind": "seen", "what": 2}]
    assert "ended by signal 11" in found["crashes"]["tail"]
    assert any("Segmentation fault" in line for line in found["crashes"]["tail"])
    assert found["passes"]["lines"] == [{"kind": "seen", "what": 3}]
    text = (folder / "gpu-x.json").read_text()
    assert "python -u -m bench.gpu_check.child passes" in text
    assert not any(str(place) in text for place in (ROOT, folder, sys.executable))
    assert {p.name for p in folder.iterdir()} == {"gpu-x.json", "gpu-x.log", "gpu-x.jsonl"}


HANG = """
import time
def waits_for_the_device():
    while True:
        try: time.sleep(60)
        except KeyboardInterrupt: pass
waits_for_the_device()
"""


GRACE = 2.0  # instead of the runner's, so that what hangs ends soon


def test_a_hang_is_interrupted_then_killed_and_leaves_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("bench.gpu_check.runner.GRACE", GRACE)
    begin = time.monotonic()
    one = runner(folder)
    one.run(
        [phase(folder, "hangs", EMIT.format(1) + HANG, 4), phase(folder, "passes", EMIT.format(2))]
    )
    found = by_name(folder)
    assert found["hangs"]["status"] == "timeout" and found["passes"]["status"] == "passed"
    assert found["hangs"]["lines"] == [{"kind": "seen", "what": 1}]
    assert any("in waits_for_the_device" in line for line in found["hangs"]["tail"])
    assert 4 + GRACE <= found["hangs"]["seconds"] < time.monotonic() - begin < 40


def test_what_is_timed_runs_alone_and_compilers_run_beside(folder):
    """Spans of the phases, from their own lines."""
    now = EMIT.format("time.monotonic()")
    both = f"import time\n{now}time.sleep(0.4)\n{now}"
    one = runner(folder)
    one.run([
        phase(folder, "build", both, lane=BESIDE), phase(folder, "quiet", both, quiet=True),
        phase(folder, "beside the build", both),
        phase(folder, "after", both, needs=("build", "not planned")),
        phase(folder, "one", both, lane="x"), phase(folder, "two", both, lane="x"),
    ])  # fmt: skip
    spans = {
        name: (entry["lines"][0]["what"], entry["lines"][1]["what"])
        for name, entry in by_name(folder).items()
    }

    def apart(a: str, b: str) -> bool:
        return spans[a][1] < spans[b][0] or spans[b][1] < spans[a][0]

    assert all(apart("quiet", other) for other in spans if other != "quiet")
    assert apart("beside the build", "after") and spans["build"][1] < spans["after"][0]
    assert apart("after", "one") and apart("after", "two")
    assert one.ended.keys() == spans.keys() and ALONE != BESIDE


def test_with_no_time_left_the_rest_is_not_started_and_the_file_says_so(folder, monkeypatch):
    monkeypatch.setattr("bench.gpu_check.runner.GRACE", GRACE)
    monkeypatch.setattr("bench.gpu_check.runner.LEAST", 3.0)
    one = runner(folder, seconds=6, planned=("hangs", "late"))
    one.run([phase(folder, "hangs", HANG, 60), phase(folder, "late", EMIT.format(1))])
    found = by_name(folder)
    assert found["hangs"]["status"] == "timeout" and found["late"]["status"] == "not started"
    assert result_of(folder)["status"] == "partial"


def test_a_torn_line_costs_itself_alone(tmp_path):
    path = tmp_path / "lines"
    journal.append(path, {"kind": "a", "phase": "one"})
    with path.open("a") as file:
        file.write('{"kind": "torn", "phase"')
    journal.append(path, {"kind": "b", "phase": "one"})
    assert [line["kind"] for line in journal.read(path)] == ["a", "b"]


def test_a_family_whose_proof_hung_is_not_timed_among_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv(journal.PATH, str(tmp_path / "lines"))
    end = {"phase": "proof grid", "kind": "end", "status": "timeout"}
    journal.append(tmp_path / "lines", end)
    measured = times.Measured("toy", "step", 1, [])
    ways = {way.engine: way for way in times.all_ways("step")}
    for name in ("recurx-grid", "recurx-grid-graph"):
        assert measured._missing(ways[name]) == ("timeout", "phase 'proof grid' ended so")
    assert measured._missing(ways["eager"]) is None
    assert times._proof(ways["recurx-owner"]) == ("proof owner", "")


# ---- the whole check over the double -------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_cleanly(tmp_path):
    said = run(tmp_path / "out")
    assert "sees no NVIDIA GPU" in said
    written = result_of(tmp_path / "out")
    assert written["status"] == "partial" and written["groups"] == []
    assert {p["status"] for p in written["phases"]} == {"no gpu", "not started"}


# What only hardware can answer, of the tests in this folder; over the double they must get as far
# as their last assertion.
OF_HARDWARE = {
    "test_inside_a_graph_of_the_caller": "a replay runs again what was captured",
    "test_less_kept_is_less_memory": "peaks of the allocator",
    "test_forward_and_backward_in_one_graph": "a replay runs again what was captured",
    "test_a_queue_longer_than_the_owners_gives_the_answers_of_the_loop": "the queue in the kernel",
    "test_kernels_by_stage": "times of kernels",
}


LIMIT = 560  # seconds: a test may take 600 (pyproject.toml)
EMULATED = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
OWNER = "test_cuda_owner_on_gpu"  # of the phases that run tests, the one that is run as a phase


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A call over the double; compute-sanitizer is a script that runs the rest of its words."""
    folder = tmp_path_factory.mktemp("whole")
    tool = folder / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    tool.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    small = {**SMALL, "PATH": path, "OMP_NUM_THREADS": "1"}
    skipped = [f"tests {name}" for name in phases.TESTS if name != OWNER]
    skipped += [f"sanitizer {tool}" for tool in phases.TOOLS[1:]]  # the first's command but a word
    out = folder / "out"
    said = run(out, "--seconds", str(LIMIT), "--skip", *skipped, *DOUBLE, limit=LIMIT + 30, **small)
    return result_of(out), said


@pytest.mark.slow
@EMULATED
def test_every_phase_starts_writes_and_ends(whole):
    document, said = whole
    found = {entry["name"]: entry for entry in document["phases"]}
    assert document["status"] == "complete", said
    for name, entry in found.items():
        assert entry["status"] in ("passed", "absent"), (name, entry.get("tail"))
        assert entry.get("lines") or name.startswith(("times", "compile")), name
    verdicts = {
        line["family"]: line["verdict"]
        for entry in found.values() for line in entry.get("lines", ()) if line["kind"] == "proof"
    }  # fmt: skip
    assert set(verdicts) == set(phases.FAMILIES)
    right = ("owner", "grid", "cluster-2", "triton-tiled")
    assert {verdicts[name] for name in right} == {"right"}, verdicts
    for name in ("wrappers", f"tests {OWNER}"):
        (selected,) = [line for line in found[name]["lines"] if line["kind"] == "selected"]
        passed = [line for line in found[name]["lines"] if line.get("outcome") == "passed"]
        assert len(passed) == selected["tests"] > 0


@pytest.mark.slow
@EMULATED
def test_every_phase_of_tests_selects_some_and_each_gets_to_its_launches(tmp_path):
    """All of them in one process, with the words of a phase."""
    words = list(phases.pytest("any"))
    words[words.index("tests/device/any.py")] = "tests/device"
    lines = tmp_path / "lines"
    environ = {**environment([DOUBLE[1]]), journal.PATH: str(lines), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environ, timeout=LIMIT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    said = journal.read(lines)
    launched = {line["test"]: line for line in said if line["kind"] == "launched"}
    outcomes = {line["test"]: line for line in said if line["kind"] == "test"}
    files = {name.partition(".py")[0] for name in outcomes}
    assert files == {*phases.TESTS, "test_wrappers_on_gpu"}
    for name, line in outcomes.items():
        if line["outcome"] == "passed":
            continue
        test = name.partition("::")[2].partition("[")[0]
        assert line["outcome"] == "failed" and name in launched, (name, line["why"])
        assert test in OF_HARDWARE, (name, line["why"])
        assert "AssertionError" in line["why"] or "\nE   assert" in line["why"], line["why"]


@pytest.mark.slow
@EMULATED
def test_the_result_file_becomes_the_table_of_the_readme(whole, tmp_path):
    document, _ = whole
    (tmp_path / "result.json").write_text(json.dumps(document))
    result = results.load(tmp_path / "result.json")
    assert "SYNTHETIC" in result.device
    assert result.facts["commit"] and result.facts["torch"] and result.facts["gpu"]
    timed = {(key.mode, key.variant) for key in result.timed()}
    ours = ("owner", "grid-graph", "cluster-2", "triton-tiled", "auto")
    assert {("step", f"recurx-{name}/bf16") for name in ours} <= timed
    assert {("step", "eager/bf16"), ("step", "graph/bf16"), ("step", "compile/bf16")} <= timed
    assert {("train", "eager/bf16"), ("train", "recurx-triton-tiled/bf16")} <= timed
    table = ratios.ratios([result])
    assert "| SYNTHETIC" in table and "not measured" not in table
    assert "**SYNTHETIC" in report.markdown([result])


def test_nothing_synthetic_is_in_the_repository():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert "SYNTHETIC" not in path.read_text(), path


# ---- kills ---------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """start(phase to hang, arguments) -> (the check's process, its folder), when that one hangs."""
    processes = []

    def start(hangs: str, *arguments: str) -> tuple[subprocess.Popen, Path]:
        environ = {**os.environ, **SMALL, "RECURX_DOUBLE_HANGS": hangs, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            check(tmp_path, *DOUBLE, *arguments), cwd=ROOT, env=environ, start_new_session=True
        )
        processes.append(process)
        return process, tmp_path

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def hanging(folder: Path, phase: str) -> list[int]:
    """Process ids of a phase that hangs in the double."""
    return [
        line["pid"] for path in folder.glob("gpu-*.jsonl") for line in journal.read(path)
        if line["kind"] == "hangs" and line["phase"] == phase
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_check_leaves_its_lines_and_no_process(started):
    process, folder = started("proof grid", "--phases", "proof owner", "proof grid")
    wait_for(lambda: hanging(folder, "proof grid"))
    process.kill()
    (child,) = hanging(folder, "proof grid")
    wait_for(lambda: not Path(f"/proc/{child}").exists(), 20)
    run(folder, "--merge")
    found = {entry["name"]: entry for entry in result_of(folder)["phases"]}
    assert result_of(folder)["status"] == "partial"
    assert found["proof owner"]["status"] == "passed" and found["proof owner"]["lines"]
    assert found["proof grid"]["status"] == "not finished"
    assert "SYNTHETIC" in result_of(folder)["provenance"]["gpu"]["name"]


@pytest.mark.slow
def test_a_killed_phase_and_one_that_waits_for_the_device_stop_no_other(started):
    names = ["proof owner", "proof grid", "proof cluster-2"]
    process, folder = started("proof grid", "--phases", *names)
    wait_for(lambda: hanging(folder, "proof grid"))
    (child,) = hanging(folder, "proof grid")
    os.kill(child, signal.SIGINT)  # as the runner does: the traceback comes, the process stays
    time.sleep(1)
    assert Path(f"/proc/{child}").exists()
    os.kill(child, signal.SIGKILL)
    assert process.wait(120) == 1
    found = {entry["name"]: entry for entry in result_of(folder)["phases"]}
    assert found["proof cluster-2"]["status"] == "passed" == found["proof owner"]["status"]
    assert found["proof grid"]["status"] == "failed"
    tail = found["proof grid"]["tail"]
    assert any("in wait_for_the_device" in line for line in tail) and "signal 9" in tail[-1]
