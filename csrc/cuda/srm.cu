// The structurally random matrix A = D F R: A x, A^T y, A^T A x and x + w A^T (y - A x) (docs/kernels.md).
#include "lines.cuh"

// The data of a block of threads: `rows` x `columns` of one channel of one image, starting at (row0, column0).
struct Piece {
    Team team;
    float* plane;
    int rows, columns, pitch, row0, column0, channel;

    DR_DEVICE Way along_rows() const { return {plane, 1, pitch, (rows + 1) / 2, even(rows) - 1}; }
    DR_DEVICE Way along_columns() const { return {plane, pitch, 1, (columns + 1) / 2, even(columns) - 1}; }
    DR_DEVICE static int even(int n) { return n + n % 2; }
    // Visit every (row, column), including the padding of odd sides, by warps along rows; a warp has 32 columns of a row or,
    // with TWOS, every other one of 64. `use` receives the values of `read`: a thread reads AHEAD values before it uses any,
    // so it waits for memory once.
    template <bool TWOS, class Value, class Read, class Use>
    DR_DEVICE void sweep(Read read, Use use) const {
        constexpr int AHEAD = 8;
        const int high = even(rows), wide = even(columns);
        team.each([&](int thread) {
            for (int r = thread / 32; r < high; r += team.size / 32)
                for (int start = TWOS ? thread % 32 * 2 : thread % 32; start < wide; start += 32 * AHEAD) {
                    Value value[AHEAD];
                    DR_UNROLL for (int n = 0; n < AHEAD; ++n) {
                        const int c = start + (TWOS ? n / 2 * 64 + n % 2 : 32 * n);
                        value[n] = c < wide ? read(r, c, r < rows && c < columns) : Value{};
                    }
                    DR_UNROLL for (int n = 0; n < AHEAD; ++n) {
                        const int c = start + (TWOS ? n / 2 * 64 + n % 2 : 32 * n);
                        if (c < wide) use(r, c, r < rows && c < columns, value[n]);
                    }
                }
        });
    }
    DR_DEVICE float& at(int r, int c) const { return plane[r * pitch + c]; }
};

DR_DEVICE bool find_piece(Call& call, const Team& team, float* plane, int block, Piece& piece) {
    const Plan& plan = call.plan();
    const bool by_rows = call.part == ROWS_IN || call.part == ROWS_OUT;
    const int high = by_rows ? plan.row_tile : plan.height, wide = call.part == COLUMNS ? plan.column_tile : plan.width;
    const int down = (plan.height + high - 1) / high, right = (plan.width + wide - 1) / wide;
    const int tile = block % (down * right);
    const int row0 = tile / right * high, column0 = tile % right * wide;
    const int channel = block / (down * right);
    piece.team = team, piece.plane = plane, piece.row0 = row0, piece.column0 = column0;
    piece.rows = plan.height - row0 < high ? plan.height - row0 : high;
    piece.columns = plan.width - column0 < wide ? plan.width - column0 : wide;
    piece.pitch = Piece::even(piece.columns) + 1;
    piece.channel = channel % plan.channels;
    return call.take(channel / plan.channels);
}

// Position of value j in Makhoul's order (even values first, then the odd ones reversed), and the value at position p.
DR_DEVICE int makhoul(int j, int n) { return j % 2 ? n - 1 - j / 2 : j / 2; }
DR_DEVICE int makhoul_inverse(int p, int n) { return 2 * p < n ? 2 * p : 2 * (n - 1 - p) + 1; }

// The pixel of R x for row r of the plane and column c of the image, and the plane's column for it. An image is swept by
// twos, because Makhoul's order puts neighboring columns at opposite ends.
template <bool DCT>
DR_DEVICE int pixel(const Call& call, const Piece& piece, int r, int c) {
    const Plan& plan = call.plan();
    const int row = DCT ? makhoul_inverse(piece.row0 + r, plan.height) : piece.row0 + r;
    return (piece.channel * plan.height + row) * plan.width + c;
}
template <bool DCT>
DR_DEVICE float& place_of(const Call& call, const Piece& piece, int r, int c, bool real) {
    return piece.at(r, DCT && real ? makhoul(c, call.plan().width) : c);
}
template <bool DCT>
DR_DEVICE void read_image(const Call& call, const Piece& piece) {
    piece.sweep<DCT, float>(
        [&](int r, int c, bool real) { return real ? randomized(call, pixel<DCT>(call, piece, r, c)) : 0.0f; },
        [&](int r, int c, bool real, float v) { place_of<DCT>(call, piece, r, c, real) = v; });
}
template <bool DCT>
DR_DEVICE void write_image(const Call& call, const Piece& piece) {
    piece.sweep<DCT, Origin>(
        [&](int r, int c, bool real) { return real ? origin(call, pixel<DCT>(call, piece, r, c)) : Origin{0, 0.0f}; },
        [&](int r, int c, bool real, Origin to) {
            if (real) restore(call, pixel<DCT>(call, piece, r, c), to, place_of<DCT>(call, piece, r, c, real));
        });
}
// `scratch` holds planes in the layout of shared memory.
DR_DEVICE float* scratch_at(const Call& call, const Piece& piece, int r, int c) {
    const Plan& plan = call.plan();
    return call.scratch + (piece.channel * plan.height + piece.row0 + r) * plan.width + piece.column0 + c;
}
DR_DEVICE void read_scratch(const Call& call, const Piece& piece) {
    piece.sweep<false, float>(
        [&](int r, int c, bool real) { return real ? *scratch_at(call, piece, r, c) : 0.0f; },
        [&](int r, int c, bool, float v) { piece.at(r, c) = v; });
}
DR_DEVICE void write_scratch(const Call& call, const Piece& piece) {
    piece.sweep<false, float>(
        [&](int r, int c, bool) { return piece.at(r, c); },
        [&](int r, int c, bool real, float v) {
            if (real) *scratch_at(call, piece, r, c) = v;
        });
}

