// The host's half of warp.cuh: 32 lanes as an array, tensor-core products by their definition.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

template <class T>
struct Lanes {
    T x[32];
    Lanes() = default;
    Lanes(T value) {
        for (T& one : x) one = value;
    }
#define LANES_OPERATOR(op, Result)                                                   \
    friend Lanes<Result> operator op(const Lanes& a, const Lanes& b) {               \
        Lanes<Result> c;                                                             \
        for (int i = 0; i < 32; ++i) c.x[i] = static_cast<Result>(a.x[i] op b.x[i]); \
        return c;                                                                    \
    }
    LANES_OPERATOR(+, T)
    LANES_OPERATOR(-, T)
    LANES_OPERATOR(*, T)
    friend Lanes operator-(const Lanes& a) { return a * Lanes(T(-1)); }
    LANES_OPERATOR(<, unsigned char)
    LANES_OPERATOR(>=, unsigned char)
#undef LANES_OPERATOR
};
using Float = Lanes<float>;
using Word = Lanes<unsigned>;
using Index = Lanes<int>;
using Flag = Lanes<unsigned char>;

template <class T, class F>
Lanes<T> by_lane(F f) {
    Lanes<T> c;
    for (int i = 0; i < 32; ++i) c.x[i] = f(i);
    return c;
}
#define LANES_INTEGER(op)                                                     \
    inline Index operator op(const Index& a, int b) {                         \
        return by_lane<int>([&](int i) { return a.x[i] op b; });              \
    }
LANES_INTEGER(/)
LANES_INTEGER(%)
LANES_INTEGER(^)
LANES_INTEGER(&)
LANES_INTEGER(>>)
#undef LANES_INTEGER
inline Index operator^(const Index& a, const Index& b) {
    return by_lane<int>([&](int i) { return a.x[i] ^ b.x[i]; });
}
inline Flag operator&&(const Flag& a, const Flag& b) {
    return by_lane<unsigned char>([&](int i) { return static_cast<unsigned char>(a.x[i] & b.x[i]); });
}
inline Flag operator!(const Flag& a) {
    return by_lane<unsigned char>([&](int i) { return static_cast<unsigned char>(!a.x[i]); });
}

