"""The benchmark suite: `python -m recurx bench`. Figures as evidence, each checked before timed.

    cases.py      named cases (models and their data) and suites (what is run in one go)
    variants.py   ways to run a case: PyTorch's, and every backend of the registry; fp32 and bf16
    subjects.py   one variant of one case as an object that steps: inference and solving
    training.py   the same for training
    official.py   optimiser and averages as official loops run them, the baseline of training
    worker.py     the process that holds a subject
    host.py       Python between `recurx.recurse` and the engine's entry, microseconds a call
    counters.py   launches, memory, energy
    ceilings.py   what the machine reaches: copies and products, measured in the same run
    predict.py    what `recurx.plan` says of each row, by the ceilings of the same run
    checks.py     whether a variant's results are right; a wrong one is not timed
    lanes.py      options of a run, and a variant on its way through a group
    runner.py     workers in interleaved rounds, one group a case, mode and batch
    turns.py      the rounds themselves: samples of several things in turn
    results.py    the JSON files: schema, provenance, atomic writing, reading
    compare.py    which of two files is faster, by how much, and whether that is noise
    report.py     tables of README.md and docs/benchmarks.md; plots.py draws them
    profile.py    `python -m recurx profile`

Importing this package imports neither torch nor matplotlib.
"""
