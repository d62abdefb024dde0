// Sweeps of the conv chain 1 -> 16 -> 16 -> 1, head red, in one launch each (docs/kernels.md; docs/math.md, M10): the
// Hessian-vector product and the gradient. A block takes a strip and a band of rows of an image through the stages A, B, C, D, ROWS rows a step.
#include "conv_chain_gradient.cuh"
#include "conv_chain_hvp.cuh"

#if !defined(__CUDACC__)
// NaN in what an item must write before it reads it.
inline void poison(Shared& shared, int columns) {
    const auto spoil = [&](int at, int bytes) {
        for (int i = at / 4; i < (at + bytes) / 4; ++i) shared.words[i] = 0x7fc07fc0u;
    };
    for (int row = 0; row < 2 * RING; ++row) spoil(AT_FORWARD + row * RING_ROW + 64, 64 * columns);
    for (int row = 0; row < 9 * TAPS; ++row) spoil(AT_TAPS + row * TAPS_PITCH + 4, 4 * columns);
    spoil(AT_U, AT_PACKED - AT_U);
}
#endif
// Zeros where the columns outside the image lie, which are never written, and the parameters.
DR_DEVICE void prepare(const Call& call, Shared& shared, int warp) {
    for (int i = 32 * warp; i < AT_U / 4; i += 32 * BLOCKS) {
        const Index n = lanes() + i;
        shared.put(n * 4, 0u, n < AT_U / 4);
    }
    for (int i = 32 * warp; i < PACKED / 4; i += 32 * BLOCKS) {
        const Index n = lanes() + i;
        shared.put(n * 4 + AT_PACKED, load_word(call.packed, n, n < PACKED / 4), n < PACKED / 4);
    }
}

template <class Sweep>
DR_DEVICE void chain(const Call& call, const Block& block, Shared& shared, int first, int step) {
    block.each([&](int warp) { prepare(call, shared, warp); });
    const int items = call.images * call.bands * call.strips();
    for (int item = first; item < items; item += step) {
        Piece piece;
        if (!find(call, item, piece)) continue;
        // A pixel of the product depends on REACH + 1 rows of images, REACH of a1' and so on.
        const int start = piece.row0 - REACH - 1, rows = piece.row1 - start + 2;
        const Sweep sweep = {{call, piece, shared, start}};
#if !defined(__CUDACC__)
        poison(shared, piece.columns);
#endif
        block.each([&](int warp) {
            sweep.choose_scales(warp, Sweep::FIRST_GUESS, sweep.cotangents());
            read_images<ROWS + 2, Sweep::PICTURES>(call, piece, shared, warp, start, 0);
        });
        DR_ROLLED for (int row = 0; row < rows; row += ROWS) {
            block.each([&](int warp) { sweep.stage_a(row + 1, lane_of(warp, piece.columns)); });
            block.each([&](int warp) { sweep.stage_b(row, lane_of(warp, piece.columns)); });
            block.each([&](int warp) { sweep.stage_c(row - 1, lane_of(warp, piece.columns)); });
            block.each([&](int warp) {
                sweep.stage_d(row - 2, warp);
                read_images<ROWS, Sweep::PICTURES>(call, piece, shared, warp, start, row + ROWS + 2);
            });
        }
    }
}

#define HVP_PARAMETERS                                                                                             \
    const float *u, const float *v, const float *z, const float *g, float *out, const float *u_max,                \
        const float *v_max, const unsigned char *active, unsigned *failed, unsigned *most, const unsigned *packed, \
        float alpha, float eps, float part, int height, int width, int images, int bands, int attempt
#define HVP_CALL                                                                                                        \
    {                                                                                                                   \
        u, v, z, g, out, u_max, v_max, active, failed, most, packed, alpha, eps, part, height, width, images, bands,    \
            attempt, nullptr, nullptr, nullptr                                                                          \
    }
#define GRADIENT_PARAMETERS                                                                                      \
    const float *u, float *z, float *g, float *out, double *energies, const float *u_max,                        \
        const unsigned char *active, unsigned *failed, unsigned *most, const unsigned *packed, float alpha,      \
        float eps, float part, int height, int width, int images, int bands, int attempt
#define GRADIENT_CALL                                                                                                   \
    {                                                                                                                   \
        u, nullptr, nullptr, nullptr, out, u_max, nullptr, active, failed, most, packed, alpha, eps, part, height,      \
            width, images, bands, attempt, z, g, energies                                                               \
    }
#if defined(__CUDACC__)
#define CHAIN_KERNEL(name, Sweep, PARAMETERS, CALL)                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * BLOCKS, 1) name(PARAMETERS) {                                  \
        extern __shared__ __align__(16) unsigned words[];                                                            \
        const Call call = CALL;                                                                                      \
        Shared shared{words};                                                                                        \
        chain<Sweep>(call, Block{BLOCKS}, shared, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));        \
    }
#else
#define CHAIN_KERNEL(name, Sweep, PARAMETERS, CALL)                                          \
    extern "C" int name(int blocks, int threads, int bytes, int order, PARAMETERS) {         \
        if (threads != 32 * BLOCKS || bytes != SHARED) return 1;                             \
        const Call call = CALL;                                                              \
        unsigned state = 1;                                                                  \
        for (int n = 0; n < blocks; ++n) {                                                   \
            Shared shared(SHARED);                                                           \
            chain<Sweep>(call, Block{BLOCKS, order, &state, &shared}, shared, n, blocks);    \
            if (shared.raced) return 2;                                                      \
        }                                                                                    \
        return 0;                                                                            \
    }
#endif
// The kernels of one sweep (CHAIN_SWEEP), with or without a LayerNorm (CHAIN_NORM), or all.
#define CHAIN_KERNELS(name, Sweep, norm, KIND)                             \
    using name##_sweep = Sweep<norm, false>;                               \
    using name##_measuring = Sweep<norm, true>;                            \
    CHAIN_KERNEL(name, name##_sweep, KIND##_PARAMETERS, KIND##_CALL)       \
    CHAIN_KERNEL(name##_measure, name##_measuring, KIND##_PARAMETERS, KIND##_CALL)
#if !defined(CHAIN_SWEEP) || CHAIN_SWEEP == 0
#if !defined(CHAIN_NORM) || CHAIN_NORM == 0
CHAIN_KERNELS(chain_hvp, Product, false, HVP)
#endif
#if !defined(CHAIN_NORM) || CHAIN_NORM == 1
CHAIN_KERNELS(chain_hvp_norm, Product, true, HVP)
#endif
#endif
#if !defined(CHAIN_SWEEP) || CHAIN_SWEEP == 1
#if !defined(CHAIN_NORM) || CHAIN_NORM == 0
CHAIN_KERNELS(chain_gradient, Gradient, false, GRADIENT)
#endif
#if !defined(CHAIN_NORM) || CHAIN_NORM == 1
CHAIN_KERNELS(chain_gradient_norm, Gradient, true, GRADIENT)
#endif
#endif
