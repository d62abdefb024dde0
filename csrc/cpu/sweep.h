// Base of the sweeps. A sweep moves down the image once, two rows at a time. At tick t, stage s processes the pair of rows
// t - s: forward convolutions 1..L, then the transposed convolutions L..1. Each needs the rows above and below from the
// previous stage, which are complete by then. Rows are stored in rings that stay in the L2 cache. docs/kernels.md has the
// formulas. Included once per instruction set (DR_ISA names it).
#pragma once
#include <array>

#include "conv.h"
#include "team.h"

namespace DR_ISA {

using dr::Batch;
using dr::Chain;
using dr::HeadKind;

// Saved values of one strip of one image, in the blocks of layout.h: for the hidden layers 2.. the input of gamma . + beta
// and SiLU, for all hidden layers but the last the cotangent of SiLU's output (the remaining ones are recomputed by a
// convolution of one channel); with a LayerNorm rs = 1 / sqrt(var + eps) and rs mean(t xhat) of all layers; h.
class SavedActivations {
  public:
    SavedActivations(float* memory, const Chain& c, const Layout& y, int height)
        : memory_(memory), hidden_(c.depth - 1), y_(&y), pairs_((height + 1) / 2), planes_(2 * (hidden_ - 1)),
          scalars_(c.pixel_norm ? 2 * hidden_ : c.image_norm ? hidden_ : 0) {}
    size_t size() const { return pairs_ * (planes_ * y_->block() + (scalars_ + 1) * y_->block(1)); }
    explicit operator bool() const { return memory_ != nullptr; }
    // Of hidden layer l = 1..: null if it is recomputed.
    float* z(int l, int pair) const { return l > 1 ? plane(l - 2, pair) : nullptr; }
    float* g(int l, int pair) const { return l < hidden_ ? plane(hidden_ - 2 + l, pair) : nullptr; }
    float* rs(int l, int pair) const { return scalar(2 * l - 1, pair); }
    float* m2(int l, int pair) const { return scalar(2 * l, pair); }
    float* h(int pair) const { return scalar(0, pair); }
    // With a LayerNorm over the image: its mean, 1 / sqrt(var + eps), the means of t and of t xhat.
    float* statistics(int l) const { return scalar(l, 0); }

