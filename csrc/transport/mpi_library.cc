#include "transport/mpi_library.h"

#include <climits>
#include <cstring>
#include <mutex>
#include <optional>

#include "base/dynlib.h"
#include "base/env.h"
#include "base/error.h"

namespace roundel::transport {
namespace {

constexpr int kTypes = 7;
constexpr DType kTypeOf[kTypes] = {DType::Float32, DType::Float64, DType::Int8, DType::Int16,
                                   DType::Int32,   DType::Int64,   DType::UInt8};
constexpr ReduceOp kOpOf[] = {ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product};

// What mpi.h would define. T is the type of handles.
template <class T>
struct Constants {
  const char* name;
  T comm_world, byte, request_null, errors_return;
  T types[kTypes];  // of kTypeOf
  T ops[4];         // of kOpOf
  void* status_ignore;
  void* in_place;
  int threads[4];
  int tag_ub;
};

Constants<int> mpich_constants() {
  return {"MPICH",
          0x44000000,
          0x4c00010d,
          0x2c000000,
          0x54000001,
          {0x4c00040a, 0x4c00080b, 0x4c000137, 0x4c000238, 0x4c000439, 0x4c00083a, 0x4c00013b},
          {0x58000003, 0x58000002, 0x58000001, 0x58000004},
          reinterpret_cast<void*>(1),
          reinterpret_cast<void*>(-1),
          {0, 1, 2, 3},
          0x64400001};
}

// MPI 5.0, appendix A.
Constants<void*> standard_constants() {
  const auto handle = [](uintptr_t value) { return reinterpret_cast<void*>(value); };
  return {"standard",
          handle(0x101),
          handle(0x247),
          handle(0x180),
          handle(0x143),
          {handle(0x210), handle(0x214), handle(0x240), handle(0x248), handle(0x250), handle(0x258), handle(0x241)},
          {handle(0x21), handle(0x22), handle(0x23), handle(0x24)},
          nullptr,
          handle(1),
          {0, 1024, 2048, 4096},
          501};
}

// Its predefined handles are addresses of its own variables.
Constants<void*> openmpi_constants(const DynLib& library) {
  const auto at = [&](const char* symbol) {
    void* found = reinterpret_cast<void*>(library.symbol<void()>(symbol));
    if (found == nullptr) throw Error(library.name() + " has no " + symbol);
    return found;
  };
  return {"Open MPI",
          at("ompi_mpi_comm_world"),
          at("ompi_mpi_byte"),
          at("ompi_request_null"),
          at("ompi_mpi_errors_return"),
          {at("ompi_mpi_float"), at("ompi_mpi_double"), at("ompi_mpi_int8_t"), at("ompi_mpi_int16_t"), at("ompi_mpi_int32_t"),
           at("ompi_mpi_int64_t"), at("ompi_mpi_uint8_t")},
          {at("ompi_mpi_op_sum"), at("ompi_mpi_op_min"), at("ompi_mpi_op_max"), at("ompi_mpi_op_prod")},
          nullptr,
          reinterpret_cast<void*>(1),
          {0, 1, 2, 3},
          0};
}

// The functions, of one ABI. MPI_Status* is a void* here: nobody asks for one.
template <class T>
struct Functions {
  int (*Initialized)(int*);
  int (*Finalized)(int*);
  int (*Init_thread)(int*, char***, int, int*);
  int (*Query_thread)(int*);
  int (*Finalize)();
  int (*Error_string)(int, char*, int*);
  int (*Comm_rank)(T, int*);
  int (*Comm_size)(T, int*);
  int (*Comm_idup)(T, T*, T*);
  int (*Comm_set_errhandler)(T, T);
  int (*Comm_get_attr)(T, int, void*, int*);
  int (*Isend)(const void*, int, T, int, int, T, T*);
  int (*Issend)(const void*, int, T, int, int, T, T*);
  int (*Irecv)(void*, int, T, int, int, T, T*);
  int (*Ibarrier)(T, T*);
  int (*Iallreduce)(const void*, void*, int, T, T, T, T*);
  int (*Test)(T*, int*, void*);
  int (*Cancel)(T*);
};

template <class T>
Functions<T> load(const DynLib& library) {
  Functions<T> f;
  const auto take = [&]<class F>(F*& into, const char* name) {
    into = library.symbol<F>(name);
    if (into == nullptr) throw Error(library.name() + " has no " + name + ": it is no MPI library of version 3 or later");
  };
  take(f.Initialized, "MPI_Initialized");
  take(f.Finalized, "MPI_Finalized");
  take(f.Init_thread, "MPI_Init_thread");
  take(f.Query_thread, "MPI_Query_thread");
  take(f.Finalize, "MPI_Finalize");
  take(f.Error_string, "MPI_Error_string");
  take(f.Comm_rank, "MPI_Comm_rank");
  take(f.Comm_size, "MPI_Comm_size");
  take(f.Comm_idup, "MPI_Comm_idup");
  take(f.Comm_set_errhandler, "MPI_Comm_set_errhandler");
  take(f.Comm_get_attr, "MPI_Comm_get_attr");
  take(f.Isend, "MPI_Isend");
  take(f.Issend, "MPI_Issend");
  take(f.Irecv, "MPI_Irecv");
  take(f.Ibarrier, "MPI_Ibarrier");
  take(f.Iallreduce, "MPI_Iallreduce");
  take(f.Test, "MPI_Test");
  take(f.Cancel, "MPI_Cancel");
  return f;
}

std::string version_of(const DynLib& library) {
  const auto get = library.symbol<int(char*, int*)>("MPI_Get_library_version");
  if (get == nullptr)
    throw Error(library.name() + " has no MPI_Get_library_version: it is no MPI library of version 3 or later");
  char text[8192] = {};
  int length = 0;
  get(text, &length);
  std::string line;
  for (const char* at = text; *at != '\0' && *at != ',' && *at != '\n'; ++at)
    if (const char c = *at == '\t' ? ' ' : *at; c != ' ' || !line.ends_with(' ')) line += c;
  return line;
}

template <class T>
class MpiOf final : public Mpi {
 public:
  MpiOf(std::unique_ptr<DynLib> library, const Constants<T>& constants)
      : library_(std::move(library)), is_(constants), call_(load<T>(*library_)) {}

