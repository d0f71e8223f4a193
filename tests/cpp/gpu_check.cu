// Tests and times the CUDA kernels on the device at hand: bits against the CPU kernels, bandwidth against a device copy.
// Usage: roundel_gpu_check CAST.json OPTIMIZERS.json. Exits 77 when there is no device to test on, 1 when a check failed.
#include <cuda_runtime.h>

#include <cstring>
#include <random>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "gpu_check.h"
#include "kernels/cuda.h"
#include "kernels/kernels.h"

using namespace roundel;
using namespace roundel::test;

namespace {

// Finite values of every magnitude; what NaNs do is promised less exactly and tested on the CPU.
std::vector<float> samples(size_t count) {
  std::mt19937 random(3);
  std::vector<float> values(count);
  for (float& value : values) {
    do {
      const uint32_t bits = random();
      std::memcpy(&value, &bits, sizeof value);
    } while (!std::isfinite(value));
  }
  return values;
}

void check_bits(DType from, DType to, size_t count, size_t offset, double factor) {
  std::vector<float> values = samples(count + offset);
  std::vector<std::byte> in((count + offset) * size_of(from)), expected(count * size_of(to)), got(count * size_of(to));
  kernels::cast(from, in.data(), DType::Float32, values.data(), values.size());
  const std::byte* start = in.data() + offset * size_of(from);
  if (factor == 1) {
    kernels::cast(to, expected.data(), from, start, count);
  } else {  // the product is rounded once, from float32, or from float64 where the input is that
    const DType wide = from == DType::Float64 ? DType::Float64 : DType::Float32;
    std::vector<std::byte> product(count * size_of(wide));
    kernels::cast(wide, product.data(), from, start, count);
    kernels::scale(wide, product.data(), product.data(), count, factor);
    kernels::cast(to, expected.data(), wide, product.data(), count);
  }
  const DeviceBuffer device_in(in.size() + 1), device_out(got.size() + 1);
  must(cudaMemcpy(device_in.get(), in.data(), in.size(), cudaMemcpyHostToDevice));
  kernels::cuda_scale_cast(to, device_out.get(), from, static_cast<std::byte*>(device_in.get()) + offset * size_of(from), count,
                           factor, nullptr);
  must(cudaMemcpy(got.data(), device_out.get(), got.size(), cudaMemcpyDeviceToHost));
  if (std::memcmp(got.data(), expected.data(), got.size()) != 0)
    test::fail(__FILE__, __LINE__,
               format("%s to %s, %zu elements from %zu, times %g: bits differ from the CPU's", name_of(from), name_of(to),
                      count, offset, factor));
}

void write_timings(const char* path, const char* device) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) throw Error(std::string("cannot write ") + path);
  std::fprintf(file, "{\"schema\": 1, \"benchmark\": \"cuda_scale_cast\", \"device\": \"%s\", \"rows\": [", device);
  const char* separator = "";
  for (size_t count = 1u << 12; count <= 1u << 28; count <<= 4) {
    const DeviceBuffer in(count * 4), out(count * 4);
    must(cudaMemset(in.get(), 0, count * 4));
    const double cast = best_seconds(
        [&] { kernels::cuda_scale_cast(DType::Float16, out.get(), DType::Float32, in.get(), count, 0.5, nullptr); });
    const double copy = best_seconds([&] { must(cudaMemcpyAsync(out.get(), in.get(), count * 3, cudaMemcpyDeviceToDevice)); });
    std::fprintf(file,
                 "%s\n  {\"count\": %zu, \"bytes_moved\": %zu, \"time_us\": %.3f, \"GBs\": %.1f, \"copy_time_us\": %.3f, "
                 "\"percent_of_copy\": %.1f}",
                 separator, count, count * 6, cast * 1e6, count * 6 / cast * 1e-9, copy * 1e6, 100 * copy / cast);
    separator = ",";
  }
  std::fprintf(file, "\n]}\n");
  std::fclose(file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s CAST.json OPTIMIZERS.json\n", argv[0]);
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device here: %s\n", kernels::cuda_status().c_str());
    return 77;
  }
  cudaDeviceProp properties{};
  must(cudaGetDeviceProperties(&properties, 0));
  const DType floats[] = {DType::Float32, DType::Float64, DType::Float16, DType::BFloat16};
  for (const DType from : floats)
    for (const DType to : floats)
      for (const size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{4099}, size_t{1} << 20})
        for (const size_t offset : {size_t{0}, size_t{1}})
          for (const double factor : {1.0, 0.5, 1.0 / 3}) check_bits(from, to, count, offset, factor);
  check_optimizers();
  std::printf("%s: %d failed checks\n", kernels::cuda_status().c_str(), test::failures());
  if (test::failures() > 0) return 1;
  write_timings(argv[1], properties.name);
  write_optimizer_timings(argv[2], properties.name);
  return 0;
}
