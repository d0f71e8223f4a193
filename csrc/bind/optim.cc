// Fused optimizers: _core.OptimizerPlan, and the norm and scaling of lists of tensors.
//
// A list of a thousand gradients is read in every step, so that is done by hand: a borrowed DLPack tensor each, and a
// comparison with what the plan has.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "kernels/optim.h"

namespace py = pybind11;

namespace roundel::bind {
namespace {

using kernels::OptimizerPlan;
using kernels::RuleId;
using kernels::RuleOptions;

[[noreturn]] void refuse(const char* what, size_t i, const std::string& expected, const std::string& got) {
  throw InvalidArgument(format("%s[%zu]: expected %s, got %s", what, i, expected.c_str(), got.c_str()));
}

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

// Where the elements of a tensor lie. Streams of one parameter must lie alike; they need not be C-contiguous.
struct Elements {
  View view;
  int device = -1;      // CUDA device, -1: CPU
  uint64_t layout = 0;  // 0: C-contiguous; else a hash of the strides
};

uint64_t dense_layout(const dlpack::Tensor& tensor, const char* what, size_t i) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, length
  uint64_t hash = 14695981039346656037u;          // FNV-1a
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 1) continue;
    dims.emplace_back(tensor.strides[d], tensor.shape[d]);
    hash = (hash ^ static_cast<uint64_t>(tensor.strides[d])) * 1099511628211u;
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, length] : dims) {
    if (stride != expected)
      refuse(what, i, "a tensor without gaps or repeated elements", "one with other strides; pass a contiguous copy");
    expected *= length;
  }
  return hash | 1;
}

// Reads tensors of one list; remembers the exchange table of the last one's type.
class Reader {
 public:
  explicit Reader(const char* what) : what_(what) {}

  Elements read(PyObject* object, size_t i) {
    if (Py_TYPE(object) != type_) {
      type_ = Py_TYPE(object);
      api_ = exchange_api(object);
    }
    if (api_ == nullptr) return Elements{to_array(object, true, what_).view, -1, 0};
    dlpack::Tensor tensor;
    if (api_->borrow(object, &tensor) != 0) throw py::error_already_set();
    Elements found;
    if (tensor.device_type == dlpack::kCuda)
      found.device = tensor.device_id;
    else if (tensor.device_type != dlpack::kCpu && tensor.device_type != dlpack::kCudaHost)
      refuse(what_, i, "a tensor of the CPU or of CUDA", "one on DLPack device type " + std::to_string(tensor.device_type));
    const auto dtype = tensor.lanes == 1 ? dtype_of(tensor.code, tensor.bits) : std::nullopt;
    if (!dtype || !is_floating(*dtype))
      refuse(what_, i, "float32, float64, float16 or bfloat16", dtype ? name_of(*dtype) : "another type");
    const auto [count, contiguous] = dlpack::extent(tensor);
    if (!contiguous) found.layout = dense_layout(tensor, what_, i);
    found.view = {static_cast<std::byte*>(tensor.data) + tensor.byte_offset, count, *dtype};
    return found;
  }

 private:
  const char* what_;
  PyTypeObject* type_ = nullptr;
  dlpack::ExchangeApi* api_ = nullptr;
};

// `tensor.grad` as a new reference. Where the attribute is a C function of the type, as torch has it, that is called.
class GradOf {
 public:
  PyObject* operator()(PyObject* tensor) {
    if (Py_TYPE(tensor) != type_) look_at(Py_TYPE(tensor));
    PyObject* grad = get_ != nullptr ? get_(tensor, closure_) : PyObject_GetAttrString(tensor, "grad");
    if (grad == nullptr) throw py::error_already_set();
    return grad;
  }

 private:
  void look_at(PyTypeObject* type) {
    type_ = type;
    get_ = nullptr;
    const auto found = py::getattr(reinterpret_cast<PyObject*>(type), "grad", py::none());
    if (!Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) return;
    const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(found.ptr());
    if (!PyType_IsSubtype(type, descriptor->d_common.d_type)) return;
    get_ = descriptor->d_getset->get;
    closure_ = descriptor->d_getset->closure;
  }

  PyTypeObject* type_ = nullptr;
  getter get_ = nullptr;
  void* closure_ = nullptr;
};

// A list or tuple as an array of objects.
class Items {
 public:
  Items(py::handle sequence, const char* what) {
    PyObject* fast = PySequence_Fast(sequence.ptr(), "");
    if (fast == nullptr) {
      PyErr_Clear();
      throw InvalidArgument(std::string(what) + ": expected a list, got " + type_name(sequence));
    }
    owner_ = py::reinterpret_steal<py::object>(fast);
  }
  size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(owner_.ptr())); }
  PyObject* operator[](size_t i) const { return PySequence_Fast_GET_ITEM(owner_.ptr(), static_cast<Py_ssize_t>(i)); }

 private:
  py::object owner_;
};

