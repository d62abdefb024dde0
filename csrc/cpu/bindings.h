// What the bindings of all kernels share: batches, threads, and calls without Python's lock.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "subnormals.h"
#include "tensor.h"

namespace dr::bindings {

namespace py = pybind11;

// A forked child has none of its parent's OpenMP threads and would wait for them forever, so it uses one thread.
inline bool forked = false;

// Number of threads to use: at most the processors available to this process, because waiting threads spin.
inline int team(int requested) {
#ifdef _OPENMP
    return forked ? 1 : std::max(1, std::min(requested, omp_get_num_procs()));
#else
    return 1;
#endif
}

using Tensors = std::vector<py::object>;

struct Batch : dr::Batch {
    int channels;
    std::size_t numbers() const { return static_cast<std::size_t>(count) * channels * height * width; }
};
inline Batch batch(int b, int height, int width, int threads, int channels = 1) {
    if (b < 0 || height < 1 || width < 1) throw std::invalid_argument("a batch of images with pixels");
    return {{b, height, width, team(threads)}, channels};
}

// Run a kernel without Python's lock and with subnormals.
template <class F>
void run(F work) {
    py::gil_scoped_release free;
    const dr::Subnormals all;
    work();
}

// Value and gradient of an energy, which saves `floats` floats for the products if `saved` is not None.
template <class Kernels, class Energy>
void run_gradient(const Kernels& kernels, const Energy& energy, const Batch& batch, std::size_t floats, py::handle x,
                  py::handle value, py::handle grad, py::handle saved) {
    const float* in = dr::memory<float>(x, batch.numbers(), "x");
    double* values = dr::memory<double>(value, batch.count, "value");
    float* out = dr::memory<float>(grad, batch.numbers(), "grad");
    float* memory = dr::memory_or_null<float>(saved, floats, "the memory", dr::Extent::at_least);
    run([&] { kernels.gradient(energy, batch, in, values, out, memory); });
}
// Hessian-vector product of an energy, from what the gradient saved.
template <class Kernels, class Energy>
void run_hvp(const Kernels& kernels, const Energy& energy, const Batch& batch, std::size_t floats, py::handle v,
             py::handle saved, py::handle out) {
    const float* along = dr::memory<float>(v, batch.numbers(), "v");
    const float* memory = dr::memory<float>(saved, floats, "the memory", dr::Extent::at_least);
    float* product = dr::memory<float>(out, batch.numbers(), "out");
    run([&] { kernels.hvp(energy, batch, along, memory, product); });
}

}  // namespace dr::bindings
