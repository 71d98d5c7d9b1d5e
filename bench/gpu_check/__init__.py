"""All that needs an NVIDIA GPU, in two short calls on a machine without a network.

    python3 -m bench.gpu_check OUTDIR --call 1             # every phase, 420 s
    python3 -m bench.gpu_check OUTDIR --call 2 --phases proof times    # some of them, 270 s
    python3 -m bench.gpu_check OUTDIR --merge              # the file, after a call was killed

Each phase is a process of its own (`phases.py` lists them), so that a crash or a hang costs its own
lines alone. A line is in OUTDIR/gpu-DATE-call-N.jsonl as soon as it is known (`journal.py`); the
result file, which ends in .json, is made of these lines, again after each. It has the form of
`python -m recurx bench run`: put into bench/results/, `bench report` shows its figures. A process
that is out of time gets SIGINT, upon which it writes the traceback of every thread, and SIGKILL
five seconds later (`runner.py`).
"""
