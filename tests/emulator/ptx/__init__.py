"""PTX, as nvcc and Triton emit it, translated to C++ for the emulator's runtime.

parser.py turns text into statements, translate.py walks them and keeps registers, scopes and labels,
and the instruction tables (arithmetic.py, memory.py, sync.py, tensor.py) give the C++ of each opcode.
An instruction or modifier that is not in a table stops the translation with its line.
"""
