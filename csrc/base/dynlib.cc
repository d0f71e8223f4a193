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
    if (!reason_.empty()) reason_ += "; ";
    reason_ += ::dlerror();
  }
}

DynLib::~DynLib() {
  if (handle_ != nullptr) ::dlclose(handle_);
}

void* DynLib::find(const char* symbol_name) const { return handle_ == nullptr ? nullptr : ::dlsym(handle_, symbol_name); }

}  // namespace roundel
