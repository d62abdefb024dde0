// Transforms of all rows or all columns of a plane in shared memory, in place.
//
// Lines are processed in pairs, one the real and one the imaginary part. Neighboring threads have neighboring pairs: with an
// odd pitch their accesses hit different banks along rows and along columns. A pass reads and writes the same places, so it
// has one barrier; the resulting order of the digits is resolved by tables, never by moving data.
#pragma once
#include "srm.cuh"

// Compiled variants of passes by a matrix, of other passes and of the DCT's last pass: those of the given operator, or all.
#if !defined(SRM_DENSE)
#define SRM_DENSE DR_DENSE(8) DR_DENSE(16)
#endif
#if !defined(SRM_PASSES)
#define SRM_PASSES                                                                                                  \
    DR_PASS(2) DR_PASS(3) DR_PASS(4) DR_PASS(5) DR_PASS(6) DR_PASS(7) DR_PASS(8) DR_PASS(9) DR_PASS(10) DR_PASS(11) \
    DR_PASS(12) DR_PASS(13) DR_PASS(15) DR_PASS(16)
#endif
#if !defined(SRM_TURNS)
#define SRM_TURNS                                                                                                       \
    DR_TURN(1) DR_TURN(2) DR_TURN(3) DR_TURN(4) DR_TURN(5) DR_TURN(6) DR_TURN(8) DR_TURN(9) DR_TURN(10) DR_TURN(12)     \
    DR_TURN(16)
#endif

// Two lines as one complex line; offsets are indices of values times `along`.
struct Pair {
    float *re, *im;
    DR_DEVICE Complex get(int offset) const { return {re[offset], im[offset]}; }
    DR_DEVICE void put(int offset, Complex v) const { re[offset] = v.re, im[offset] = v.im; }
};

// The lines of one direction: values are `along` apart, lines `across`; pair q is the lines q and last - q.
struct Way {
    float* plane;
    int along, across, pairs, last;
    // Pad the pairs to whole warps if this leaves few threads idle: then no warp accesses two places of the lines.
    DR_DEVICE int lanes() const {
        const int warps = (pairs + 31) / 32 * 32;
        return warps * 4 <= pairs * 5 ? warps : pairs;
    }
    // `exchanged` swaps real and imaginary parts, which makes a Fourier transform its own inverse.
    DR_DEVICE Pair pair(int q, bool exchanged) const {
        float *a = plane + q * across, *b = plane + (last - q) * across;
        return exchanged ? Pair{b, a} : Pair{a, b};
    }
};

DR_DEVICE Complex complex_at(const float* table, int i) { return {table[2 * i], table[2 * i + 1]}; }

// A pass of radix R: butterflies of R values `inner` apart, and the twiddles, after it or, in the inverse, before it.
template <int R, bool DCT>
DR_DEVICE void pass(const Team& team, const Way& way, const Pass& p, int length, const float* floats, bool inverse) {
    const int inner = p.inner, lanes = way.lanes(), units = lanes * (length / R), step = inner * way.along;
    const float* w = floats + p.twiddles;
    team.each([&](int thread) {
        for (int unit = thread; unit < units; unit += team.size) {
            const int butterfly = unit / lanes, q = unit - butterfly * lanes;
            if (q >= way.pairs) continue;
            const int group = butterfly / inner, i = butterfly - group * inner;
            const int start = (group * inner * R + i) * way.along;
            const Pair line = way.pair(q, DCT && inverse);
            Complex t[R];
            DR_UNROLL for (int j = 0; j < R; ++j) t[j] = line.get(start + j * step);
            if constexpr (DCT) {
                if (inverse && i) {
                    DR_UNROLL for (int j = 1; j < R; ++j) t[j] = t[j] * complex_at(w, i * (R - 1) + j - 1);
                }
                dft<R>(t);
                if (!inverse && i) {
                    DR_UNROLL for (int j = 1; j < R; ++j) t[j] = t[j] * complex_at(w, i * (R - 1) + j - 1);
                }
            } else if constexpr (R == 2 || R == 4 || R == 8 || R == 16) {
                walsh<R>(t);
            }
            DR_UNROLL for (int j = 0; j < R; ++j) line.put(start + j * step, t[j]);
        }
    });
}

struct alignas(16) Four {
    float at[4];
};
template <int TILE>
struct Tile {
    Complex at[TILE];
};