// The step between the forward and backward passes over the rows, the columns, and the rows again, numbered by `turning`.
// The middle one includes D.
enum Turning { IN_ROWS, IN_COLUMNS, OF_ROWS };

struct DctSides {
    static constexpr bool DCT = true;
    static DR_DEVICE void between(
        const Call& call, const Piece& piece, const Way& way, const Lines& lines, int turning, bool forward,
        bool backward) {
        const Plan& plan = call.plan();
        const int* coefficient = call.ints + plan.along_rows.coefficient;
        const bool middle = turning == IN_COLUMNS;
        const Steps steps = {!middle || forward, forward, backward, !middle || backward};
        turn(piece.team, way, lines, call, steps, [&](int q, int k, Complex v) {
            if (!middle) return v;
            const int row = (piece.channel * plan.height + k) * plan.width, other = way.last - q;
            v.re = selected(call, row + coefficient[piece.column0 + q], v.re);
            v.im = other < piece.columns ? selected(call, row + coefficient[piece.column0 + other], v.im) : 0.0f;
            return v;
        });
    }
};

struct HadamardSides {
    static constexpr bool DCT = false;
    static DR_DEVICE void between(
        const Call& call, const Piece& piece, const Way&, const Lines&, int turning, bool forward, bool) {
        if (turning != IN_COLUMNS) return;
        const Plan& plan = call.plan();
        const float scale = call.floats[0];
        piece.sweep<false, float>(
            [&](int r, int c, bool real) {
                const int i = (piece.channel * plan.height + r) * plan.width + piece.column0 + c;
                return real ? scale * selected(call, i, forward ? scale * piece.at(r, c) : 0.0f) : 0.0f;
            },
            [&](int r, int c, bool, float v) { piece.at(r, c) = v; });
    }
};

template <class Sides>
DR_DEVICE void srm(Call call, const Team& team, float* plane, int block) {
    Piece piece;
    if (!find_piece(call, team, plane, block, piece)) return;
    const bool whole = call.part == ALL, forth = call.product != ADJOINT, back = call.product != FORWARD;
    const int first = whole ? (forth ? IN_ROWS : IN_COLUMNS) : call.part - ROWS_IN;
    const int last = whole ? (back ? OF_ROWS : IN_COLUMNS) : call.part - ROWS_IN;
    if (first == IN_ROWS)
        read_image<Sides::DCT>(call, piece);
    else if (first == OF_ROWS || (forth && !whole))
        read_scratch(call, piece);
    else  // nothing is read, but the line that pads an odd number of lines must hold finite values
        piece.sweep<false, float>(
            [](int, int, bool) { return 0.0f; }, [&](int r, int c, bool, float v) { piece.at(r, c) = v; });
    DR_ROLLED for (int turning = first; turning <= last; ++turning) {
        const bool columns = turning == IN_COLUMNS;
        const Way way = columns ? piece.along_columns() : piece.along_rows();
        const Lines& lines = columns ? call.plan().along_columns : call.plan().along_rows;
        const bool forward = turning == IN_ROWS || (columns && forth), backward = turning == OF_ROWS || (columns && back);
        DR_ROLLED for (int half = 0; half < 2; ++half) {
            if (half) Sides::between(call, piece, way, lines, turning, forward, backward);
            if (half ? backward : forward) passes<Sides::DCT>(team, way, lines, call.floats, half);
        }
    }
    if (last == OF_ROWS)
        write_image<Sides::DCT>(call, piece);
    else if (back || last == IN_ROWS)
        write_scratch(call, piece);
}

// The Walsh-Hadamard transform in blocks of 2^levels <= 4096, by WALSH_THREADS threads: each has 16 values in each of up to
// three passes, the last of which selects. Larger blocks are Hadamard planes.
constexpr int WALSH_THREADS = 256, WALSH_TILE = 16 * WALSH_THREADS;
// Position of value i of the tile: for a warp's threads, 16 values in a row, or 16 or 256 apart, are in different banks.
DR_DEVICE int walsh_place(int i) { return i ^ (i >> 5 & 15) ^ (i >> 4 & 16); }