std::vector<Elements> read_list(py::handle list, const char* what) {
  const Items items(list, what);
  Reader reader(what);
  std::vector<Elements> all;
  all.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) all.push_back(reader.read(items[i], i));
  return all;
}

struct List {
  std::vector<View> views;
  int device = -1;
};

// All on one device: the first one's, or `device` where that is not kAnyDevice.
constexpr int kAnyDevice = -2;

std::string place(int device) { return device < 0 ? "CPU memory" : format("CUDA device %d", device); }

List on_one_device(py::handle tensors, const char* what, int device = kAnyDevice) {
  List list;
  for (const Elements& elements : read_list(tensors, what)) {
    if (device == kAnyDevice) device = elements.device;
    if (elements.device != device)
      refuse(what, list.views.size(), "a tensor in " + place(device), "one in " + place(elements.device));
    list.views.push_back(elements.view);
  }
  list.device = device == kAnyDevice ? -1 : device;
  return list;
}

// A number, or one float32 in memory: of the CPU, or of the device of a plan on a GPU, which then looks at it itself.
struct Number {
  double value;
  const float* at = nullptr;
};

Number number(py::handle object, const char* what, double absent, int device = -1) {
  if (object.is_none()) return {absent};
  if (PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr())) return {object.cast<double>()};
  const Elements one = Reader(what).read(object.ptr(), 0);
  if (one.view.count != 1 || one.view.dtype != DType::Float32 || (one.device >= 0 && one.device != device))
    throw InvalidArgument(format("%s: expected a number or one float32 in %s, got %zu %s in %s", what, place(device).c_str(),
                                 one.view.count, name_of(one.view.dtype), place(one.device).c_str()));
  const auto* at = static_cast<const float*>(one.view.data);
  return one.device >= 0 ? Number{absent, at} : Number{static_cast<double>(*at)};
}

RuleOptions options_of(RuleId rule, const py::dict& given) {
  RuleOptions options;
  struct Switch {
    const char* name;
    bool RuleOptions::* place;
    std::vector<RuleId> rules;  // empty: all
  };
  static const std::vector<Switch> switches = {
      {"momentum", &RuleOptions::momentum, {RuleId::Sgd, RuleId::RmsProp, RuleId::Lars}},
      {"nesterov", &RuleOptions::nesterov, {RuleId::Sgd, RuleId::Lars}},
      {"amsgrad", &RuleOptions::amsgrad, {RuleId::Adam}},
      {"decoupled", &RuleOptions::decoupled, {RuleId::Adam}},
      {"centered", &RuleOptions::centered, {RuleId::RmsProp}},
      {"maximize", &RuleOptions::maximize, {}},
      {"average", &RuleOptions::average, {}}};
  const auto choice = [](const std::string& name, py::handle value, const char* no, const char* yes) {
    const std::string text = py::str(value);
    if (text != no && text != yes)
      throw InvalidArgument(format("option %s: expected %s or %s, got '%s'", name.c_str(), no, yes, text.c_str()));
    return text == yes;
  };
  for (const auto& [key, value] : given) {
    const std::string name = py::str(key);
    if (name == "semantics") {
      options.keras = choice(name, value, "torch", "keras");
    } else if (name == "rounding") {
      options.stochastic = choice(name, value, "nearest", "stochastic");
    } else {
      std::string known = "semantics, rounding";
      bool found = false;
      for (const Switch& one : switches) {
        if (!one.rules.empty() && std::find(one.rules.begin(), one.rules.end(), rule) == one.rules.end()) continue;
        known += std::string(", ") + one.name;
        if (name != one.name) continue;
        options.*one.place = value.cast<bool>();
        found = true;
      }
      if (!found)
        throw InvalidArgument(
            format("option of %s: expected one of %s, got '%s'", kernels::name_of(rule), known.c_str(), name.c_str()));
    }
  }
  if (options.nesterov && !options.momentum) throw InvalidArgument("option nesterov: expected momentum with it, got none");
  return options;
}

class Plan {
 public:
  Plan(const std::string& rule_name, const py::dict& options, const py::object& params, const py::list& states,
       const py::object& masters, const py::object& copies, const py::object& averages, const py::object& steps)
      : keep_(py::make_tuple(py::tuple(params), deep(states), masters, copies, averages, steps)) {
    const RuleId rule = kernels::rule_named(rule_name);
    const RuleOptions chosen = options_of(rule, options);
    kernels::OptimizerTensors tensors;
    tensors.params = add("params", params);
    for (const View& view : tensors.params) places_.push_back(view.data);
    const auto names = kernels::state_names(rule, chosen);
    for (size_t k = 0; k < states.size(); ++k)
      tensors.states.push_back(add(k < names.size() ? names[k].name : "states", states[k]));
    if (!masters.is_none()) tensors.masters = add("masters", masters);
    if (!copies.is_none()) tensors.copies = add("copies", copies);
    if (!averages.is_none()) tensors.averages = add("averages", averages);
    if (!steps.is_none()) tensors.steps = on_one_device(steps, "steps", device_).views;
    plan_ = std::make_unique<OptimizerPlan>(rule, chosen, tensors, device_);
  }

