"""What every test shares: a fixed seed, reproducible fuzzing, the meaning of `gpu`, and a choice of
backends that neither clocks nor other runs decide."""

import faulthandler
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key as STDERR

# For the processes that tests start, too; tests of measuring switch both on.
os.environ["RECURX_AUTOTUNE"] = "0"
os.environ["RECURX_CACHE"] = "0"

# No deadline: the first example of a test pays for lazy imports and compiled kernels. Derandomised:
# the same commit must pass or fail every time; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("recurx", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)


def pytest_configure(config):
    # A shell's & ignores Ctrl-C, and what tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--hypothesis-profile", default=None) is None:
        hypothesis.settings.load_profile("recurx")


def pytest_runtest_logreport(report):
    """Names of failures as they come: a run that somebody cuts off has no closing list."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED so far: {report.nodeid}", flush=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """How a process of tests ended that was not told to: a signal's number says who did it."""
    if error is not None:
        code = node.gateway._io.popen.wait(timeout=10)
        print(f"\n{node.gateway.id} ended by itself, exit code {code}: {error}", flush=True)


# Files that take a minute and more of processor time, from an empty cache. They come first, so that
# the processes of a run end together; two that wait for one build are not neighbours.
LONGEST = (
    "aot/test_cuda_resources.py", "device/test_gpu_check.py", "aot/test_resources.py",
    "cpu/test_cpu_window_planted.py", "cpu/test_cpu_window.py", "cuda/test_cluster_recursion.py",
    "cpu/test_sanitized.py", "cuda/test_cuda_owner_scratch.py", "cpu/test_aarch64.py",
    "cpu/test_cpu_variant_window.py", "hostile/test_corpus.py", "cpu/test_dot_core.py",
    "test_documents.py", "cpu/test_cpu_engine.py",
)  # fmt: skip
FIRST = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
assert all(path.exists() for path in FIRST), "a file of LONGEST is gone"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.get(item.path, len(FIRST)))  # the others stay as they are
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_routes():
    """Tests put other backends and devices in place of real ones."""
    from recurx import route

    route.forget()


@pytest.fixture
def native():
    """The best CPU engine of this machine."""
    from recurx.backends import cpu

    reason = cpu.BACKEND.why_unavailable()
    if reason is not None:
        pytest.skip(f"backend cpu {reason}")
    return cpu.BACKEND


@pytest.fixture(autouse=True, scope="module")
def crashes_have_tracebacks(pytestconfig):
    """Triton's compiler leaves LLVM's handlers in a process, which say nothing of a crash: before
    each file they are Python's again."""
    faulthandler.disable()
    faulthandler.enable(file=pytestconfig.stash[STDERR])


@pytest.fixture
def threads():
    """Gives back the number of threads that a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
