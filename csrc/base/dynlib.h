// Libraries opened at run time (libmpi, libnccl, libcuda): their absence is an answer with a reason, never a failure to import.
#pragma once

#include <string>
#include <vector>

namespace roundel {

class DynLib {
 public:
  // Opens the first of `names` that loads; `reason()` says what was tried when none did.
  explicit DynLib(const std::vector<std::string>& names);
  ~DynLib();
  DynLib(const DynLib&) = delete;
  DynLib& operator=(const DynLib&) = delete;

  // Paths of what this process has loaded already under file names that begin like one of these.
  static std::vector<std::string> loaded(const std::vector<std::string>& beginnings);

  bool found() const { return handle_ != nullptr; }
  const std::string& name() const { return name_; }
  const std::string& reason() const { return reason_; }

  // nullptr when the library or the symbol is missing: optional symbols are nullable.
  template <class Function>
  Function* symbol(const char* symbol_name) const {
    return reinterpret_cast<Function*>(find(symbol_name));
  }

 private:
  void* find(const char* symbol_name) const;
  void* handle_ = nullptr;
  std::string name_;
  std::string reason_;
};

}  // namespace roundel
