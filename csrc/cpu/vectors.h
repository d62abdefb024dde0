// The solvers' vector operations on float32 batches: few passes, sums in doubles, images never mixed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dr {

// Layout of a call's images: `state` arrays hold all images, the others only the active ones, at the indices `idx`.
struct ActiveImages {
    int count, threads;
    std::size_t n;  // entries of an image
    const std::int64_t* idx;
};

// Anderson's memory of all images: [B, memory, n] twice, [B, n] twice.
struct AndersonHistory {
    int memory;
    float *dx, *df, *x, *f;
};

struct VectorKernels {
    // out[i] = <a_i, b_i>.
    void (*dot)(int count, std::size_t n, int threads, const float* a, const float* b, double* out);
    // out_i = x_i + s_i p_i if rows[i], otherwise x_i; size[i] = <out_i, out_i>.
    void (*add)(int count, std::size_t n, int threads, const float* x, const float* s, const float* p,
                const std::uint8_t* rows, float* out, double* size);
    // <dx, dx>, <dg, dg>, <dx, dg>, <g, g> with dx = candidate - x and dg = candidate's g - g; x and g are state. [count, 4]
    void (*secant)(const ActiveImages&, const float* candidate, const float* candidate_g, const float* x, const float* g,
                   double* out);
    // Write x - d.x and f - d.f (zeros unless `fresh`) into the slot of each image, save x and f, and return
    // <df_k, newest df> in gram [count, memory] and <df_k, f> in rhs [count, memory].
    void (*remember)(const ActiveImages&, const AndersonHistory& d, const std::int64_t* slot, const std::uint8_t* fresh,
                     const float* x, const float* f, double* gram, double* rhs);
    // out_i = x_i + f_i - shift_i, shift_i = sum_k c_ik (dx_k + df_k), shortened to limit_i.
    void (*combine)(const ActiveImages&, const AndersonHistory& d, const float* c, const double* limit, const float* x,
                    const float* f, float* out);
};

extern const VectorKernels vectors_avx512, vectors_avx2, vectors_portable;

}  // namespace dr