  py::tuple step(const py::object& grads, const py::object& hyper, const py::object& grad_scale, const py::object& found_inf,
                 const py::object& clip, const py::object& max_norm, bool check_finite, uint64_t seed, int threads,
                 uintptr_t stream) {
    if (busy_.test_and_set()) throw Error("this OptimizerPlan is in the middle of a step on another thread");
    const struct Release {
      std::atomic_flag& flag;
      ~Release() { flag.clear(); }
    } release{busy_};
    set_gradients(grads);
    kernels::OptimizerCall call;
    const Items numbers(hyper, "hyper");
    hyper_.resize(numbers.size());
    for (size_t i = 0; i < hyper_.size(); ++i) {
      hyper_[i] = PyFloat_AsDouble(numbers[i]);
      if (hyper_[i] == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    call.hyper = hyper_;
    const Number scale = number(grad_scale, "grad_scale", 1, device_), factor = number(clip, "clip", 1, device_);
    const Number inf = number(found_inf, "found_inf", 0, device_);
    call.grad_scale = scale.value;
    call.grad_scale_at = scale.at;
    call.clip = factor.value;
    call.clip_at = factor.at;
    call.found_inf = inf.value != 0;
    call.found_inf_at = inf.at;
    call.stream = reinterpret_cast<void*>(stream);
    call.max_norm = number(max_norm, "max_norm", 0).value;
    call.check_finite = check_finite || !max_norm.is_none();
    call.seed = seed;
    call.threads = threads;
    kernels::OptimizerResult result;
    {
      const py::gil_scoped_release without_gil;
      result = plan_->step(call);
    }
    if (device_ >= 0) return py::make_tuple(py::none(), py::none());
    return as_tuple(result, call.check_finite);
  }

  py::tuple result() const {
    kernels::OptimizerResult last;
    {
      const py::gil_scoped_release without_gil;
      last = plan_->result();
    }
    return as_tuple(last, true);
  }

  // A list of the gradients, if these are the plan's parameters, in the memory that it writes to (they may be given other), and
  // all have one; else None. One look at everything that a tensor is, while it is in the cache.
  py::object gradients(const py::object& params) const {
    const Items kept(keep_[0], "params"), now(params, "params");
    if (now.size() != kept.size()) return py::none();
    py::list grads(kept.size());
    Reader reader("params");
    GradOf grad_of;
    for (size_t i = 0; i < kept.size(); ++i) {
      if (i >= now.size() || now[i] != kept[i] || reader.read(kept[i], i).view.data != places_[i]) return py::none();
      PyObject* grad = grad_of(kept[i]);
      PyList_SET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i), grad);
      if (grad == Py_None) return py::none();
    }
    return grads;
  }

  int device() const { return device_; }

  size_t tensors() const { return plan_->tensors(); }
  size_t count() const { return plan_->count(); }

 private:
  static py::tuple as_tuple(const kernels::OptimizerResult& result, bool with_norm) {
    return py::make_tuple(with_norm ? py::object(py::float_(result.norm)) : py::none(), result.skipped);
  }

  static py::tuple deep(const py::list& lists) {
    py::tuple copy(lists.size());
    for (size_t k = 0; k < lists.size(); ++k) copy[k] = py::tuple(lists[k]);
    return copy;
  }

  // A list of the plan's; all lists lie as params do, which come first.
  std::vector<View> add(const char* what, py::handle list) {
    const std::vector<Elements> all = read_list(list, what);
    std::vector<View> views;
    const bool first = layouts_.empty();
    for (size_t i = 0; i < all.size(); ++i) {
      if (first && i == 0) device_ = all[i].device;
      if (all[i].device != device_) refuse(what, i, "a tensor in " + place(device_), "one in " + place(all[i].device));
      if (first)
        layouts_.push_back(all[i].layout);
      else if (i < layouts_.size())
        refuse_other_layout(what, i, all[i]);
      views.push_back(all[i].view);
    }
    return views;
  }

  void refuse_other_layout(const char* what, size_t i, const Elements& elements) const {
    if (elements.layout != layouts_[i]) refuse(what, i, format("the strides of params[%zu]", i), "others");
  }

