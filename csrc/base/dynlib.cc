#include "base/dynlib.h"

#include <dlfcn.h>
#include <link.h>

namespace roundel {

DynLib::DynLib(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    handle_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) {
      name_ = name;
      return;
    }
  }
  for (const std::string& name : names) reason_ += (reason_.empty() ? "none of " : ", ") + name;
  reason_ += " can be opened";
}

DynLib::~DynLib() {
  if (handle_ != nullptr) ::dlclose(handle_);
}

std::vector<std::string> DynLib::loaded(const std::vector<std::string>& beginnings) {
  struct Search {
    const std::vector<std::string>& beginnings;
    std::vector<std::string> found;
  } search{beginnings, {}};
  ::dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& into = *static_cast<Search*>(data);
        const std::string path = info->dlpi_name;
        const std::string file = path.substr(path.rfind('/') + 1);
        for (const std::string& beginning : into.beginnings)
          if (file.starts_with(beginning)) into.found.push_back(path);
        return 0;
      },
      &search);
  return search.found;
}

void* DynLib::find(const char* symbol_name) const { return handle_ == nullptr ? nullptr : ::dlsym(handle_, symbol_name); }

}  // namespace roundel