  const std::string& path() const override { return library_->name(); }
  std::string version() const override { return version_of(*library_); }
  const char* abi() const override { return is_.name; }

  bool initialized() const override { return ask(call_.Initialized, "MPI_Initialized"); }
  bool finalized() const override { return ask(call_.Finalized, "MPI_Finalized"); }

  bool initialize() override {
    if (finalized()) throw Error("MPI has been finalized in this process: it cannot be used again");
    const bool ours = !initialized();
    int level = 0;
    if (ours)
      check(call_.Init_thread(nullptr, nullptr, is_.threads[3], &level), "MPI_Init_thread");
    else
      check(call_.Query_thread(&level), "MPI_Query_thread");
    for (int i = 0; i < 4; ++i)
      if (level >= is_.threads[i]) threads_ = static_cast<MpiThreads>(i);
    check(call_.Comm_set_errhandler(is_.comm_world, is_.errors_return), "MPI_Comm_set_errhandler", ours);
    return ours;
  }
  MpiThreads threads() const override { return threads_; }
  void finalize() override { check(call_.Finalize(), "MPI_Finalize"); }

  Comm world() const override { return number(is_.comm_world); }
  Comm comm_at(uintptr_t address) const override {
    T handle;
    std::memcpy(&handle, reinterpret_cast<const void*>(address), sizeof handle);
    return number(handle);
  }
  int rank(Comm comm) const override { return get(call_.Comm_rank, comm, "MPI_Comm_rank"); }
  int size(Comm comm) const override { return get(call_.Comm_size, comm, "MPI_Comm_size"); }
  int highest_tag(Comm comm) const override {
    const auto lock = serialize();
    int* value = nullptr;
    int found = 0;
    check(call_.Comm_get_attr(handle(comm), is_.tag_ub, &value, &found), "MPI_Comm_get_attr");
    return found != 0 ? *value : 32767;
  }

