"""Plans and their predicted costs: counts against closed formulas, selection, printing."""

import contextlib
import dataclasses
import types

import pytest
import torch

import recurx
from recurx import plan
from recurx.bench import data_parallel
from recurx.explanation import _device_note
from recurx.models.config import TRMConfig
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, NetSpec
from recurx.plan import Device, LaunchPlan, Work, count
from recurx.plan import device as device_file
from recurx.plan.device import gpu_device
from recurx.problem import Problem

CPU = Device("test", "cpu", (0, 0), 2, 0, 0, 20.0, 20.0, 0.1, 0.2, 2.0, 2.0, 1.0)


def problem(kind=ATTENTION, batch=1, dtype=torch.bfloat16, device="cpu", tokens=97) -> Problem:
    """TRM Sudoku of the paper: 21 calls of two blocks."""
    if kind == ATTENTION:
        block = BlockSpec(ATTENTION, 512, 1536, num_heads=8)
    else:
        block = BlockSpec(TOKEN_MLP, 512, 1536, tokens=tokens, token_inner=512)
    nets = (("L", NetSpec((block, block))),)
    schedule = recurx.Schedule.trm(3, 6)
    return Problem(schedule, nets, batch, tokens, 512, dtype, device, rope=kind == ATTENTION)


def test_counts_are_those_of_the_published_case():
    # 2 M N K of each product, and the two products of attention.
    rows, products = 97, 0
    products += 2 * rows * 512 * (3 * 512 + 512 + 3 * 1536)
    products += 4 * 97 * 97 * 512
    counted = {s.name: s.flops for s in count.step_stages(problem())}
    assert sum(counted[n] for n in ("qkv", "o", "gate_up", "down")) + 4 * 97 * 97 * 512 * 42 == (
        products * 42
    )
    assert counted["attention"] == 42 * (4 * 97 * 97 * 512 + 5 * 8 * 97 * 97)
    assert count.flops(problem()) == pytest.approx(28.6e9, rel=0.01)
    assert count.weight_values(problem()) == 2 * 512 * (4 * 512 + 3 * 1536)  # 13.6 MB in bf16
    assert count.flops(problem(batch=5)) == pytest.approx(5 * count.flops(problem()))


def test_stages_of_token_mlp_have_its_own_names_and_products():
    stages = {s.name: s for s in count.step_stages(problem(TOKEN_MLP))}
    parts = ("gate_up", "swiglu", "down", "norm")
    assert {*parts, *(f"t_{part}" for part in parts), "inject"} == set(stages)
    assert stages["t_gate_up"].flops == 42 * 4 * 512 * 97 * 512
    assert stages["t_down"].weights == 42 * 97 * 512


def test_inject_counts_the_reads_of_each_call():
    stages = {s.name: s for s in count.step_stages(problem())}
    state = 97 * 512
    assert stages["inject"].reads == 3 * (6 * 3 + 2) * state  # z_L + (z_H + x), then z_H + z_L


def test_official_eager_traffic_is_the_counted_one():
    # Counted in the official code: 0.54 GB of activations a sample and step, 1.15 GB of weight
    # casts, 1,784 kernels with embedding and heads, of which 1,764 are in the recursion.
    one, two = (recurx.cost(problem(batch=b), "h100")["eager"].work for b in (1, 2))
    assert two.dram_bytes - one.dram_bytes == pytest.approx(0.54e9, rel=0.02)
    assert 2 * one.dram_bytes - two.dram_bytes == pytest.approx(1.15e9, rel=0.02)
    assert one.launches == 1764


def test_prediction_takes_the_slowest_limit_and_adds_what_nothing_hides():
    work = Work(1e9, 2e9, 1e9, 0, launches=10, barriers=5, itemsize=4)
    parts = work.parts(CPU)
    assert parts["products"] == pytest.approx(2e9 / 0.2e12)
    assert parts["dram"] == pytest.approx(1 / 20)
    assert work.seconds(CPU) == pytest.approx(1 / 20 + 10 * 2e-6 + 5e-6)
    serial = dataclasses.replace(work, overlap=False)
    assert serial.seconds(CPU) == pytest.approx(1 / 20 + 0.01 + 25e-6)
    half = dataclasses.replace(work, parallel=1)
    assert half.parts(CPU)["products"] == pytest.approx(2 * parts["products"])


def test_pick_takes_the_least_predicted_time_and_says_why_nothing_fits():
    picked = LaunchPlan.pick(problem(dtype=torch.float32), CPU)
    assert picked.backend == "cpu" and picked.kind == "columns"
    assert LaunchPlan.pick(problem(dtype=torch.float32, batch=8), CPU).kind == "samples"
    assert LaunchPlan.pick(problem(), CPU, backend="eager").backend == "eager"
    assert "cpu/columns(threads=2" in str(picked)
    with pytest.raises(recurx.BackendUnavailable, match="does not run on h100"):
        LaunchPlan.pick(problem(), plan.DEVICES["h100"], backend="cpu")


