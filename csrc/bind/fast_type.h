// A Python type for objects that come and go by the thousand: the C++ object lies in the Python object itself.
//
// pybind11 keeps a table of all its objects, whose upkeep costs about 150 ns for each, twice what the object itself does.
// Objects of such a type are made by C++ only, are not weakly referenced, and their methods take no arguments.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <string>
#include <utility>
#include <vector>

namespace roundel::bind {

template <class T>
class FastType {
 public:
  // method<&T::wait>("wait", "..."): a member function that returns a Python object.
  template <auto function>
  static PyMethodDef method(const char* name, const char* doc) {
    return {name, &call<function>, METH_NOARGS, doc};
  }

  // Once. Names and docs are literals.
  static void define(pybind11::module_& m, const char* name, const char* doc, std::vector<PyMethodDef> methods) {
    methods.push_back({});
    static auto& kept = *new std::vector<PyMethodDef>(std::move(methods));
    static auto& full_name = *new std::string(m.attr("__name__").cast<std::string>() + "." + name);
    PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                           {Py_tp_methods, kept.data()},
                           {Py_tp_doc, const_cast<char*>(doc)},
                           {0, nullptr}};
    PyType_Spec spec{full_name.c_str(), sizeof(Object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    type_ = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (type_ == nullptr) throw pybind11::error_already_set();
    m.attr(name) = pybind11::handle(reinterpret_cast<PyObject*>(type_));
  }

  static pybind11::object make(T value) {
    auto* object = PyObject_New(Object, type_);
    if (object == nullptr) throw pybind11::error_already_set();
    new (&object->value) T(std::move(value));
    return pybind11::reinterpret_steal<pybind11::object>(reinterpret_cast<PyObject*>(object));
  }

 private:
  struct Object {
    PyObject_HEAD T value;
  };

  template <auto function>
  static PyObject* call(PyObject* self, PyObject*) {
    try {
      return pybind11::object((reinterpret_cast<Object*>(self)->value.*function)()).release().ptr();
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (...) {
      pybind11::detail::try_translate_exceptions();
    }
    return nullptr;
  }

  static void destroy(PyObject* self) {
    const pybind11::error_scope kept;  // an exception on its way may be what lets go of the object
    PyTypeObject* type = Py_TYPE(self);
    reinterpret_cast<Object*>(self)->value.~T();
    PyObject_Free(self);
    Py_DECREF(type);
  }

  static inline PyTypeObject* type_ = nullptr;
};

}  // namespace roundel::bind
