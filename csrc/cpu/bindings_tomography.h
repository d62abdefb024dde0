// The Python class Tomography.
#pragma once

#include <cmath>

#include "bindings.h"
#include "tomography.h"

namespace dr::bindings {

// Parallel-beam projections.
class Tomography {
  public:
    // For each angle whether its lines are columns, whether the detectors count backwards, slope and tilt (tomography.h).
    Tomography(int height, int width, int detectors, const std::vector<std::tuple<bool, bool, double, double>>& rays,
               const std::string& isa)
        : kernels_(&dr::dispatch(isa, DR_TABLES(tomography))), t_{height, width, detectors, {}} {
        if (height < 1 || width < 1 || detectors < 1 || rays.empty())
            throw std::invalid_argument("images with pixels, angles and detectors");
        for (const auto& [transposed, reversed, slope, tilt] : rays) {
            if (!(slope >= 0.999 && slope <= 1.42 && std::abs(tilt) <= 1.001))
                throw std::invalid_argument("1 <= slope <= sqrt(2), and |tilt| <= 1");
            dr::Rays r{transposed, reversed, slope, tilt, {}, {}, {}, {}};
            const int pixels = t_.pixels(r);
            const auto detector = [&](int d) { return slope * (d - 0.5 * (detectors - 1)) + 0.5 * (pixels - 1); };
            fill(detectors, 1.0, detector, r.detector_whole, r.detector_part);
            fill(pixels, slope, [](int j) { return static_cast<double>(j); }, r.pixel_whole, r.pixel_part);
            t_.rays.push_back(std::move(r));
        }
    }

    void forward(py::handle x, py::handle y, int count, int threads) const {
        const float* in = dr::memory<float>(x, image(count), "x");
        float* out = dr::memory<float>(y, sinogram(count), "y");
        run([&] { kernels_->forward(t_, count, team(threads), in, out); });
    }
    void adjoint(py::handle y, py::handle x, int count, int threads) const {
        const float* in = dr::memory<float>(y, sinogram(count), "y");
        float* out = dr::memory<float>(x, image(count), "x");
        run([&] { kernels_->adjoint(t_, count, team(threads), in, out); });
    }

  private:
    // A table with a register more than its numbers, which complete registers read.
    template <class Place>
    static void fill(int n, double unit, Place place, std::vector<std::int32_t>& whole, std::vector<float>& part) {
        for (int i = 0; i < n + 16; ++i) {
            const double p = place(i), below = std::floor(p / unit);
            whole.push_back(static_cast<std::int32_t>(below)), part.push_back(static_cast<float>(p - below * unit));
        }
    }
    std::size_t image(int count) const {
        if (count < 0) throw std::invalid_argument("a number of planes");
        return static_cast<std::size_t>(count) * t_.height * t_.width;
    }
    std::size_t sinogram(int count) const { return static_cast<std::size_t>(count) * t_.rays.size() * t_.detectors; }

    const dr::TomographyKernels* kernels_;
    dr::Tomography t_;
};

inline void bind_tomography(py::module_& m) {
    py::class_<Tomography>(m, "Tomography")
        .def(py::init<int, int, int, const std::vector<std::tuple<bool, bool, double, double>>&, const std::string&>())
        .def("forward", &Tomography::forward)
        .def("adjoint", &Tomography::adjoint);
}

}  // namespace dr::bindings
