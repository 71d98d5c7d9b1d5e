#!/bin/sh
# Everything that needs an NVIDIA GPU, in under nine minutes and without a network:
#
#     bench/gpu_check.sh OUTDIR [--quick | --figures]
#
# builds in place, compares every rx:: wrapper with the emulator's golden words, runs the tests that
# use the GPU, compute-sanitizer over the kernel tests, and the benchmarks. A phase that fails or
# runs out of its time does not stop the next. OUTDIR gets gpu_check.json, gpu_check.log, and the
# figures: bench-*.json (`python -m recurx bench report FILE`), ops.json. --figures leaves the proof
# out and measures all groups of suite "gpu"; what the time does not suffice for is left out.
# PY names the Python to use: one with torch, triton, pybind11, ninja and pytest.
set -eu
cd "$(dirname "$0")/.."
exec "${PY:-python3}" -m bench.gpu_check "$@"
