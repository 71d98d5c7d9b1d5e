"""`python -m recurx eval` and `solve`: a trained net answers questions that somebody gives.

evaluate.py     accuracy, by steps of refinement; arc.py: by votes, for ARC
solve.py        boards in, boards out
checkpoints.py  opens a checkpoint, with the task that it was trained for
refinement.py   how questions are answered: what is said, what the net recommends, defaults
"""