def test_cost_prints_every_plan_and_its_limit():
    costs = recurx.cost(problem(batch=64), "h100")
    text = str(costs)
    assert "eager/operators" in text and "published peaks, not measured here" in text
    assert costs.weight_bytes == 13_631_488
    with pytest.raises(KeyError):
        costs["cpu"]
    with pytest.raises(recurx.InvalidArgument, match=r"a100.*h100"):
        recurx.cost(problem(), "h900")


def test_cost_prints_of_every_cuda_kernel_how_full_the_device_is_and_what_it_moves():
    costs = recurx.cost(problem(batch=8, device="cuda"), "h100")
    _, said, head, *rows = str(costs).splitlines()
    assert said.endswith("times are reckoned, not measured")
    order = [head.index(name) for name in ("ms", "busy", "DRAM MB", "L2 MB", "shared MB")]
    assert order == sorted(order)
    printed = {row.split()[0]: row.split() for row in reversed(rows) if row.startswith("cuda/")}
    busy = {"cuda/owner": "8/132", "cuda/grid": "132/132", "cuda/cluster": "16/132"}
    assert {name: words[3] for name, words in printed.items()} == busy
    weights = 21 * costs.weight_bytes / 1e6
    for name, (*_, l2, shared) in ((name, words[:7]) for name, words in printed.items()):
        each = 8 if name == "cuda/owner" else 1  # reads the weights, once a call
        assert float(l2) > each * weights, name
        assert float(shared) > 8 * weights, name  # all samples meet them there


def test_this_cpu_is_measured_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    device = Device.of("cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert device.measured and device.kind == "cpu" and device.units == torch.get_num_threads()
    assert 1e-3 < device.fp32_tflops < 50 and 0.5 < device.dram_gbs < 2000
    assert Device.of(device) is device and Device.of(None) is device


def test_published_devices_are_complete_and_ordered_as_known():
    assert set(plan.DEVICES) == {
        "a100", "rtx3090", "rtxa6000", "a10", "a10g", "l4", "l40s", "rtx4090", "h100", "h200",
        "gh200", "h20", "b200", "rtx5090", "rtxpro6000", "gb10",
    }  # fmt: skip
    for name, device in plan.DEVICES.items():
        assert device.name == name and device.kind == "cuda" and not device.measured
        assert not device.guess and "published" in device.source
    rates = [plan.DEVICES[name].bf16_tflops for name in ("l4", "a100", "h100", "b200")]
    assert rates == sorted(rates)
    assert plan.DEVICES["l4"].shared_bytes < plan.DEVICES["a100"].shared_bytes


@pytest.mark.parametrize(
    "name, capability, units, key",
    [
        ("NVIDIA H200", (9, 0), 132, "h200"),
        ("NVIDIA GH200 480GB", (9, 0), 132, "gh200"),
        ("NVIDIA H20", (9, 0), 78, "h20"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "a100"),
        ("NVIDIA A10G", (8, 6), 80, "a10g"),
        ("NVIDIA L40S", (8, 9), 142, "l40s"),
        ("NVIDIA L4", (8, 9), 58, "l4"),
        ("NVIDIA RTX A6000", (8, 6), 84, "rtxa6000"),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, "rtx3090"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 170, "rtx5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, "rtxpro6000"),
        ("NVIDIA GB10", (12, 1), 48, "gb10"),
    ],
)
def test_a_gpus_own_name_finds_its_entry(name, capability, units, key):
    assert gpu_device(name, capability, units) == plan.DEVICES[key]
    assert gpu_device(name, capability, units, l2_bytes=7).l2_bytes == 7  # what it says of itself


def test_what_is_not_listed_is_a_guess_and_says_so():
    laptop = gpu_device("NVIDIA GeForce RTX 4070", (8, 9), 46)  # as an L4 before a 4090
    assert laptop.guess == "l4" and laptop.bf16_tflops == pytest.approx(121 * 46 / 58)
    assert gpu_device("NVIDIA GeForce RTX 5080", (12, 0), 84).guess == "rtx5090"
    text = str(recurx.cost(problem(device="cuda"), laptop))
    assert "a guess, those of l4 scaled by multiprocessors" in text
    assert "guess" not in str(recurx.cost(problem(device="cuda"), "l4"))


def test_explain_says_that_the_rates_are_guessed(monkeypatch):
    guessed = gpu_device("NVIDIA GeForce RTX 4070", (8, 9), 46)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Device, "of", staticmethod(lambda kind: guessed))
    assert "rates of NVIDIA GeForce RTX 4070: a guess, those of l4" in _device_note("cuda")
    assert _device_note("cpu") == ""