// A pass of any radix by its matrix, complex for the DCT, otherwise +-1, with the layout [input][output]. A thread holds TILE
// outputs of one pair of lines in registers until all have read: a chunk has as many pairs as the team has threads for.
template <bool DCT, int TILE>
DR_DEVICE void dense(const Team& team, const Way& way, const Pass& p, int length, const float* floats, bool inverse) {
    const int radix = p.radix, inner = p.inner, step = inner * way.along, groups = (radix + TILE - 1) / TILE, padded = TILE * groups;
    const int of_pair = length / radix * groups, most = team.size / of_pair;
    const int chunks = (way.pairs + most - 1) / most, some = (way.pairs + chunks - 1) / chunks;
    const float *w = floats + p.twiddles, *matrix = floats + (inverse ? p.transposed : p.matrix);
    for (int first = 0; first < way.pairs; first += some) {
        const int here = way.pairs - first < some ? way.pairs - first : some, units = here * of_pair;
        const auto place = [&](int unit, int& output, int& start, int& i) {
            const int rest = unit / here, butterfly = rest / groups;
            output = TILE * (rest - butterfly * groups), i = butterfly % inner;
            start = (butterfly / inner * inner * radix + i) * way.along;
            return way.pair(first + unit - rest * here, DCT && inverse);
        };
        team.twice<Tile<TILE>>(
            [&](int unit, Tile<TILE>& sum) {
                if (unit >= units) return;
                int output, start, i;
                const Pair line = place(unit, output, start, i);
                Tile<TILE> part;  // sums of PART terms, which reduces the roundings of the total by this factor
                constexpr int PART = 16;
                DR_UNROLL for (int k = 0; k < TILE; ++k) sum.at[k] = part.at[k] = {0.0f, 0.0f};
                for (int j = 0; j < radix; ++j) {
                    Complex v = line.get(start + j * step);
                    if constexpr (DCT) {
                        if (inverse && i && j) v = v * complex_at(w, i * (radix - 1) + j - 1);
                        const Four* row = reinterpret_cast<const Four*>(matrix + 2 * (j * padded + output));
                        DR_UNROLL for (int k = 0; k < TILE / 2; ++k) {
                            const Four m = row[k];
                            part.at[2 * k] = part.at[2 * k] + v * Complex{m.at[0], m.at[1]};
                            part.at[2 * k + 1] = part.at[2 * k + 1] + v * Complex{m.at[2], m.at[3]};
                        }
                    } else {
                        const Four* row = reinterpret_cast<const Four*>(matrix + j * padded + output);
                        DR_UNROLL for (int k = 0; k < TILE; ++k) {
                            const float m = row[k / 4].at[k % 4];
                            part.at[k] = {part.at[k].re + m * v.re, part.at[k].im + m * v.im};
                        }
                    }
                    if (j % PART == PART - 1) {
                        DR_UNROLL for (int k = 0; k < TILE; ++k)
                            sum.at[k] = sum.at[k] + part.at[k], part.at[k] = {0.0f, 0.0f};
                    }
                }
                DR_UNROLL for (int k = 0; k < TILE; ++k) sum.at[k] = sum.at[k] + part.at[k];
                if (DCT && !inverse && i) {
                    DR_UNROLL for (int k = 0; k < TILE; ++k) {
                        if (output + k > 0 && output + k < radix)
                            sum.at[k] = sum.at[k] * complex_at(w, i * (radix - 1) + output + k - 1);
                    }
                }
            },
            [&](int unit, const Tile<TILE>& sum) {
                if (unit >= units) return;
                int output, start, i;
                const Pair line = place(unit, output, start, i);
                DR_UNROLL for (int k = 0; k < TILE; ++k) {
                    if (output + k < radix) line.put(start + (output + k) * step, sum.at[k]);
                }
            });
    }
}

// All passes of one direction except the DCT's last.
template <bool DCT>
DR_DEVICE void passes(const Team& team, const Way& way, const Lines& lines, const float* floats, bool inverse) {
    DR_ROLLED for (int n = 0; n < lines.passes; ++n) {
        const Pass& p = lines.pass[inverse ? lines.passes - 1 - n : n];
        const int length = lines.length;
#define DR_DENSE(TILE) \
    case TILE: dense<DCT, TILE>(team, way, p, length, floats, inverse); continue;
        switch (p.dense) {
            SRM_DENSE
        }
#undef DR_DENSE
#define DR_PASS(R) \
    case R: pass<R, DCT>(team, way, p, length, floats, inverse); break;
        switch (p.radix) {
            SRM_PASSES
        }
#undef DR_PASS
    }
}

