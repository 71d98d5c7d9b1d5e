"""PTX, as nvcc and Triton emit it, translated to C++ for the emulator's runtime.

parser.py turns text into statements; translate.py walks them and keeps registers, scopes and
labels; the tables in arithmetic.py, memory.py, sync.py and tensor.py give the C++ of each opcode.
An instruction or modifier that is in no table stops the translation with its line.
"""
