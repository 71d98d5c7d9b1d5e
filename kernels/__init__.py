"""Triton kernels of recurx: the fused pieces of one reasoning block, forward and backward.

Each module holds one operation: its formula, the kernel and the host function that launches it.
Importing this package needs neither triton nor a GPU; importing one of its modules needs triton.

    linear                every product of a block: Q, K, V; gate and up with SwiGLU; O and down
                          with their residual, whose norm is left to who reads the rows
    rms                   that norm alone, where nobody can take it over
    finish                what a call with damping or noise writes, the noise of which is `noise`
    attention             softmax(Q K^T / sqrt(head_dim)) V, Q and K rotated as they are loaded

    swiglu_backward       d_gate_up of a SwiGLU from the gradient of its result
    attention_backward    d_qkv, rotated back
    linear                residual + D @ W, the gradient of the input of a product
    rms_backward          the backward of an rms, over D or over T
    wgrad                 D^T X, added up over calls in fp32 without atomics

Beside products of PyTorch's library:

    pointwise             residual and rms, SwiGLU, and their backwards, each alone

The rest of a training step (their addresses come in tables of `multi_tensor`):

    stablemax_cross_entropy   the loss of each token and its gradient, without fp64
    adam_atan2                one optimiser step of all weights
    ema                       the average of all weights
    act_halt                  which samples halt, with counter-based exploration
    queue_take                where the halted slots find their next samples
    sign_sgd                  the rows of a puzzle embedding that a batch touched

What launches them in order, on tensors that it lays out (`recurx.backends` decides when):

    arena, call_table         the calls as rows over slots, and as words
    block, tiled              a block without gradient; a recursion over a slice of the batch
    block_training            a block that keeps what its backward reads, and that backward
    kept_layout               where a whole window keeps it
    library                   all of this by PyTorch's products and `pointwise`
"""