  private:
    float* plane(int k, int pair) const { return memory_ ? memory_ + (k * pairs_ + pair) * y_->block() : nullptr; }
    float* scalar(int k, int pair) const {
        return memory_ ? memory_ + pairs_ * planes_ * y_->block() + (k * pairs_ + pair) * y_->block(1) : nullptr;
    }
    float* memory_;
    int hidden_;
    const Layout* y_;
    size_t pairs_, planes_, scalars_;
};

// The head phi(u, h) plus alpha/2 u^2: value, d/dh and the direct part of d/du. It is quadratic: its derivatives are linear in
// (u, h), and therefore equal to their tangents.
struct Head {
    HeadKind kind;
    float alpha;
    DR_INLINE Vec value(Vec u, Vec h) const {
        const Vec e = u - h;
        const Vec phi = kind == HeadKind::red ? u * e : kind == HeadKind::residual ? e * e : h * h;
        return 0.5f * (alpha * u * u + phi);
    }
    DR_INLINE Vec grad_h(Vec u, Vec h) const {
        return kind == HeadKind::red ? -0.5f * u : kind == HeadKind::residual ? h - u : h;
    }
    DR_INLINE Vec grad_u(Vec u, Vec h) const {
        return alpha * u + (kind == HeadKind::red ? u - 0.5f * h : kind == HeadKind::residual ? u - h : Vec{});
    }
};

// A unit of work: rows [first, last) of a strip of an image. A band recomputes rows of its neighbors that its stages need.
// The bits of a pixel do not depend on the bands, so their number may depend on the number of threads; they begin at even
// rows.
struct Band {
    int image, first, last;
    Strip strip;
    int column;  // which strip
};
// A result depends on pixels up to 2 depth away; with a LayerNorm over the image, on all of them.
static std::vector<Strip> strips_of(const Chain& c, const Batch& batch) {
    if (c.image_norm) return {{0, batch.width, 0, batch.width}};
    return strips(batch.width, 2 * c.depth);
}
static std::vector<Band> bands(const Chain& c, const Batch& batch, int height) {
    std::vector<Band> found;
    const std::vector<Strip> columns = strips_of(c, batch);
    for (int k = 0; k < static_cast<int>(columns.size()); ++k)
        for (int i = 0; i < batch.count; ++i)
            for (int r = 0; r < batch.height; r += c.image_norm ? batch.height : height)
                found.push_back({i, r, c.image_norm ? batch.height : std::min(batch.height, r + height), columns[k], k});
    return found;
}
// Bands for all threads, even if there are fewer images than threads.
static std::vector<Band> shared_bands(const Chain& c, const Batch& batch) {
    int per_image = 1;
    const int columns = static_cast<int>(strips_of(c, batch).size());
    while (batch.count * columns * per_image < batch.threads && batch.height / (2 * per_image) >= 4 * c.depth) per_image *= 2;
    const int pairs = (batch.height + 1) / 2;
    return bands(c, batch, std::max(2, 2 * ((pairs + per_image - 1) / per_image)));
}
// Call work(band) for all bands.
template <class F>
static void for_bands(const std::vector<Band>& list, int threads, F work) {
    parallel_for(static_cast<int>(list.size()), threads, [&](int i) { work(list[i]); });
}

class Sweep {
  public:
    Sweep(const Chain& chain, const Batch& batch, const Band& band, int stages)
        : c(chain), L(chain.depth), H(batch.height), C(chain.channels), y(band.strip.width(), chain.channels),
          image_width(batch.width), phi{chain.head, chain.alpha}, band_(band), stages_(stages),
          tiles_(static_cast<size_t>(4) * C * MAX_PIECE * LANES), raw_(tiles_.size()) {
        for (int v = 0; v < y.vectors; ++v)
            for (int parity = 0; parity < 2; ++parity) {
                IntVec mask;
                for (int j = 0; j < LANES; ++j) {
                    const int x = strip().begin + 2 * (v * LANES + j) + parity;
                    mask[j] = x >= strip().first && x < strip().last ? -1 : 0;
                }
                own_.push_back(mask);
            }
    }

    // Call load_row(r) for input rows and stage(s, pair), in an order that makes all inputs available.
    template <class Load, class Stage>
    DR_INLINE void run(Load load_row, Stage stage) {
        const int begin = first_pair(0), end = (band_.last - 1) / 2 + stages_;
        for (int t = begin - 2; t < end; ++t) {
            for (int r = 2 * t + 2; r < 2 * t + 4; ++r)
                if (r >= 0 && r < H) load_row(r);
            for (int s = 0; s < stages_; ++s)
                if (t - s >= first_pair(s) && t - s < end_pair(s)) stage(s, t - s);
        }
    }

  protected:
    const Strip& strip() const { return band_.strip; }
    // Rows that a ring holds until a stage `lag` pairs later has read them with their neighbors; pairs that it holds until
    // that stage has read them. If the stages run one after another, all are held.
    int rows_for(int lag) const { return c.image_norm ? H : 2 * lag + 4; }
    int pairs_for(int lag) const { return c.image_norm ? (H + 1) / 2 : lag + 1; }

    bool inside(int pair) const { return 2 * pair >= band_.first && 2 * pair < band_.last; }
    int rows(int pair) const { return std::min(2, H - 2 * pair); }

    // Split a row of an image into the lines of a ring.
    void split(const float* image, int r, float shift, Ring& ring) const {
        const float* p = image + static_cast<size_t>(r) * image_width + strip().begin;
        float *e = ring.row(r), *o = e + y.line;
        int t = 0;
        for (; 2 * (t + LANES) <= y.width; t += LANES) {
            const Vec a = load(p + 2 * t) - shift, b = load(p + 2 * t + LANES) - shift;
            store(e + t, even_lanes(a, b)), store(o + t, odd_lanes(a, b));
        }
        for (; t < y.tiles; ++t) {
            e[t] = p[2 * t] - shift;
            o[t] = 2 * t + 1 < y.width ? p[2 * t + 1] - shift : 0.0f;
        }
    }

