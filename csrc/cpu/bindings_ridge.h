// The Python class Ridge.
#pragma once

#include "bindings.h"
#include "ridge.h"

namespace dr::bindings {

// A ridge energy with copies of its parameters.
class Ridge {
  public:
    // Floats: filters [filters, channels, side, side], coefficients [filters, steps], scales [steps].
    Ridge(int filters, int channels, int side, int steps, float center, py::handle w, py::handle c, py::handle s,
          const std::string& isa)
        : kernels_(&dr::dispatch(isa, DR_TABLES(ridge))) {
        if (filters < 1 || channels < 1 || steps < 1 || side < 3 || side > dr::MAX_SIDE || side % 2 == 0)
            throw std::invalid_argument("an odd side from 3 to 15, and at least one filter, one channel and one step");
        const std::size_t n = filters;
        copy(w_, w, n * channels * side * side);
        copy(c_, c, n * steps);
        copy(s_, s, steps);
        ridge_ = {filters, channels, side, steps, center, w_.data(), c_.data(), s_.data()};
    }
    Ridge(const Ridge&) = delete;
    Ridge& operator=(const Ridge&) = delete;

    // Floats per image that `gradient` saves for `hvp` if `saved` is passed.
    std::size_t saved_floats(int height, int width) const { return kernels_->saved_floats(ridge_, height, width); }

    void gradient(py::handle x, py::handle value, py::handle grad, py::handle saved, int b, int height, int width,
                  int threads) const {
        const Batch size = batch(b, height, width, threads, ridge_.channels);
        run_gradient(*kernels_, ridge_, size, b * saved_floats(height, width), x, value, grad, saved);
    }
    void hvp(py::handle v, py::handle saved, py::handle out, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads, ridge_.channels);
        run_hvp(*kernels_, ridge_, size, b * saved_floats(height, width), v, saved, out);
    }
    void param_vjp(py::handle x, py::handle v, py::handle dw, py::handle dc, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads, ridge_.channels);
        const float *in = dr::memory<float>(x, size.numbers(), "x"), *along = dr::memory<float>(v, size.numbers(), "v");
        double *by_w = dr::memory<double>(dw, w_.size(), "dw"), *by_c = dr::memory<double>(dc, c_.size(), "dc");
        run([&] { kernels_->param_vjp(ridge_, size, in, along, by_w, by_c); });
    }

  private:
    static void copy(std::vector<float>& to, py::handle tensor, std::size_t n) {
        const float* p = dr::memory<float>(tensor, n, "a parameter");
        to.assign(p, p + n);
    }

    const dr::RidgeKernels* kernels_;
    std::vector<float> w_, c_, s_;
    dr::Ridge ridge_;
};

inline void bind_ridge(py::module_& m) {
    py::class_<Ridge>(m, "Ridge")
        .def(py::init<int, int, int, int, float, py::handle, py::handle, py::handle, const std::string&>())
        .def("saved_floats", &Ridge::saved_floats)
        .def("gradient", &Ridge::gradient)
        .def("hvp", &Ridge::hvp)
        .def("param_vjp", &Ridge::param_vjp);
}

}  // namespace dr::bindings
