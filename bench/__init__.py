"""What needs the checkout: result files, pytest-benchmark suites of single operations, GPU check.

    results/       JSON files of `python -m recurx bench run`, and the plots drawn from them
    ops/           `make bench-ops`: one operation at a time
    gpu_check/     everything that needs an NVIDIA GPU, in two short calls

The suite itself is the package `recurx.bench`, so that installed users have it too.
"""
