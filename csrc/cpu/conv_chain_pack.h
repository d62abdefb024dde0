// A conv chain's parameters, packed for the kernels of one instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "conv_chain.h"

namespace dr {

// Zeroed floats on a cache-line boundary.
struct AlignedFloats {
    std::vector<float> data;
    float* begin = nullptr;
    explicit AlignedFloats(std::size_t n) : data(n + 16, 0.0f) {
        begin = data.data();
        while (reinterpret_cast<std::uintptr_t>(begin) % 64) ++begin;
    }
};

class PackedChain {
  public:
    // `chain` without its parameters: `set` packs those of each layer. `gain`: h(u) = net(gain u) / gain.
    PackedChain(const Kernels& kernels, const Chain& chain, float gain) : kernels_(kernels), chain_(chain), gain_(gain) {
        chain_.winograd = chain_.channels >= WINOGRAD_CHANNELS;
    }
    PackedChain(const PackedChain&) = delete;
    PackedChain& operator=(const PackedChain&) = delete;

    const Chain& chain() const { return chain_; }

    // The convolution of layer l = 0, 1, ..
    Layer layer(int l) const {
        const bool first = l == 0, last = l == chain_.depth - 1;
        return {last ? 1 : chain_.channels, first ? 1 : chain_.channels, first ? gain_ : last ? 1.0 / gain_ : 1.0,
                chain_.pixel_norm && !last};
    }

    // Filters [out, in, 9], biases [out], and of a LayerNorm gamma and beta [out] (otherwise null).
    void set(int l, const float* weight, const float* bias, const float* gamma, const float* beta) {
        const Layer layer = this->layer(l);
        const bool last = l == chain_.depth - 1, inner = l > 0 && !last, winograd = inner && chain_.winograd;
        const FilterLayout layout = winograd ? FilterLayout::winograd : FilterLayout::direct;
        const std::size_t C = chain_.channels, size = C * (winograd ? 16 * ((C + 7) / 8 * 8) : inner ? 9 * C : 9);
        chain_.forward[l] = pack(weight, layer, false, layout, size);
        chain_.backward[l] = pack(weight, layer, true, layout, size);
        double mean = 0.0;
        for (int k = 0; k < layer.out && layer.centered; ++k) mean += bias[k] / static_cast<double>(layer.out);
        const double scale = last ? layer.scale : 1.0;
        chain_.bias[l] = keep(layer.out, [&](int k) { return static_cast<float>(scale * (bias[k] - mean)); });
        if (gamma) chain_.gamma[l] = keep(layer.out, [&](int k) { return gamma[k]; });
        if (beta) chain_.beta[l] = keep(layer.out, [&](int k) { return beta[k]; });
    }

  private:
    // With fewer channels Winograd's additions add more rounding error than the saved products.
    static constexpr int WINOGRAD_CHANNELS = 8;

    const float* keep(AlignedFloats values) {
        const float* begin = values.begin;
        values_.push_back(std::move(values));
        return begin;
    }
    template <class F>
    const float* keep(int n, F value) {
        AlignedFloats values(n);
        for (int k = 0; k < n; ++k) values.begin[k] = value(k);
        return keep(std::move(values));
    }
    const float* pack(const float* w, const Layer& layer, bool transpose, FilterLayout layout, std::size_t size) {
        AlignedFloats packed(size);
        kernels_.pack(w, layer, transpose, layout, packed.begin);
        return keep(std::move(packed));
    }

    const Kernels& kernels_;
    Chain chain_;
    const float gain_;
    std::vector<AlignedFloats> values_;
};

}  // namespace dr
