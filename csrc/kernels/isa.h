// What a file that is compiled several times must say: where its names live and how its functions are marked.
//
// reduce_cpu.cc, cast_cpu.cc, dots_cpu.cc and optim_cpu.cc are compiled once per instruction set. Whatever is inline or a
// template in the headers that they include lives in an inline namespace named after the instruction set: otherwise the linker
// would keep one copy of each function for all paths, perhaps the AVX-512 one. For the same reason those files call no inline
// function of base/ or of the standard library.
#pragma once

#ifndef ROUNDEL_ISA_NAMESPACE
#define ROUNDEL_ISA_NAMESPACE generic
#endif

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE [[gnu::always_inline]] inline
#endif

// Before a loop whose output may be one of its inputs, at the same index: no iteration reads what another one writes.
#ifdef __clang__
#define ROUNDEL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ROUNDEL_INDEPENDENT _Pragma("GCC ivdep")
#endif
