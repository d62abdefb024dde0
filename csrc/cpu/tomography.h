// Parallel-beam projections and their adjoint, one set of functions per instruction set.
#pragma once
#include <cstdint>
#include <vector>

namespace dr {

// The rays of one angle. Detector d meets line i of the image at `slope (d - (detectors-1)/2) + tilt (i - (lines-1)/2) +
// (pixels-1)/2`, 1 <= slope <= sqrt(2). `transposed`: the lines are columns. `reversed`: the detectors count backwards.
struct Rays {
    bool transposed, reversed;
    double slope, tilt;
    // Places in pixels: those of the detectors on a line without offset, as a whole number and a fraction; those of the
    // pixels, as a multiple of the slope and the rest.
    std::vector<std::int32_t> detector_whole, pixel_whole;
    std::vector<float> detector_part, pixel_part;
};

struct Tomography {
    int height, width, detectors;
    std::vector<Rays> rays;
    int lines(const Rays& r) const { return r.transposed ? width : height; }
    int pixels(const Rays& r) const { return r.transposed ? height : width; }
};

struct TomographyKernels {
    // planes [count, H, W] to sinograms [count, angles, detectors], and back.
    void (*forward)(const Tomography&, int count, int threads, const float* x, float* y);
    void (*adjoint)(const Tomography&, int count, int threads, const float* y, float* x);
};

extern const TomographyKernels tomography_avx512, tomography_avx2, tomography_portable;

}  // namespace dr
