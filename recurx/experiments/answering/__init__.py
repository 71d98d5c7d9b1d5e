"""`python -m recurx train`, `eval`, `solve` and `export`: nets are trained, asked and handed on.

train.py        a run, new or resumed; progress.py: what it shows; export.py: a net as ONNX
evaluate.py     accuracy, by steps of refinement; arc.py: by votes, for ARC
grades.py       accuracy and time by hardness, beside a classical solver
solve.py        boards in, boards out; boards_out.py: of files of any length; page.py: as HTML
journal.py      files that grow by parts and survive a kill
checkpoints.py  opens a checkpoint, with the task that it was trained for
refinement.py   how questions are answered: what is said, what the net recommends, defaults
"""
