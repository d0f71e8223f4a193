// Stands in for cast_cuda.cu in a build without CUDA; CMake says why in ROUNDEL_NO_CUDA_REASON.
#include "base/error.h"
#include "kernels/cuda.h"
#include "kernels/optim_cuda.h"

namespace roundel::kernels {

bool cuda_compiled() { return false; }

std::string cuda_status() { return "built without CUDA: " ROUNDEL_NO_CUDA_REASON; }

void cuda_scale_cast(DType, void*, DType, const void*, size_t, double, void*) { throw Error(cuda_status()); }

std::unique_ptr<CudaOptimizer> make_cuda_optimizer(RuleId, RuleOptions, const std::vector<Row>&, const std::vector<Chunk>&,
                                                   int) {
  throw Error(cuda_status());
}

double cuda_sum_of_squares(const std::vector<Row>&, const std::vector<Chunk>&, int, void*) { throw Error(cuda_status()); }

void cuda_scale_all(const std::vector<Row>&, const std::vector<Chunk>&, double, int, void*) { throw Error(cuda_status()); }

}  // namespace roundel::kernels
