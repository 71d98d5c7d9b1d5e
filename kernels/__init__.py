"""Triton kernels of recurx: the fused pieces of one reasoning block, forward.

Each module holds one operation: its formula, the kernel and the host function that launches it.
Importing this package needs neither triton nor a GPU; importing one of its modules needs triton.

    linear_residual_rms   rms(residual + A @ W^T), also over the token axis through strides
"""
