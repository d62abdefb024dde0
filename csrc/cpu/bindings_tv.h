// The Python class Tv.
#pragma once

#include "bindings.h"
#include "tv.h"

namespace dr::bindings {

// Smoothed total variation.
class Tv {
  public:
    Tv(int channels, double eps, const std::string& isa) : kernels_(&dr::dispatch(isa, DR_TABLES(tv))), tv_{channels, eps} {
        if (channels < 1 || channels > dr::Tv::max_channels || !(eps > 0))
            throw std::invalid_argument("one to four channels, and eps > 0");
    }

    // Floats per image that `gradient` saves for `hvp` if `saved` is passed.
    std::size_t saved_floats(int height, int width) const { return kernels_->saved_floats(tv_, height, width); }

    void gradient(py::handle x, py::handle value, py::handle grad, py::handle saved, int b, int height, int width,
                  int threads) const {
        const Batch size = batch(b, height, width, threads, tv_.channels);
        run_gradient(*kernels_, tv_, size, b * saved_floats(height, width), x, value, grad, saved);
    }
    void hvp(py::handle v, py::handle saved, py::handle out, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads, tv_.channels);
        run_hvp(*kernels_, tv_, size, b * saved_floats(height, width), v, saved, out);
    }

  private:
    const dr::TvKernels* kernels_;
    dr::Tv tv_;
};

inline void bind_tv(py::module_& m) {
    py::class_<Tv>(m, "Tv")
        .def(py::init<int, double, const std::string&>())
        .def("saved_floats", &Tv::saved_floats)
        .def("gradient", &Tv::gradient)
        .def("hvp", &Tv::hvp);
}

}  // namespace dr::bindings