  Request send(Comm comm, int peer, int tag, const void* data, size_t bytes) override {
    const auto lock = serialize();
    T request;
    check(call_.Isend(data, count(bytes), is_.byte, peer, tag, handle(comm), &request), "MPI_Isend");
    return number(request);
  }
  Request send_when_received(Comm comm, int peer, int tag, const void* data, size_t bytes) override {
    const auto lock = serialize();
    T request;
    check(call_.Issend(data, count(bytes), is_.byte, peer, tag, handle(comm), &request), "MPI_Issend");
    return number(request);
  }
  Request receive(Comm comm, int peer, int tag, void* data, size_t bytes) override {
    const auto lock = serialize();
    T request;
    check(call_.Irecv(data, count(bytes), is_.byte, peer, tag, handle(comm), &request), "MPI_Irecv");
    return number(request);
  }
  Request duplicate(Comm comm, Comm* made) override {
    const auto lock = serialize();
    *made = 0;
    T request;
    check(call_.Comm_idup(handle(comm), reinterpret_cast<T*>(made), &request), "MPI_Comm_idup");
    return number(request);
  }
  Request barrier(Comm comm) override {
    const auto lock = serialize();
    T request;
    check(call_.Ibarrier(handle(comm), &request), "MPI_Ibarrier");
    return number(request);
  }
  Request allreduce(Comm comm, void* data, size_t elements, DType dtype, ReduceOp op) override {
    const auto lock = serialize();
    T request;
    check(call_.Iallreduce(is_.in_place, data, count(elements), type_of(dtype), op_of(op), handle(comm), &request),
          "MPI_Iallreduce");
    return number(request);
  }
  bool can_reduce(DType dtype, ReduceOp op) const override {
    bool has_type = false, has_op = false;
    for (const DType each : kTypeOf) has_type |= each == dtype;
    for (const ReduceOp each : kOpOf) has_op |= each == op;
    return has_type && has_op;
  }
  bool test(Request& request) override {
    const auto lock = serialize();
    T native = handle(request);
    int done = 0;
    check(call_.Test(&native, &done, is_.status_ignore), "MPI_Test");
    request = number(native);
    return done != 0;
  }
  void cancel(Request& request) override {
    const auto lock = serialize();
    T native = handle(request);
    if (native == is_.request_null) return;
    check(call_.Cancel(&native), "MPI_Cancel");
    request = number(native);
  }

 private:
  static uintptr_t number(T handle) {
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<uintptr_t>(handle);
    else
      return static_cast<unsigned>(handle);
  }
  static T handle(uintptr_t number) {
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(number);
    else
      return static_cast<T>(static_cast<unsigned>(number));
  }
  static int count(size_t elements) {
    ROUNDEL_CHECK(elements <= INT_MAX);  // callers cut what is longer into pieces
    return static_cast<int>(elements);
  }
  T type_of(DType dtype) const {
    for (int i = 0; i < kTypes; ++i)
      if (kTypeOf[i] == dtype) return is_.types[i];
    check_failed("a type of MPI's", __FILE__, __LINE__);
  }
  T op_of(ReduceOp op) const {
    for (int i = 0; i < 4; ++i)
      if (kOpOf[i] == op) return is_.ops[i];
    check_failed("an operator of MPI's", __FILE__, __LINE__);
  }

  void check(int code, const char* what, bool matters = true) const {
    if (code == 0 || !matters) return;
    char text[8192] = {};
    int length = 0;
    call_.Error_string(code, text, &length);
    throw Error(format("%s failed: %s", what, text));
  }
  bool ask(int (*function)(int*), const char* what) const {
    int flag = 0;
    check(function(&flag), what);
    return flag != 0;
  }
  int get(int (*function)(T, int*), Comm comm, const char* what) const {
    const auto lock = serialize();
    int value = 0;
    check(function(handle(comm), &value), what);
    return value;
  }
  std::unique_lock<std::mutex> serialize() const {
    return threads_ == MpiThreads::Multiple ? std::unique_lock<std::mutex>() : std::unique_lock(mutex_);
  }

