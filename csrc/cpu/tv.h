// Smoothed total variation's sweeps, one set of functions per instruction set.
#pragma once
#include <cstddef>

#include "conv_chain.h"

namespace dr {

// r(x) = sum_p sqrt(|D x|_p^2 + eps^2) - eps over the pixels, |D x|_p the norm over all channels, D the forward differences,
// zero across the border.
struct Tv {
    static constexpr int max_channels = 4;
    int channels;
    double eps;
};

struct TvKernels {
    // Floats per image that the gradient's sweep saves for `hvp`.
    std::size_t (*saved_floats)(const Tv&, int height, int width);
    // value [B], grad [B, C, H, W]; `saved` may be null.
    void (*gradient)(const Tv&, const Batch&, const float* x, double* value, float* grad, float* saved);
    void (*hvp)(const Tv&, const Batch&, const float* v, const float* saved, float* out);
};

extern const TvKernels tv_avx512, tv_avx2, tv_portable;

}  // namespace dr
