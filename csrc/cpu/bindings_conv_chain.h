// The Python class ConvChain.
#pragma once

#include <cstring>
#include <memory>

#include "bindings.h"
#include "conv_chain.h"
#include "conv_chain_pack.h"

namespace dr::bindings {

// A conv chain with its filters packed for one instruction set.
class ConvChain {
  public:
    // `weights` and `biases` of the convolutions, then (with a LayerNorm) `gammas` and `betas`: tensors.
    ConvChain(const Tensors& weights, const Tensors& biases, const Tensors& gammas, const Tensors& betas, int channels,
              int head, float alpha, float center, float gain, float eps, bool image_norm, const std::string& isa)
        : kernels_(&dr::kernels(isa)) {
        const int depth = static_cast<int>(weights.size());
        const bool norm = !gammas.empty();
        if (channels < 1 || head < 0 || head > 2 || depth < 2 || depth > dr::MAX_DEPTH || biases.size() != weights.size() ||
            gammas.size() != betas.size() || (norm && gammas.size() + 1 != weights.size()))
            throw std::invalid_argument("2 <= depth <= 16, a head of three, and a bias for each filter");
        dr::Chain chain{};
        chain.depth = depth, chain.channels = channels, chain.head = static_cast<dr::HeadKind>(head);
        chain.pixel_norm = norm && !image_norm, chain.image_norm = norm && image_norm;
        chain.alpha = alpha, chain.center = center, chain.eps = eps;
        packed_ = std::make_unique<dr::PackedChain>(*kernels_, chain, gain);
        for (int l = 0; l < depth; ++l) {
            const dr::Layer layer = packed_->layer(l);
            const bool normed = norm && l < depth - 1;
            const float* weight = parameter(weights[l], static_cast<std::size_t>(9) * layer.out * layer.in);
            const float* bias = parameter(biases[l], layer.out);
            const float* gamma = normed ? parameter(gammas[l], channels) : nullptr;
            const float* beta = normed ? parameter(betas[l], channels) : nullptr;
            packed_->set(l, weight, bias, gamma, beta);
        }
    }
    ConvChain(const ConvChain&) = delete;
    ConvChain& operator=(const ConvChain&) = delete;

    std::string isa() const { return kernels_->name; }

    // Whether these tensors, in the constructor's order, equal the packed values.
    bool current(const Tensors& weights, const Tensors& biases, const Tensors& gammas, const Tensors& betas) const {
        auto packed = parameters_.begin();
        if (weights.size() + biases.size() + gammas.size() + betas.size() != parameters_.size()) return false;
        const auto same = [&](py::handle t) {
            const std::vector<float>& values = *packed++;
            const float* p = dr::memory<float>(t, values.size(), "a parameter");
            return std::memcmp(p, values.data(), values.size() * sizeof(float)) == 0;
        };
        for (std::size_t l = 0; l < weights.size(); ++l) {
            if (!same(weights[l]) || !same(biases[l])) return false;
            if (l < gammas.size() && (!same(gammas[l]) || !same(betas[l]))) return false;
        }
        return true;
    }

    // Floats that `gradient` saves for the products if `saved` is passed.
    std::size_t saved_floats(int b, int height, int width) const {
        return kernels_->saved_floats(chain(), batch(b, height, width, 1));
    }

    void gradient(py::handle x, py::handle value, py::handle grad, py::handle saved, int b, int height, int width,
                  int threads) const {
        const Batch size = batch(b, height, width, threads);
        run_gradient(*kernels_, chain(), size, saved_floats(b, height, width), x, value, grad, saved);
    }
    void hvp(py::handle x, py::handle v, py::handle saved, py::handle out, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads);
        const float *in = dr::memory<float>(x, size.numbers(), "x"), *along = dr::memory<float>(v, size.numbers(), "v");
        const float* memory = saved_memory(saved, size);
        float* product = dr::memory<float>(out, size.numbers(), "out");
        run([&] { kernels_->hvp(chain(), size, in, along, memory, product); });
    }
    void param_vjp(py::handle x, py::handle v, py::handle saved, py::handle out, int b, int height, int width,
                   int threads) const {
        const Batch size = batch(b, height, width, threads);
        std::size_t parameters = 0;
        for (const auto& values : parameters_) parameters += values.size();
        const float *in = dr::memory<float>(x, size.numbers(), "x"), *along = dr::memory<float>(v, size.numbers(), "v");
        const float* memory = saved_memory(saved, size);
        double* sums = dr::memory<double>(out, parameters, "out");
        run([&] { kernels_->param_vjp(chain(), size, in, along, memory, sums); });
    }

  private:
    const dr::Chain& chain() const { return packed_->chain(); }
    const float* saved_memory(py::handle saved, const Batch& size) const {
        return dr::memory<float>(saved, kernels_->saved_floats(chain(), size), "the memory", dr::Extent::at_least);
    }
    const float* parameter(py::handle tensor, std::size_t n) {
        const float* p = dr::memory<float>(tensor, n, "a parameter");
        parameters_.emplace_back(p, p + n);
        return p;
    }

    const dr::Kernels* kernels_;
    std::unique_ptr<dr::PackedChain> packed_;
    std::vector<std::vector<float>> parameters_;  // in the order weight, bias, gamma, beta of each layer
};

inline void bind_conv_chain(py::module_& m) {
    py::class_<ConvChain>(m, "ConvChain")
        .def(py::init<const Tensors&, const Tensors&, const Tensors&, const Tensors&, int, int, float, float, float, float,
                      bool, const std::string&>())
        .def("current", &ConvChain::current)
        .def_property_readonly("isa", &ConvChain::isa)
        .def("saved_floats", &ConvChain::saved_floats)
        .def("gradient", &ConvChain::gradient)
        .def("hvp", &ConvChain::hvp)
        .def("param_vjp", &ConvChain::param_vjp);
}

}  // namespace dr::bindings