  std::unique_ptr<DynLib> library_;
  Constants<T> is_;
  Functions<T> call_;
  MpiThreads threads_ = MpiThreads::Single;
  mutable std::mutex mutex_;
};

bool has_standard_abi(const DynLib& library) {
  const auto get = library.symbol<int(int*, int*)>("MPI_Abi_get_version");
  int major = -1, minor = -1;
  return get != nullptr && get(&major, &minor) == 0 && major > 0;
}

std::shared_ptr<Mpi> make(std::unique_ptr<DynLib> library) {
  const std::string version = version_of(*library);
  if (library->symbol<void()>("ompi_mpi_comm_world") != nullptr) {
    const Constants<void*> constants = openmpi_constants(*library);
    return std::make_shared<MpiOf<void*>>(std::move(library), constants);
  }
  if (has_standard_abi(*library)) return std::make_shared<MpiOf<void*>>(std::move(library), standard_constants());
  for (const char* known : {"MPICH", "Intel", "MVAPICH", "CRAY", "Cray"})
    if (version.find(known) != std::string::npos) return std::make_shared<MpiOf<int>>(std::move(library), mpich_constants());
  throw Error(library->name() + ": an MPI library of an ABI that is not known: " + version);
}

// In what order names are tried. mpi4py's wheels use the same ones: two libraries of a process must be one.
std::vector<std::string> names_of(const std::string& family) {
  const std::vector<std::string> openmpi = {"libmpi.so.40"}, mpich = {"libmpi.so.12", "libmpi_abi.so.1", "libmpi_abi.so.0"};
  std::vector<std::string> names = family == "openmpi" ? openmpi : mpich;
  if (family.empty()) names.insert(names.end(), openmpi.begin(), openmpi.end());
  names.push_back("libmpi.so");
  return names;
}

// Another family's library would end the process in MPI_Init, or believe itself alone.
void check_family(const Mpi& mpi, const std::string& family) {
  const bool is_openmpi = mpi.version().find("Open MPI") != std::string::npos;
  if (!family.empty() && is_openmpi != (family == "openmpi"))
    throw Error(
        format("%s is %s, which is not the launcher's MPI library: set ROUNDEL_MPI_LIBRARY to the one that belongs to it",
               mpi.path().c_str(), mpi.version().c_str()));
}

std::mutex g_mutex;
std::shared_ptr<Mpi> g_mpi;  // never unloaded: MPI libraries leave threads and handlers behind

}  // namespace

const char* name_of(MpiThreads threads) {
  constexpr const char* names[] = {"MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE"};
  return names[static_cast<int>(threads)];
}

std::shared_ptr<Mpi> Mpi::opened() {
  const std::lock_guard lock(g_mutex);
  return g_mpi;
}

std::vector<std::string> Mpi::candidates(const std::string& family, const std::string& opener,
                                         const std::vector<std::string>& folders) {
  if (const std::string forced = env::text("ROUNDEL_MPI_LIBRARY"); !forced.empty()) return {forced};
  if (!opener.empty()) return {opener};
  std::vector<std::string> paths = DynLib::loaded({"libmpi.so", "libmpi_abi.so", "libmpich.so"});
  for (const std::string& name : names_of(family)) {
    for (const std::string& folder : folders) paths.push_back(folder + "/" + name);
    paths.push_back(name);
  }
  return paths;
}

std::shared_ptr<Mpi> Mpi::open(const std::string& family, const std::string& opener, const std::vector<std::string>& folders) {
  const std::lock_guard lock(g_mutex);
  if (g_mpi != nullptr) {
    check_family(*g_mpi, family);
    return g_mpi;
  }
  auto library = std::make_unique<DynLib>(candidates(family, opener, folders));
  if (!library->found()) throw Error("there is no MPI library: " + library->reason());
  auto found = make(std::move(library));
  check_family(*found, family);
  g_mpi = std::move(found);
  // Leaked on purpose with whatever holds it at the end of the process.
  new std::shared_ptr<Mpi>(g_mpi);
  return g_mpi;
}

}  // namespace roundel::transport
