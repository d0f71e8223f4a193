// Scale and cast on the device: one pass, 16-byte accesses where both buffers allow them.
//
// A thread takes a pack of eight elements per turn (16 bytes of a 16-bit type, several 16-byte words of a wider one), and the
// grid is as large as the device holds at once. The conversions to and from float16 are the device's own instructions; only a
// NaN is put together by hand, since they would drop its payload.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "base/error.h"
#include "kernels/cuda.h"
#include "kernels/half.h"

namespace roundel::kernels {

namespace {

constexpr int kPack = 8;
constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;  // 2048 threads, which is what a multiprocessor keeps in flight

struct Float16 {
  using Storage = uint16_t;
  using Scalar = float;
  __device__ static float load(uint16_t x) {
    const uint32_t payload = (x & 0x3ffu) << 13;
    const bool nan = (x & 0x7fffu) > 0x7c00u;
    return nan ? float_of((x & 0x8000u) << 16 | 0x7fc00000u | payload) : __half2float(__ushort_as_half(x));
  }
  __device__ static uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t quiet = (bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x3ffu);
    return nan ? static_cast<uint16_t>(quiet) : __half_as_ushort(__float2half_rn(x));
  }
  __device__ static uint16_t store(double x) { return store(double_to_float_odd(x)); }
};

struct BFloat16 {
  using Storage = uint16_t;
  using Scalar = float;
  __device__ static float load(uint16_t x) { return bfloat16_to_float(x); }
  __device__ static uint16_t store(float x) { return float_to_bfloat16(x); }
  __device__ static uint16_t store(double x) { return store(double_to_float_odd(x)); }
};

struct Float32 {
  using Storage = float;
  using Scalar = float;
  __device__ static float load(float x) { return x; }
  __device__ static float store(float x) { return x; }
  __device__ static float store(double x) { return static_cast<float>(x); }
};

struct Float64 {
  using Storage = double;
  using Scalar = double;
  __device__ static double load(double x) { return x; }
  __device__ static double store(float x) { return x; }
  __device__ static double store(double x) { return x; }
};

template <class To, class From>
__device__ typename To::Storage convert(typename From::Storage element, typename From::Scalar factor) {
  const typename From::Scalar x = From::load(element);
  return To::store(factor == 1 ? x : x * factor);  // a product would drop the payload of a NaN
}

template <class T>
struct alignas(16) Pack {
  T element[kPack];
};

// The first packs * kPack elements in packs, the others one by one.
template <class To, class From>
__global__ void __launch_bounds__(kThreads) scale_cast(typename To::Storage* out, const typename From::Storage* in,
                                                       size_t count, size_t packs, typename From::Scalar factor) {
  const size_t first = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
  auto* packed_out = reinterpret_cast<Pack<typename To::Storage>*>(out);
  auto* packed_in = reinterpret_cast<const Pack<typename From::Storage>*>(in);
  for (size_t p = first; p < packs; p += threads) {
    const Pack<typename From::Storage> from = packed_in[p];
    Pack<typename To::Storage> to;
#pragma unroll
    for (int i = 0; i < kPack; ++i) to.element[i] = convert<To, From>(from.element[i], factor);
    packed_out[p] = to;
  }
  for (size_t i = packs * kPack + first; i < count; i += threads) out[i] = convert<To, From>(in[i], factor);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(format("[cuda] %s: %s", what, cudaGetErrorString(status)));
}

int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class To, class From>
void launch(void* out, const void* in, size_t count, double scale, cudaStream_t stream) {
  size_t packs = aligned(out) && aligned(in) ? count / kPack : 0;
  const size_t turns = packs > 0 ? packs : count;
  const size_t wanted = (turns + kThreads - 1) / kThreads;
  const size_t held = static_cast<size_t>(processors()) * kBlocksPerProcessor;
  auto factor = static_cast<typename From::Scalar>(scale);
  void* arguments[] = {&out, &in, &count, &packs, &factor};
  auto* kernel = reinterpret_cast<const void*>(&scale_cast<To, From>);
  const dim3 blocks(static_cast<unsigned>(wanted < held ? wanted : held));
  check(cudaLaunchKernel(kernel, blocks, dim3(kThreads), arguments, 0, stream), "launch of scale_cast");
}

template <class To>
void launch_to(void* out, DType from, const void* in, size_t count, double factor, cudaStream_t stream) {
  switch (from) {
    case DType::Float32:
      return launch<To, Float32>(out, in, count, factor, stream);
    case DType::Float64:
      return launch<To, Float64>(out, in, count, factor, stream);
    case DType::Float16:
      return launch<To, Float16>(out, in, count, factor, stream);
    default:
      return launch<To, BFloat16>(out, in, count, factor, stream);
  }
}

}  // namespace

bool cuda_compiled() { return true; }

std::string cuda_status() {
  const std::string compiled = "compiled for " ROUNDEL_CUDA_TARGETS ", ";
  int driver = 0, devices = 0, device = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return compiled + "driver not found";
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  cudaDeviceProp properties;
  if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess) return compiled + cudaGetErrorString(status);
  const std::string which = format("device %d of %d: %s, ", device, devices, properties.name);
  return compiled + which + format("sm_%d%d", properties.major, properties.minor);
}

void cuda_scale_cast(DType to, void* out, DType from, const void* in, size_t count, double factor, void* stream) {
  if (!is_floating(to) || !is_floating(from)) throw InvalidArgument("cuda_scale_cast is between floating types only");
  if (count == 0) return;
  auto* queue = static_cast<cudaStream_t>(stream);
  switch (to) {
    case DType::Float32:
      return launch_to<Float32>(out, from, in, count, factor, queue);
    case DType::Float64:
      return launch_to<Float64>(out, from, in, count, factor, queue);
    case DType::Float16:
      return launch_to<Float16>(out, from, in, count, factor, queue);
    default:
      return launch_to<BFloat16>(out, from, in, count, factor, queue);
  }
}

}  // namespace roundel::kernels
