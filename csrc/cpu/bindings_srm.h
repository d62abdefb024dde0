// The Python class Srm.
#pragma once

#include <cstring>

#include "bindings.h"
#include "srm.h"
#include "srm_tables.h"

namespace dr::bindings {

// A structurally random matrix with copies of its buffers.
class Srm {
  public:
    // `rows` and `perm` are int64, `signs` and the Hadamard matrices of the two sizes int8; None if absent.
    Srm(int transform, int channels, int height, int width, int block, int measurements, py::handle rows, py::handle signs,
        py::handle perm, py::handle column_matrix, py::handle row_matrix, const std::string& isa)
        : kernels_(&dr::dispatch(isa, DR_TABLES(srm))) {
        if (transform < 0 || transform > 2 || channels < 1 || height < 1 || width < 1 || measurements < 1)
            throw std::invalid_argument("one of three transforms, of images with pixels");
        s_.transform = static_cast<dr::Transform>(transform);
        s_.channels = channels, s_.height = height, s_.width = width, s_.block = block, s_.measurements = measurements;
        const std::size_t d = numbers();
        if (s_.transform == dr::Transform::walsh && (block < 1 || block & (block - 1) || d % block))
            throw std::invalid_argument("a block of a power of two that divides the number of pixels");
        const auto* r = dr::indices(rows, measurements, d, "rows");
        rows_.assign(r, r + measurements);
        s_.kept = dr::pack_selection(r, measurements, d);
        if (const auto* p = dr::memory_or_null<std::int8_t>(signs, d, "signs")) {
            signs_.assign(p, p + d);
            for (std::size_t i = 0; i < d; ++i)
                if (p[i] != 1 && p[i] != -1) throw std::invalid_argument("signs must be 1 or -1");
            s_.signs.assign(p, p + d);
            if (s_.transform == dr::Transform::walsh) s_.sign_bits = dr::pack_signs(p, d);
        }
        if (!perm.is_none()) {
            const auto* p = dr::indices(perm, d, d, "perm");
            perm_.assign(p, p + d);
            std::vector<bool> seen(d, false);
            for (std::size_t i = 0; i < d; ++i) {
                if (seen[p[i]]) throw std::invalid_argument("perm must hold each place once");
                seen[p[i]] = true;
            }
            s_.perm.assign(p, p + d);
        }
        if (s_.transform == dr::Transform::dct) {
            s_.along_columns = dr::dct_lines(height);
            s_.along_rows = dr::dct_lines(width);
        } else if (s_.transform == dr::Transform::hadamard) {
            const auto square = [](int n) { return static_cast<std::size_t>(n) * n; };
            s_.along_columns = dr::hadamard_lines(height, dr::memory<std::int8_t>(column_matrix, square(height), "a matrix"));
            s_.along_rows = dr::hadamard_lines(width, dr::memory<std::int8_t>(row_matrix, square(width), "a matrix"));
        }
    }

    // Whether these buffers equal those of the constructor.
    bool current(py::handle rows, py::handle signs, py::handle perm) const {
        return same(rows, rows_) && same(signs, signs_) && same(perm, perm_);
    }

    // `x`, `y` and `weight` are None if the product does not use them; without `weight`, `one` applies to every image.
    void apply(int product, int count, int threads, py::handle x, py::handle y, py::handle weight, float one,
               py::handle out) const {
        const bool by_x = product != 1, by_y = product == 1 || product == 3;
        if (product < 0 || product > 3 || count < 0 || x.is_none() == by_x || y.is_none() == by_y)
            throw std::invalid_argument("one of four products, with its vectors");
        const std::size_t pixels = count * numbers(), measured = static_cast<std::size_t>(count) * s_.measurements;
        const auto* image = dr::memory_or_null<float>(x, pixels, "x");
        const auto* data = dr::memory_or_null<float>(y, measured, "y");
        auto* result = dr::memory<float>(out, product == 0 ? measured : pixels, "out");
        const float* weights = dr::memory_or_null<float>(weight, count, "weight");
        std::vector<float> all;
        if (!weights) {
            all.assign(count, one);
            weights = all.data();
        }
        run([&] { kernels_->apply(s_, static_cast<dr::Product>(product), count, team(threads), image, data, weights, result); });
    }

  private:
    std::size_t numbers() const { return static_cast<std::size_t>(s_.channels) * s_.height * s_.width; }
    template <class T>
    static bool same(py::handle tensor, const std::vector<T>& values) {
        if (tensor.is_none() || values.empty()) return tensor.is_none() && values.empty();
        return std::memcmp(dr::memory<T>(tensor, values.size(), "a buffer"), values.data(), values.size() * sizeof(T)) == 0;
    }

    const dr::SrmKernels* kernels_;
    dr::Srm s_;
    std::vector<std::int64_t> rows_, perm_;
    std::vector<std::int8_t> signs_;
};

inline void bind_srm(py::module_& m) {
    py::class_<Srm>(m, "Srm")
        .def(py::init<int, int, int, int, int, int, py::handle, py::handle, py::handle, py::handle, py::handle,
                      const std::string&>())
        .def("current", &Srm::current)
        .def("apply", &Srm::apply);
}

}  // namespace dr::bindings
