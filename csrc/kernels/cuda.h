// The CUDA way of the kernels; cast_cuda.cu, or no_cuda.cc in a build without CUDA.
#pragma once

#include <cstddef>
#include <string>

#include "base/dtype.h"

namespace roundel::kernels {

// Whether this build has device code.
bool cuda_compiled();

// One line for people, and no exception: "compiled for sm_80 sm_90, device 0 of 1: NVIDIA H100 80GB HBM3, sm_90",
// "compiled for sm_80 sm_90, driver not found", "built without CUDA: no working nvcc at build time".
std::string cuda_status();

// out[i] = (to) (in[i] * factor) between the floating types: scaled in float32 (in float64 when `from` is float64), rounded to
// nearest even. The bits are the CPU's, except for the payload of a NaN that is multiplied or that comes from or goes to a
// float64. `out` may be `in` when the sizes are equal. Both are memory of the current device, aligned to their elements;
// `stream` is a cudaStream_t. Returns when the kernel is queued; throws Error if it cannot be, InvalidArgument for other types.
void cuda_scale_cast(DType to, void* out, DType from, const void* in, size_t count, double factor, void* stream);

}  // namespace roundel::kernels