  void set_gradients(const py::object& grads) {
    const Items items(grads, "grads");
    if (items.size() != plan_->tensors())
      throw InvalidArgument(format("grads: expected %zu tensors, as params, got %zu", plan_->tensors(), items.size()));
    Reader reader("grads");
    for (size_t i = 0; i < items.size(); ++i) {
      const Elements found = reader.read(items[i], i);
      refuse_other_layout("grads", i, found);
      if (found.device != device_) refuse("grads", i, "a tensor in " + place(device_), "one in " + place(found.device));
      plan_->set_gradient(i, found.view);
    }
  }

  py::tuple keep_;
  std::vector<uint64_t> layouts_;
  std::vector<const void*> places_;  // of the params
  std::vector<double> hyper_;
  int device_ = -1;
  std::unique_ptr<OptimizerPlan> plan_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace

void bind_optim(py::module_& m) {
  m.def(
      "optimizer_states",
      [](const std::string& name, const py::dict& options) {
        const RuleId rule = kernels::rule_named(name);
        std::vector<std::string> names;
        for (const auto& state : kernels::state_names(rule, options_of(rule, options))) names.emplace_back(state.name);
        return names;
      },
      py::arg("rule"), py::arg("options"), "Names and order of a rule's moments.");
  m.def(
      "optimizer_hyper",
      [](const std::string& name, const py::dict& options) {
        const RuleId rule = kernels::rule_named(name);
        return kernels::hyper_names(rule, options_of(rule, options));
      },
      py::arg("rule"), py::arg("options"), "Names and order of a rule's hyper-parameters.");
  m.def(
      "optimizer_needs_steps",
      [](const std::string& name, const py::dict& options) {
        const RuleId rule = kernels::rule_named(name);
        return kernels::needs_steps(rule, options_of(rule, options));
      },
      py::arg("rule"), py::arg("options"), "Whether a plan of this rule must have steps.");
  py::class_<Plan>(
      m, "OptimizerPlan",
      "Steps many tensors of one rule, one set of dtypes and one device at once. It looks at params, states and the "
      "other lists when it is made, at gradients in every step.")
      .def(py::init<const std::string&, const py::dict&, const py::object&, const py::list&, const py::object&,
                    const py::object&, const py::object&, const py::object&>(),
           py::arg("rule"), py::arg("options"), py::arg("params"), py::arg("states"), py::kw_only(),
           py::arg("masters") = py::none(), py::arg("copies") = py::none(), py::arg("averages") = py::none(),
           py::arg("steps") = py::none())
      .def(
          "step", &Plan::step, py::arg("grads"), py::arg("hyper"), py::kw_only(), py::arg("grad_scale") = py::none(),
          py::arg("found_inf") = py::none(), py::arg("clip") = py::none(), py::arg("max_norm") = py::none(),
          py::arg("check_finite") = false, py::arg("seed") = 0, py::arg("threads") = 0, py::arg("stream") = 0,
          "One step. Returns (norm of the unscaled gradients or None, whether the step was skipped); on a GPU (None, None), as "
          "soon as it is queued.")
      .def("result", &Plan::result, "(norm, skipped) of the last step; on a GPU this waits for it.")
      .def_property_readonly("device", &Plan::device, "The GPU, -1 for the CPU.")
      .def("gradients", &Plan::gradients, py::arg("params"),
           "The gradients of these parameters, if they are the plan's, still in the memory that it was made for, and each has "
           "one; else None.")
      .def_property_readonly("tensors", &Plan::tensors)
      .def_property_readonly("count", &Plan::count);
  m.def(
      "grad_norm",
      [](const py::object& tensors, const py::object& grad_scale, int threads, uintptr_t stream) {
        const List list = on_one_device(tensors, "tensors");
        const double scale = number(grad_scale, "grad_scale", 1).value;
        const py::gil_scoped_release without_gil;
        return std::sqrt(kernels::sum_of_squares(list.views, threads, list.device, reinterpret_cast<void*>(stream))) / scale;
      },
      py::arg("tensors"), py::arg("grad_scale") = py::none(), py::arg("threads") = 0, py::arg("stream") = 0,
      "2-norm of all elements together, in float64; inf or nan when one is not finite.");
  m.def(
      "scale_tensors",
      [](const py::object& tensors, const py::object& factor, int threads, uintptr_t stream) {
        const List list = on_one_device(tensors, "tensors");
        const double by = number(factor, "factor", 1).value;
        const py::gil_scoped_release without_gil;
        kernels::scale_all(list.views, by, threads, list.device, reinterpret_cast<void*>(stream));
      },
      py::arg("tensors"), py::arg("factor"), py::arg("threads") = 0, py::arg("stream") = 0,
      "Multiply all elements in place, in one pass.");
}

}  // namespace roundel::bind
