#include "base/dynlib.h"

#include <dlfcn.h>

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

void* DynLib::find(const char* symbol_name) const { return handle_ == nullptr ? nullptr : ::dlsym(handle_, symbol_name); }

}  // namespace roundel