def test_a_gpu_is_asked_for_its_sizes_and_its_clusters(monkeypatch):
    """By the driver, on that very device; without kernels for clusters nobody is asked."""
    asked = []

    @contextlib.contextmanager
    def on(index):
        asked.append(index)
        yield

    found = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
        shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "device", on)
    build = types.SimpleNamespace(cuda_cluster_places=lambda: [(512, 2, 66), (512, 8, 15)])
    monkeypatch.setattr(recurx, "_C", build, raising=False)
    made = device_file._cuda.__wrapped__(3)
    assert asked == [3] and made.clusters == ((512, 2, 66), (512, 8, 15))
    assert dataclasses.replace(made, clusters=()) == plan.DEVICES["h100"]
    monkeypatch.setattr(recurx, "_C", types.SimpleNamespace())
    assert device_file._cuda.__wrapped__(3).clusters == ()


# ---- GPUs: what overlaps, and how plans are ordered --------------------------------------------


def test_eagers_launches_run_ahead_of_the_device():
    """The slower of the two decides, not their sum; a graph's launches are still added."""
    h100 = plan.DEVICES["h100"]
    few, many = (recurx.cost(problem(batch=b, device="cuda"), h100)["eager"] for b in (1, 512))
    assert few.seconds(h100) == pytest.approx(1764 * h100.call_us * 1e-6)
    parts = many.work.parts(h100)
    between = 1764 * h100.launch_us * 1e-6
    assert many.seconds(h100) == pytest.approx(parts["dram"] + parts["products"] + between)
    graphed = dataclasses.replace(many.work, from_python=False)
    assert graphed.seconds(h100) == pytest.approx(parts["dram"] + parts["products"] + between)


def test_shared_memory_is_a_limit_of_its_own():
    """An H100 reads 128 bytes a clock and multiprocessor while it multiplies 4096 FLOP."""
    h100 = plan.DEVICES["h100"]
    assert h100.shared_gbs == pytest.approx(132 * 128 * 989e12 / 132 / 4096 / 1e9)
    assert plan.DEVICES["rtx4090"].shared_gbs == pytest.approx(128 * 128 * 2.52, rel=0.01)
    work = Work(1e9, 1e9, 0, 0, launches=0, shared_bytes=1e9)
    assert work.seconds(h100) == pytest.approx(1e9 / (0.85e9 * h100.shared_gbs))


def test_of_equal_plans_the_one_with_less_traffic_is_taken():
    """64 samples take as long in any cluster: the largest reads the tape least often."""
    h100 = plan.DEVICES["h100"]
    asked = dataclasses.replace(h100, clusters=((512, 2, 66), (512, 4, 33), (512, 8, 16)))
    found = problem(batch=64, device="cuda")
    assert LaunchPlan.pick(found, asked, "cuda")["cluster"] == 8
    # As real ones are cut, 15 of 8 run at once: another round for one sample more than they hold.
    fewer = dataclasses.replace(h100, clusters=((512, 2, 66), (512, 4, 33), (512, 8, 15)))
    assert LaunchPlan.pick(found, fewer, "cuda")["cluster"] == 4
    assert LaunchPlan.pick(found, h100, "cuda")["cluster"] == 2  # nobody asked: assumed to be cut
    other = dataclasses.replace(h100, clusters=((256, 8, 99),))  # of another kernel
    assert LaunchPlan.pick(found, other, "cuda")["cluster"] == 2


@pytest.mark.parametrize("device", ["h100", "h200", "gh200"])
@pytest.mark.parametrize("batch", [64, 132, 512])
def test_on_hopper_the_cluster_kernel_goes_before_the_owner(batch, device):
    assert LaunchPlan.pick(problem(batch=batch, device="cuda"), plan.DEVICES[device]).kind == (
        "cluster"
    )


def test_a_model_gives_the_same_problem_as_its_shapes():
    from recurx.models import TRM, problem_of_model

    made = problem_of_model(TRM(TRMConfig.sudoku_att()))
    assert count.flops(made) == count.flops(problem())


def test_scaling_is_perfect_alone_and_pays_for_the_exchange():
    one = data_parallel.data_parallel(7_000_000, 0.05, 768, 1)
    assert one.efficiency == 1 and one.exchange_seconds == 0
    eight = data_parallel.data_parallel(7_000_000, 0.05, 768, 8, backward_share=0)
    assert eight.exchange_seconds == pytest.approx(2 * 7 / 8 * 28e6 / 450e9 + 14 * 3e-6)
    assert eight.step_seconds == pytest.approx(0.05 + eight.exchange_seconds)
    many = data_parallel.data_parallel(7_000_000, 0.05, 768, 64, backward_share=0)
    assert many.efficiency < eight.efficiency < 1
    assert many.samples_per_second > 7 * eight.samples_per_second
    hidden = data_parallel.data_parallel(7_000_000, 0.05, 768, 8, backward_share=0.5)
    assert hidden.efficiency == 1
