// The conv chain's sweeps, one set of functions per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dr {

constexpr int MAX_DEPTH = 16;

// Layout of a convolution's filters: [out][in][9] for the direct loop, or Winograd's.
enum class FilterLayout { direct, winograd };

// Description of one convolution for `pack`.
struct Layer {
    int out, in;
    double scale;   // of the filters: the input gain or its inverse
    bool centered;  // over the outputs: a LayerNorm over channels follows
};

// phi(u, h) is 1/2 <u, u - h>, 1/2 ||u - h||^2 or 1/2 ||h||^2; in the order of Python's HEADS.
enum class HeadKind { red, residual, norm };

// h: conv 1 -> C, [LayerNorm], SiLU, (conv C -> C, ...) x (depth - 2), conv C -> 1; 3 x 3 filters,
// zero padding.
struct Chain {
    int depth;
    int channels;
    HeadKind head;
    bool pixel_norm;  // LayerNorm over the channels of each pixel
    bool image_norm;  // LayerNorm over channels and pixels of a whole image
    bool winograd;    // for the inner convolutions
    float alpha, center, eps;
    const float* forward[MAX_DEPTH];   // packed filters of each convolution
    const float* backward[MAX_DEPTH];  // the same for its transpose
    const float* bias[MAX_DEPTH];
    const float* gamma[MAX_DEPTH];     // of each LayerNorm
    const float* beta[MAX_DEPTH];
};

struct Batch {
    int count, height, width, threads;
};

struct Kernels {
    const char* name;
    void (*pack)(const float* w, const Layer&, bool transpose, FilterLayout, float* packed);
    // Floats that the gradient's sweep saves for the products (sweep.h).
    std::size_t (*saved_floats)(const Chain&, const Batch&);
    // value [B], grad [B, H, W]; `saved` may be null.
    void (*gradient)(const Chain&, const Batch&, const float* x, double* value, float* grad, float* saved);
    void (*hvp)(const Chain&, const Batch&, const float* x, const float* v, const float* saved, float* out);
    // d/dtheta sum_b <grad r(x_b), v_b>: for each convolution [C_out, C_in, 9], then its bias [C_out]; with LayerNorms,
    // then gamma [C] and beta [C] of each.
    void (*param_vjp)(const Chain&, const Batch&, const float* x, const float* v, const float* saved, double* out);
    // Peak of the multiply-add units: `count` rounds of independent multiply-adds on each thread; returns the flops.
    double (*multiply_adds)(int threads, long count, float* sink);
};

extern const Kernels avx512, avx2, portable;

}  // namespace dr
