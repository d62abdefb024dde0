// Access to PyTorch tensors: each tensor's memory is checked before a kernel touches it.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dr {

namespace py = pybind11;

// Attribute names of tensors and PyTorch's dtypes; created when the module is imported, and never freed.
struct Torch {
    py::object dtype{py::str("dtype")}, is_cpu{py::str("is_cpu")}, is_contiguous{py::str("is_contiguous")};
    py::object numel{py::str("numel")}, data_ptr{py::str("data_ptr")};
    py::object float32, float64, int64, int8, boolean;

    static const Torch& get() {
        static const Torch* one = new Torch();
        return *one;
    }

  private:
    Torch() {
        const py::module_ torch = py::module_::import("torch");
        float32 = torch.attr("float32"), float64 = torch.attr("float64"), int64 = torch.attr("int64");
        int8 = torch.attr("int8"), boolean = torch.attr("bool");
    }
};

template <class T>
const py::object& dtype_of();
template <>
inline const py::object& dtype_of<float>() { return Torch::get().float32; }
template <>
inline const py::object& dtype_of<double>() { return Torch::get().float64; }
template <>
inline const py::object& dtype_of<std::int64_t>() { return Torch::get().int64; }
template <>
inline const py::object& dtype_of<std::int8_t>() { return Torch::get().int8; }
template <>
inline const py::object& dtype_of<bool>() { return Torch::get().boolean; }

// Required size of a buffer: exactly this many numbers, or at least.
enum class Extent { exactly, at_least };

// The memory of a contiguous tensor of T on the CPU with `count` numbers; throws std::invalid_argument otherwise.
template <class T>
T* memory(py::handle tensor, std::size_t count, const char* name, Extent extent = Extent::exactly) {
    const Torch& t = Torch::get();
    const auto call = [&](const py::object& method) {
        PyObject* found = PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr());
        if (!found) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
    };
    const auto attribute_of = [&](const py::object& attribute) {
        PyObject* found = PyObject_GetAttr(tensor.ptr(), attribute.ptr());
        if (!found) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
    };
    const bool kind = attribute_of(t.dtype).is(dtype_of<T>()) && attribute_of(t.is_cpu).is(py::handle(Py_True)) &&
                      call(t.is_contiguous).is(py::handle(Py_True));
    const std::size_t size = kind ? call(t.numel).template cast<std::size_t>() : 0;
    const auto address = kind ? call(t.data_ptr).template cast<std::uintptr_t>() : 0;
    const bool enough = extent == Extent::exactly ? size == count : size >= count;
    if (!kind || !enough || (!address && count))
        throw std::invalid_argument(std::string(name) + " must be a contiguous " +
                                    std::string(py::str(dtype_of<T>())) + " tensor of " + std::to_string(count) +
                                    " numbers on the CPU, but is " + std::string(py::str(attribute_of(t.dtype))) + " with " +
                                    std::to_string(call(t.numel).template cast<std::size_t>()) + " numbers" +
                                    (kind ? "" : " of another kind, place or layout"));
    return reinterpret_cast<T*>(address);
}

// The same; null for None.
template <class T>
T* memory_or_null(py::handle tensor, std::size_t count, const char* name, Extent extent = Extent::exactly) {
    return tensor.is_none() ? nullptr : memory<T>(tensor, count, name, extent);
}

// Indices: each in [0, end).
inline const std::int64_t* indices(py::handle tensor, std::size_t count, std::int64_t end, const char* name) {
    const std::int64_t* p = memory<std::int64_t>(tensor, count, name);
    for (std::size_t i = 0; i < count; ++i)
        if (p[i] < 0 || p[i] >= end) throw std::out_of_range(std::string(name) + " must lie in [0, " + std::to_string(end) + ")");
    return p;
}

}  // namespace dr