inline Index lanes() {
    return by_lane<int>([](int i) { return i; });
}
inline Float choose(const Flag& flag, const Float& yes, const Float& no) {
    return by_lane<float>([&](int i) { return flag.x[i] ? yes.x[i] : no.x[i]; });
}
inline Index choose(const Flag& flag, const Index& yes, const Index& no) {
    return by_lane<int>([&](int i) { return flag.x[i] ? yes.x[i] : no.x[i]; });
}
inline bool any_lane(const Flag& flag) {
    bool any = false;
    for (const unsigned char one : flag.x) any |= one != 0;
    return any;
}
inline float fused(float a, float b, float c) { return a * b + c; }
inline Float fused(const Float& a, const Float& b, const Float& c) {
    // Products of floats are exact in double; the second rounding is rarely seen.
    return by_lane<float>([&](int i) { return static_cast<float>(static_cast<double>(a.x[i]) * b.x[i] + c.x[i]); });
}
inline Index lesser(const Index& a, int b) {
    return by_lane<int>([&](int i) { return a.x[i] < b ? a.x[i] : b; });
}
inline Float smaller(const Float& a, const Float& b) {
    return by_lane<float>([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
inline Flag is_finite(const Float& a) {
    return by_lane<unsigned char>([&](int i) { return static_cast<unsigned char>(std::isfinite(a.x[i])); });
}
inline Float exp2_fast(const Float& a) {
    return by_lane<float>([&](int i) { return std::exp2(a.x[i]); });
}
inline Float reciprocal(const Float& a) {
    return by_lane<float>([&](int i) { return 1.0f / a.x[i]; });
}
inline Float inverse_root(const Float& a) {
    return by_lane<float>([&](int i) { return 1.0f / std::sqrt(a.x[i]); });
}
inline Float quad_sum(const Float& a) {
    const Float b = by_lane<float>([&](int i) { return a.x[i] + a.x[i ^ 1]; });
    return by_lane<float>([&](int i) { return b.x[i] + b.x[i ^ 2]; });
}

template <class To, class From>
To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
// Float to half, to nearest even; above 65504 infinity.
inline unsigned half_bits(float value) {
    unsigned b = same_bits<unsigned>(value);
    const unsigned sign = b >> 16 & 0x8000u;
    b &= 0x7fffffffu;
    if (b > 0x7f800000u) return sign | 0x7e00u;
    if (b >= 0x47800000u) return sign | 0x7c00u;
    if (b < 0x38800000u) return sign | (same_bits<unsigned>(same_bits<float>(b) + 0.5f) - 0x3f000000u);
    return sign | (b + 0xfffu + (b >> 13 & 1u) - 0x38000000u) >> 13;
}
struct Halves {
    std::vector<float> table;
    Halves() : table(65536) {
        for (unsigned h = 0; h < 65536; ++h) {
            const int exponent = h >> 10 & 31, mantissa = h & 1023;
            double m = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
            if (exponent == 31) m = mantissa ? NAN : INFINITY;
            table[h] = static_cast<float>(h & 0x8000u ? -m : m);
        }
    }
};
inline const float* halves() {
    static const Halves all;
    return all.table.data();
}
inline void split(Word& high, Word& low, const Float& a, const Float& b) {
    const float* half = halves();
    for (int i = 0; i < 32; ++i) {
        const unsigned x = half_bits(a.x[i]), y = half_bits(b.x[i]);
        high.x[i] = x | y << 16;
        low.x[i] = half_bits(a.x[i] - half[x]) | half_bits(b.x[i] - half[y]) << 16;
    }
}
// Exact products; the sum is rounded towards zero, as tensor cores do.
inline float truncated(double sum) {
    if (!std::isfinite(sum) || std::fabs(sum) < 1e-37) return static_cast<float>(sum);
    return static_cast<float>(same_bits<double>(same_bits<std::uint64_t>(sum) & ~((std::uint64_t{1} << 29) - 1)));
}
inline void mma(Float* d, const Word (&a)[4], const Word& b0, const Word& b1) {
    const float* half = halves();
    double left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int two = 0; two < 2; ++two) {
            const int g = lane / 4, c = lane % 4 * 2 + two, shift = 16 * two;
            for (int n = 0; n < 4; ++n) left[g + n % 2 * 8][c + n / 2 * 8] = half[a[n].x[lane] >> shift & 0xffffu];
            right[c][g] = half[b0.x[lane] >> shift & 0xffffu], right[c + 8][g] = half[b1.x[lane] >> shift & 0xffffu];
            sum[g][c] = d[two].x[lane], sum[g + 8][c] = d[2 + two].x[lane];
        }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) sum[row][n] += left[row][k] * right[k][n];
    for (int lane = 0; lane < 32; ++lane)
        for (int n = 0; n < 4; ++n) d[n].x[lane] = truncated(sum[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2]);
}
struct Place {
    const float* from;
    Index i;
};
inline Place place(const float* from, const Index& i) { return {from, i}; }
inline void load4(Float (&x)[4], const Place& at, int offset) {
    for (int n = 0; n < 4; ++n) x[n] = by_lane<float>([&](int lane) { return at.from[at.i.x[lane] + offset + n]; });
}
inline Float load(const float* from, const Index& i, const Flag& flag) {
    return by_lane<float>([&](int lane) { return flag.x[lane] ? from[i.x[lane]] : 0.0f; });
}
inline void store(float* to, const Index& i, const Float& x, const Flag& flag) {
    for (int lane = 0; lane < 32; ++lane)
        if (flag.x[lane]) to[i.x[lane]] = x.x[lane];
}
inline void store4(float* to, const Index& i, const Float (&x)[4], const Flag& flag) {
    for (int n = 0; n < 4; ++n) store(to, i + n, x[n], flag);
}
inline void store_sum(double* to, const Float (&x)[2], const Flag (&flag)[2]) {
    double sum[8];
    for (int i = 0; i < 8; ++i)
        sum[i] = (flag[0].x[4 * i] ? double{x[0].x[4 * i]} : 0.0) + (flag[1].x[4 * i] ? double{x[1].x[4 * i]} : 0.0);
    for (int n = 1; n < 8; n *= 2)
        for (int i = 0; i < 8; i += 2 * n) sum[i] += sum[i + n];
    *to = sum[0];
}
inline void keep_largest(unsigned* to, const Float& a, const Flag& flag) {
    for (int i = 0; i < 32; ++i)
        if (flag.x[i] && same_bits<unsigned>(a.x[i]) > *to) *to = same_bits<unsigned>(a.x[i]);
}
inline Float larger_size(const Float& a, const Float& b) {
    return by_lane<float>([&](int i) { return std::fmax(std::fabs(a.x[i]), std::fabs(b.x[i])); });
}
inline Word load_word(const unsigned* from, const Index& i, const Flag& flag) {
    return by_lane<unsigned>([&](int lane) { return flag.x[lane] ? from[i.x[lane]] : 0u; });
}
inline unsigned bits_of(float x) { return same_bits<unsigned>(x); }
inline float from_bits(unsigned x) { return same_bits<float>(x); }
inline Word word_of(const Float& a) {
    return by_lane<unsigned>([&](int i) { return same_bits<unsigned>(a.x[i]); });
}
inline Float float_of(const Word& a) {
    return by_lane<float>([&](int i) { return same_bits<float>(a.x[i]); });
}

struct Shared {
    static constexpr int MANY = 1023;
    std::vector<unsigned> words;
    std::vector<int> reader, writer;  // 1024 * phase + thread of the last access
    int phase = 1, warp = 0;
    bool raced = false;

    // As a float and as two halves, this pattern is NaN.
    explicit Shared(int bytes) : words(bytes / 4, 0x7fc07fc0u), reader(bytes / 4), writer(bytes / 4) {}
    unsigned read(int i, int lane) {
        const int now = 1024 * phase + 32 * warp + lane;
        raced |= writer.at(i) / 1024 == phase && writer[i] != now;
        reader[i] = reader[i] / 1024 == phase && reader[i] != now ? 1024 * phase + MANY : now;
        return words[i];
    }
    void write(int i, int lane, unsigned value) {
        const int now = 1024 * phase + 32 * warp + lane;
        raced |= writer.at(i) / 1024 == phase && writer[i] != now;
        raced |= reader[i] / 1024 == phase && reader[i] != now;
        writer[i] = now, words[i] = value;
    }
    Word get(const Index& i, const Flag& flag = 1) {
        return by_lane<unsigned>([&](int lane) { return flag.x[lane] ? read(i.x[lane] / 4, lane) : 0u; });
    }
    void get4(Word (&x)[4], const Index& i) {
        for (int n = 0; n < 4; ++n) x[n] = get(i + 4 * n);
    }
    void put(const Index& i, const Word& x, const Flag& flag) {
        for (int lane = 0; lane < 32; ++lane)
            if (flag.x[lane]) write(i.x[lane] / 4, lane, x.x[lane]);
    }
    void matrices(Word (&x)[4], const Index& i) {
        for (int m = 0; m < 4; ++m)
            for (int lane = 0; lane < 32; ++lane)
                x[m].x[lane] = read(i.x[8 * m + lane / 4] / 4 + lane % 4, 8 * m + lane / 4);
    }
};
struct Block {
    int warps, order;
    unsigned* state;
    Shared* shared;

    template <class Phase>
    void each(Phase phase) const {
        for (const int warp : Team{warps, order, state}.threads()) {
            shared->warp = warp;
            phase(warp);
        }
        ++shared->phase;
    }
};
