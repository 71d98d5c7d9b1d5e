// rx.cuh - the instructions that CUDA C++ has no name for, each wrapped once.
//
// Every wrapper has two bodies: inline PTX for nvcc, and a call of the emulator (tests/emulator)
// for g++ with -DRX_EMU, so that the same kernel source runs on a machine without a GPU, under its
// race checker. PTX appears in these headers and nowhere else. What no shipped kernel uses is
// wrapped where the tests' own kernels are (tests/emulator/fixtures/more_rx.cuh).
//
// Shared memory is addressed by 32 bits (smem_u32 of a pointer); mapa() names the same variable in
// another CTA of the cluster. Wrappers from cluster.cuh on need sm_90, those of wgmma.cuh sm_90a.
#pragma once
#include "bulk.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "warp.cuh"
#include "wgmma.cuh"
