// Norm and scaling of lists of tensors, whatever their number and sizes, in one parallel region.
#include <algorithm>

#include "base/error.h"
#include "kernels/optim.h"
#include "kernels/optim_cuda.h"
#include "kernels/pool.h"
#include "kernels/table.h"

namespace roundel::kernels {
namespace {

constexpr size_t kChunk = 65536;  // elements that a thread takes at once

// f(chunk, view of a part of one tensor) for all parts, of which none crosses a tensor's end. Returns how many chunks there
// are.
template <class F>
size_t for_parts(std::span<const View> list, int threads, F f) {
  struct Part {
    size_t tensor, begin;
  };
  std::vector<Part> parts;
  std::vector<size_t> batches{0};
  size_t in_batch = 0;
  for (size_t t = 0; t < list.size(); ++t) {
    if (!is_floating(list[t].dtype))
      throw InvalidArgument(format("tensors[%zu]: expected a floating type, got %s", t, name_of(list[t].dtype)));
    for (size_t begin = 0; begin < list[t].count; begin += kChunk) {
      parts.push_back({t, begin});
      in_batch += std::min(kChunk, list[t].count - begin);
      if (in_batch < kChunk) continue;
      batches.push_back(parts.size());
      in_batch = 0;
    }
  }
  if (in_batch > 0) batches.push_back(parts.size());
  parallel_for(batches.size() - 1, threads > 0 ? threads : default_threads(), [&](size_t batch) {
    for (size_t p = batches[batch]; p < batches[batch + 1]; ++p) {
      const View& whole = list[parts[p].tensor];
      f(p, View{whole.at(parts[p].begin), std::min(kChunk, whole.count - parts[p].begin), whole.dtype});
    }
  });
  return parts.size();
}

// The same parts as a table for a GPU.
struct DeviceTable {
  explicit DeviceTable(std::span<const View> list) {
    for (const View& view : list) {
      Row row;
      row.streams[kGradient] = {view.data, view.dtype};
      row.count = view.count;
      for (size_t begin = 0; begin < view.count; begin += kChunk)
        chunks.push_back(
            {static_cast<uint32_t>(rows.size()), static_cast<uint32_t>(std::min(kChunk, view.count - begin)), begin});
      rows.push_back(row);
    }
  }
  std::vector<Row> rows;
  std::vector<Chunk> chunks;
};

}  // namespace

double sum_of_squares(std::span<const View> list, int threads, int device, void* stream) {
  if (device >= 0) {
    const DeviceTable table(list);
    return cuda_sum_of_squares(table.rows, table.chunks, device, stream);
  }
  size_t most = 0;
  for (const View& view : list) most += view.count / kChunk + 1;
  std::vector<double> sums(most);
  const Table& table = chosen();
  const size_t parts =
      for_parts(list, threads, [&](size_t p, const View& part) { sums[p] = table.squares(part.dtype, part.data, part.count); });
  double sum = 0;
  for (size_t p = 0; p < parts; ++p) sum += sums[p];
  return sum;
}

void scale_all(std::span<const View> list, double factor, int threads, int device, void* stream) {
  if (device >= 0) {
    const DeviceTable table(list);
    return cuda_scale_all(table.rows, table.chunks, factor, device, stream);
  }
  const Table& table = chosen();
  for_parts(list, threads, [&](size_t, const View& part) {
    const void* in = part.data;
    table.reduce(ReduceOp::Sum, part.dtype, part.data, &in, 1, part.count, Finish{factor, 1});
  });
}

}  // namespace roundel::kernels