    // Convolve all rows.
    DR_CALL void convolve_image(const Ring& in, bool one, const float* w, const float* bias, Pairs& to) {
        for (int pair = 0; 2 * pair < H; ++pair)
            convolve(in, one, pair, w, bias, [&](int v0, auto count, float* raw) {
                std::copy(raw, raw + static_cast<size_t>(4) * C * count() * LANES, to.at(pair) + y.piece(v0));
            });
    }

    // A convolution to all channels at a pair of rows, from one channel or from all: body(v0, integral_constant<N>, raw)
    // for each piece, `raw` being the convolution's output. `prefetched` are blocks of the pair that body will read: they are
    // prefetched while the convolution runs.
    template <class F>
    DR_INLINE void convolve(const Ring& in, bool one, int pair, const float* w, const float* bias, F body,
                            std::array<const float*, 2> prefetched = {}) {
        const Rows rows = in.around(2 * pair);
        for_constant_pieces(y, [&](int v0, auto count) {
            convolve(rows, one, v0, count(), w, bias, prefetched);
            body(v0, count, raw_.data());
        });
    }
    DR_CALL void convolve(const Rows& rows, bool one, int v0, int n, const float* w, const float* bias,
                          std::array<const float*, 2> prefetched) {
        for (const float* block : prefetched)
            for (size_t o = y.piece(v0); block && o < y.piece(v0 + n); o += 16) __builtin_prefetch(block + o, 0, 2);
        if (one)
            conv_from_one(rows, v0, n, y, w, bias, raw_.data());
        else if (c.winograd)
            conv_winograd(rows, v0, n, y, w, bias, tiles_.data(), raw_.data());
        else
            conv_direct(rows, v0, n, y, w, bias, raw_.data());
    }

    // The convolution of all channels to one at a pair of rows: body(v0, n, raw).
    template <class F>
    DR_INLINE void convolve_to_one(const Ring& in, int pair, const float* w, float bias, F body) {
        const Rows rows = in.around(2 * pair);
        for_pieces(y, [&](int v0, int n) {
            conv_to_one(rows, v0, n, y, w, bias, raw_.data(), static_cast<size_t>(2) * n * LANES);
            body(v0, n, raw_.data());
        });
    }

    // The result: the last convolution plus the direct part, in the strip's own columns.
    void write_result(const Ring& in, Pairs& direct, int pair, float* image) {
        alignas(64) float both[2 * MAX_PIECE * LANES];
        const float* by = direct.at(pair);
        convolve_to_one(in, pair, c.backward[0], 0.0f, [&](int v0, int n, float* raw) {
            for (int k = 0; k < rows(pair); ++k) {
                for (int v = 0; v < n; ++v) {
                    const size_t e = static_cast<size_t>(2 * k * n + v) * LANES, o = e + n * LANES;
                    const float* d = by + y.piece(1, v0);
                    const Vec a = load(raw + e) + load(d + e), b = load(raw + o) + load(d + o);
                    store(both + 2 * v * LANES, interleave_low(a, b)), store(both + (2 * v + 1) * LANES, interleave_high(a, b));
                }
                // The piece's first and last columns in the image.
                const int begin = strip().begin + 2 * v0 * LANES;
                const int from = std::max(begin, strip().first), to = std::min(begin + 2 * n * LANES, strip().last);
                if (from < to)
                    std::copy(both + (from - begin), both + (to - begin),
                              image + static_cast<size_t>(2 * pair + k) * image_width + from);
            }
        });
    }

    // The lanes of register v of a line that belong to the strip's own columns.
    IntVec own(int parity, int v) const { return own_[2 * v + parity]; }

    const Chain& c;
    const int L, H, C;
    const Layout y;
    const int image_width;  // the strip's is y.width
    const Head phi;
    float* tiles() { return tiles_.data(); }

  private:
    // The pairs [first, end) that stage s must process for the last stage to cover the band.
    int first_pair(int s) const { return std::max(0, band_.first - (stages_ - 1 - s)) / 2; }
    int end_pair(int s) const { return (std::min(H, band_.last + (stages_ - 1 - s)) + 1) / 2; }

    const Band band_;
    const int stages_;
    Floats tiles_, raw_;
    std::vector<IntVec> own_;
};

}  // namespace DR_ISA
