"""Triton kernels of recurx: the fused pieces of one reasoning block, forward.

Each module holds one operation: its formula, the kernel and the host function that launches it.
Importing this package needs neither triton nor a GPU; importing one of its modules needs triton.

    qkv_rope              Q, K, V of a state, Q and K rotated
    attention             softmax(Q K^T / sqrt(head_dim)) V
    gate_up_swiglu        silu(X @ gate^T) * (X @ up^T), over D, or over T through strides
    linear_residual_rms   rms(residual + A @ W^T), over D, or over T through strides
"""
