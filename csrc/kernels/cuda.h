// The CUDA way of the kernels; cast_cuda.cu, or no_cuda.cc in a build without CUDA.
#pragma once

#include <cstddef>
#include <string>

#include "base/dtype.h"

namespace roundel::kernels {

// Whether this build has device code.
bool cuda_compiled();

// One line for people: the device, or why there is none ("compiled for sm_80 sm_90, ...", "built without CUDA: ..."). Never throws.
std::string cuda_status();

// out[i] = (to) (in[i] * factor) between the floating types: scaled in float32 (in float64 when `from` is float64), rounded to
// nearest even. The bits are the CPU's, except for the payload of a NaN where it is multiplied or float64 takes part. `out` may be `in` when the sizes
// are equal. Both are memory of the current device, aligned to their elements; `stream` is a cudaStream_t. Returns when the
// kernel is queued; throws Error when it cannot be, InvalidArgument for another type.
void cuda_scale_cast(DType to, void* out, DType from, const void* in, size_t count, double factor, void* stream);

}  // namespace roundel::kernels
