#include "base/memory.h"

#include <sys/mman.h>

#include <algorithm>

#include "base/error.h"
#include "base/fd.h"

namespace roundel {
namespace {

constexpr size_t kLine = 64, kPage = 4096;
constexpr size_t kWorthAPage = 16 * kPage;

}  // namespace

std::byte* allocate_memory(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : bytes >= kWorthAPage ? kPage : kLine;
  const size_t rounded = std::max<size_t>(kLine, (bytes + kLine - 1) / kLine * kLine);
  void* data = nullptr;  // aligned_alloc() would want a size in whole pages
  if (::posix_memalign(&data, alignment, rounded) != 0) throw Error(format("no memory for a buffer of %zu bytes", bytes));
  if (bytes >= kHugePage) ::madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return static_cast<std::byte*>(data);
}

}  // namespace roundel
