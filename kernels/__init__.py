"""Triton kernels of recurx: the fused pieces of one reasoning block, forward.

Each module holds one operation: its formula, the kernel and the host function that launches it.
Importing this package needs neither triton nor a GPU; importing one of its modules needs triton.

    qkv_rope              Q, K, V of a state, Q and K rotated
    attention             softmax(Q K^T / sqrt(head_dim)) V
    gate_up_swiglu        silu(X @ gate^T) * (X @ up^T), over D, or over T through strides
    linear_residual_rms   rms(residual + A @ W^T), over D, or over T through strides

The rest of a training step (their addresses come in tables of `multi_tensor`):

    stablemax_cross_entropy   the loss of each token and its gradient, without fp64
    adam_atan2                one optimiser step of all weights
    ema                       the average of all weights
    sign_sgd                  the rows of a puzzle embedding that a batch touched
"""
