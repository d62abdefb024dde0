// The ridge energy's sweeps, one set of functions per instruction set.
#pragma once
#include <cstddef>

#include "conv_chain.h"

namespace dr {

constexpr int MAX_SIDE = 15;

// r(x) = sum_i sum_p psi_i((w_i * u)_p), u = x - center, zero padding, summed over the channels of w_i and u; psi_i'(t) = sum_k c_ik t / sqrt(1 + (s_k t)^2).
struct Ridge {
    int filters, channels, side, steps;  // side: odd, 3 to MAX_SIDE
    float center;
    const float* w;  // [filters][channels][side][side]
    const float* c;  // [filters][steps]
    const float* s;  // [steps]
};

struct RidgeKernels {
    // Floats per image that the gradient's sweep saves for `hvp`.
    std::size_t (*saved_floats)(const Ridge&, int height, int width);
    // value [B], grad [B, C, H, W]; `saved` may be null.
    void (*gradient)(const Ridge&, const Batch&, const float* x, double* value, float* grad, float* saved);
    void (*hvp)(const Ridge&, const Batch&, const float* v, const float* saved, float* out);
    // Derivatives of sum_b <grad r(x_b), v_b> in w [filters, channels, side, side] and in c [filters, steps].
    void (*param_vjp)(const Ridge&, const Batch&, const float* x, const float* v, double* dw, double* dc);
};

extern const RidgeKernels ridge_avx512, ridge_avx2, ridge_portable;

}  // namespace dr
