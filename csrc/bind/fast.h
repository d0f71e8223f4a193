// A short way into methods that are called millions of times: arguments by position, of the expected types.
//
// pybind11 looks at eight arguments for about 150 ns, of a call that takes 500. Whatever this way does not know (keywords,
// subclasses, conversions, mistakes) goes on to pybind11's own method, which also has the documentation.
#pragma once

#include <pybind11/pybind11.h>

#include <climits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

namespace roundel::bind {

// A class `Self` that pybind11 has bound, and a function of it and of Args that returns a py::object.
template <class Self, class Function, class... Args>
class FastMethod {
 public:
  // Goes before the method `name` of `cls`, which pybind11 has defined with the same `extra`.
  template <class... Extra>
  static void put_before(pybind11::handle cls, const char* name, Function function, const Extra&... extra) {
    auto* made = new FastMethod(cls, name, std::move(function));  // as methods do, it stays
    (made->parameter(extra), ...);
    const auto capsule = pybind11::capsule(made);
    const auto callable = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&made->definition_, capsule.ptr()));
    cls.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyInstanceMethod_New(callable.ptr()));
  }

 private:
  FastMethod(pybind11::handle cls, const char* name, Function function)
      : cls_(cls.ptr()),
        function_(std::move(function)),
        slow_(cls.attr(name)),
        name_(name),
        doc_(pybind11::str(slow_.attr("__doc__"))) {
    definition_.ml_name = name_.c_str();
    definition_.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    definition_.ml_flags = METH_FASTCALL | METH_KEYWORDS;
    definition_.ml_doc = doc_.c_str();
  }

  void parameter(const pybind11::arg&) {
    ++defined_;
    ++required_;
    ++positional_;
  }
  void parameter(const pybind11::arg_v& with_default) {
    set_default(with_default.value, std::index_sequence_for<Args...>());
    ++defined_;
    if (!keyword_only_) ++positional_;
  }
  void parameter(const pybind11::kw_only&) { keyword_only_ = true; }

  template <size_t... I>
  void set_default(const pybind11::object& value, std::index_sequence<I...>) {
    ((I == defined_ ? void(std::get<I>(defaults_) = value.cast<std::decay_t<Args>>()) : void()), ...);
  }

  static bool read(PyObject* from, pybind11::object& to) {
    to = pybind11::reinterpret_borrow<pybind11::object>(from);
    return true;
  }
  static bool read(PyObject* from, int& to) {
    int overflow = 0;
    const long value = PyLong_Check(from) ? PyLong_AsLongAndOverflow(from, &overflow) : LONG_MAX;
    to = static_cast<int>(value);
    return overflow == 0 && to == value;
  }
  static bool read(PyObject* from, double& to) {
    to = PyFloat_CheckExact(from) ? PyFloat_AS_DOUBLE(from) : 0;
    return PyFloat_CheckExact(from);
  }
  // Looks into the object, as pybind11 does; a default's lives as long as the method.
  static bool read(PyObject* from, std::string_view& to) {
    Py_ssize_t bytes = 0;
    const char* text = PyUnicode_CheckExact(from) ? PyUnicode_AsUTF8AndSize(from, &bytes) : nullptr;
    if (text == nullptr) return PyErr_Clear(), false;
    to = {text, static_cast<size_t>(bytes)};
    return true;
  }
  static bool read(PyObject* from, std::string& to) {
    std::string_view text;
    const bool is_text = read(from, text);
    to = text;
    return is_text;
  }
  template <class T>
  static bool read(PyObject* from, std::optional<T>& to) {
    to.reset();
    return from == Py_None;
  }
  template <class T>
  static bool read(PyObject*, T&) {
    return false;
  }

  static PyObject* call(PyObject* capsule, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    const auto& self = *static_cast<const FastMethod*>(PyCapsule_GetPointer(capsule, nullptr));
    return self.call_with(args, count, keywords, std::index_sequence_for<Args...>());
  }

  template <size_t... I>
  PyObject* call_with(PyObject* const* args, Py_ssize_t count, PyObject* keywords, std::index_sequence<I...>) const {
    const auto given = static_cast<size_t>(count) - 1;  // args[0] is the object
    const bool plain = keywords == nullptr && count >= 1 && given >= required_ && given <= positional_ &&
                       reinterpret_cast<PyObject*>(Py_TYPE(args[0])) == cls_;
    std::tuple<std::decay_t<Args>...> values = defaults_;
    if (!plain || !((I >= given || read(args[I + 1], std::get<I>(values))) && ...))
      return PyObject_Vectorcall(slow_.ptr(), args, static_cast<size_t>(count), keywords);
    try {
      auto* object = reinterpret_cast<pybind11::detail::instance*>(args[0]);
      const Self& bound = *object->get_value_and_holder().template value_ptr<Self>();
      return pybind11::object(function_(bound, std::get<I>(values)...)).release().ptr();
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (...) {
      pybind11::detail::try_translate_exceptions();
    }
    return nullptr;
  }

  PyObject* cls_;
  Function function_;
  pybind11::object slow_;
  std::string name_, doc_;
  PyMethodDef definition_{};
  std::tuple<std::decay_t<Args>...> defaults_;
  size_t defined_ = 0, required_ = 0, positional_ = 0;
  bool keyword_only_ = false;
};

}  // namespace roundel::bind