// Makhoul's step from the Fourier coefficients k = m + M j (a[j]) and length - k (b[R - 1 - j]) of two lines, packed as one
// complex line, to the cosine transforms of both.
template <int R>
DR_DEVICE void to_cosines(Complex (&a)[R], Complex (&b)[R], const float* angles, int m, int M) {
    DR_UNROLL for (int j = 0; j < R; ++j) {
        const Complex w = complex_at(angles, m + M * j), p = a[j], r = b[R - 1 - j];
        const float ua = p.re + r.re, va = p.im - r.im, ub = p.im + r.im, vb = r.re - p.re;
        a[j] = {w.re * ua + w.im * va, w.re * ub + w.im * vb};
        b[R - 1 - j] = {w.im * ua - w.re * va, w.im * ub - w.re * vb};
    }
}
// Its transpose, with real and imaginary parts exchanged for the inverse Fourier transform.
template <int R>
DR_DEVICE void from_cosines(Complex (&a)[R], Complex (&b)[R], const float* angles, int m, int M) {
    DR_UNROLL for (int j = 0; j < R; ++j) {
        Complex w = complex_at(angles, m + M * j), y = b[R - 1 - j];
        const Complex x = a[j];
        if (j == 0 && m == 0) w.re *= 2.0f, y = {0.0f, 0.0f};  // coefficient 0 has no partner
        const float ua = w.re * x.re + w.im * y.re, va = w.im * x.re - w.re * y.re;
        const float ub = w.re * x.im + w.im * y.im, vb = w.im * x.im - w.re * y.im;
        a[j] = {va + ub, ua - vb}, b[R - 1 - j] = {ub - va, ua + vb};
    }
}

// The steps of `turn`: read the plane, transform forward, transform backward, write the plane.
struct Steps {
    bool read, forward, backward, write;
};

// The last pass of the DCT, of radix R, with the step from Fourier to cosine coefficients (Makhoul 1980), and its reverse.
//
// Coefficient k is at place[k % M] + k / M with M = length / R; k and length - k are computed from the same two Fourier
// coefficients, so a thread processes the butterflies of m = k % M and of M - m together. In between, `choose(q, k, v)`
// returns the input of the backward transform for the coefficients k of pair q.
template <int R, class Choose>
DR_DEVICE void turn(const Team& team, const Way& way, const Lines& lines, const Call& call, Steps steps, Choose choose) {
    const int M = lines.length / R, lanes = way.lanes(), units = lanes * (M / 2 + 1), step = way.along;
    const int* place = call.ints + lines.place;
    const float* angles = call.floats + lines.angles;
    team.each([&](int thread) {
        for (int unit = thread; unit < units; unit += team.size) {
            const int m = unit / lanes, mirrored = m ? M - m : 0, q = unit - m * lanes;
            if (q >= way.pairs) continue;
            const int at = place[m] * step, opposite = place[mirrored] * step;
            Complex a[R], b[R];  // a[j] is of k = m + M j, b[j] of M - m + M j
            const Pair line = way.pair(q, false);
            DR_UNROLL for (int j = 0; j < R; ++j) {
                a[j] = steps.read ? line.get(at + j * step) : Complex{0.0f, 0.0f};
                b[j] = steps.read ? line.get(opposite + j * step) : Complex{0.0f, 0.0f};
            }
            if (steps.forward) dft<R>(a), dft<R>(b);
            if (m == 0) {
                DR_UNROLL for (int j = 0; j < R; ++j) b[j] = a[(j + 1) % R];
            }
            if (steps.forward) to_cosines<R>(a, b, angles, m, M);
            DR_UNROLL for (int j = 0; j < R; ++j) a[j] = choose(q, m + M * j, a[j]);
            if (mirrored != m || steps.backward) {
                DR_UNROLL for (int j = 0; j < R; ++j) {
                    if (m || j < R - 1) b[j] = choose(q, M - m + M * j, b[j]);
                }
            }
            if (steps.backward) {
                from_cosines<R>(a, b, angles, m, M);
                dft<R>(a), dft<R>(b);
            }
            if (steps.write) {
                const Pair to = way.pair(q, steps.backward);
                DR_UNROLL for (int j = 0; j < R; ++j) {
                    to.put(at + j * step, a[j]);
                    if (mirrored != m) to.put(opposite + j * step, b[j]);
                }
            }
        }
    });
}
template <class Choose>
DR_DEVICE void turn(const Team& team, const Way& way, const Lines& lines, const Call& call, Steps steps, Choose choose) {
#define DR_TURN(R) \
    case R: turn<R>(team, way, lines, call, steps, choose); break;
    switch (lines.last) {
        SRM_TURNS
    }
#undef DR_TURN
}