// A pass over 16 values 16^n apart: butterflies of `levels` levels, then f(values, index of the first, distance).
template <class F>
DR_DEVICE void walsh_pass(const Team& team, float* tile, int n, int levels, F f) {
    team.each([&](int thread) {
        const int apart = 1 << 4 * n, first = thread / apart * 16 * apart + thread % apart;
        float t[16];
        DR_UNROLL for (int j = 0; j < 16; ++j) t[j] = tile[walsh_place(first + j * apart)];
        walsh<16>(t, levels - 4 * n);
        f(t, first, apart);
        DR_UNROLL for (int j = 0; j < 16; ++j) tile[walsh_place(first + j * apart)] = t[j];
    });
}
DR_DEVICE void srm_walsh_blocks(Call call, const Team& team, float* tile, int block) {
    const int levels = call.plan().levels, last = levels > 4 ? (levels - 1) / 4 : 0;
    const int d = call.pixels(), tiles = d / WALSH_TILE + (d % WALSH_TILE != 0);
    if (!call.take(block / tiles)) return;
    const int start = block % tiles * WALSH_TILE;
    const int count = d - start < WALSH_TILE ? d - start : WALSH_TILE;
    const float scale = call.floats[0];
    const auto nothing = [](float(&)[16], int, int) {};
    const bool forward = call.product != ADJOINT;
    team.each([&](int thread) {
        float v[16];
        DR_UNROLL for (int n = 0; n < 16; ++n) {
            const int i = thread + n * WALSH_THREADS;
            v[n] = i < count && forward ? randomized(call, start + i) : 0.0f;
        }
        DR_UNROLL for (int n = 0; n < 16; ++n) tile[walsh_place(thread + n * WALSH_THREADS)] = v[n];
    });
    for (int n = 0; n < last; ++n) walsh_pass(team, tile, n, levels, nothing);
    walsh_pass(team, tile, last, levels, [&](float(&t)[16], int first, int apart) {
        DR_UNROLL for (int j = 0; j < 16; ++j) {
            const int i = first + j * apart;
            t[j] = i < count ? scale * selected(call, start + i, scale * t[j]) : 0.0f;
        }
        walsh<16>(t, levels - 4 * last);
    });
    if (call.product == FORWARD) return;
    for (int n = last - 1; n >= 0; --n) walsh_pass(team, tile, n, levels, nothing);
    team.each([&](int thread) {
        Origin to[16];
        DR_UNROLL for (int n = 0; n < 16; ++n) {
            const int i = thread + n * WALSH_THREADS;
            to[n] = i < count ? origin(call, start + i) : Origin{};
        }
        DR_UNROLL for (int n = 0; n < 16; ++n) {
            const int i = thread + n * WALSH_THREADS;
            if (i < count) restore(call, start + i, to[n], tile[walsh_place(i)]);
        }
    });
}

// The kernel that SRM_KERNEL names, or all; of at most SRM_THREADS threads, with registers for SRM_BLOCKS blocks together on
// a multiprocessor.
#if !defined(SRM_THREADS)
#define SRM_THREADS 512
#endif
#if !defined(SRM_BLOCKS)
#define SRM_BLOCKS 1
#endif

#if defined(__CUDACC__)
#define DR_KERNEL(name, threads, together, body)                                            \
    extern "C" __global__ void __launch_bounds__(threads, together) name(SRM_PARAMETERS) {  \
        extern __shared__ float shared[];                                                   \
        const Call call = SRM_CALL;                                                         \
        body(call, Team{static_cast<int>(blockDim.x)}, shared, static_cast<int>(blockIdx.x)); \
    }
#else
#include <limits>
#define DR_KERNEL(name, most, together, body)                                                           \
    extern "C" int name(int blocks, int threads, int bytes, int order, SRM_PARAMETERS) {                \
        if (threads > most || threads % 32) return 1;                                                   \
        const Call call = SRM_CALL;                                                                     \
        unsigned state = 1;                                                                             \
        for (int block = 0; block < blocks; ++block) {                                                  \
            std::vector<float> shared(bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());  \
            body(call, Team{threads, order, &state}, shared.data(), block);                             \
        }                                                                                               \
        return 0;                                                                                       \
    }
#endif
#if !defined(SRM_KERNEL) || SRM_KERNEL == 0
DR_KERNEL(srm_dct, SRM_THREADS, SRM_BLOCKS, srm<DctSides>)
#endif
#if !defined(SRM_KERNEL) || SRM_KERNEL == 1
DR_KERNEL(srm_hadamard, SRM_THREADS, SRM_BLOCKS, srm<HadamardSides>)
#endif
#if !defined(SRM_KERNEL) || SRM_KERNEL == 2
DR_KERNEL(srm_walsh, WALSH_THREADS, 2, srm_walsh_blocks)
#endif
