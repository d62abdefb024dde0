// The Python module deepreg_fast._cpu. Tensors cross as addresses, so that one build serves every release of torch;
// shapes and dtypes are checked on the Python side (deepreg_fast/backend/cpu.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_chain.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

std::vector<const dr::Kernels*> here() {
    std::vector<const dr::Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&dr::avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&dr::avx2);
#endif
    found.push_back(&dr::portable);
    return found;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto* k : here()) names.emplace_back(k->name);
    return names;
}

const dr::Kernels& kernels(const std::string& name) {
    for (const auto* k : here())
        if (name.empty() || name == k->name) return *k;
    throw std::invalid_argument("instruction set " + name + " is not of this machine");
}

// Packed floats on a cache-line boundary.
struct Packed {
    std::vector<float> data;
    float* begin = nullptr;
    explicit Packed(std::size_t n) : data(n + 16, 0.0f) {
        begin = data.data();
        while (reinterpret_cast<Address>(begin) % 64) ++begin;
    }
};

class ConvChain {
  public:
    ConvChain(const std::vector<Address>& weights, const std::vector<Address>& biases, int channels, int head,
              float alpha, float center, float gain, const std::string& isa)
        : kernels_(&kernels(isa)) {
        const int depth = static_cast<int>(weights.size());
        if (depth < 2 || depth > 16 || biases.size() != weights.size()) throw std::invalid_argument("2 <= depth <= 16");
        chain_ = dr::Chain{depth, channels, (channels + 15) / 16, head, alpha, center, {}, {}, {}};
        const std::size_t padded = 16 * static_cast<std::size_t>(chain_.blocks);
        for (int l = 0; l < depth; ++l) {
            const bool first = l == 0, last = l == depth - 1;
            const int out = last ? 1 : channels, in = first ? 1 : channels;
            const float scale = first ? gain : last ? 1.0f / gain : 1.0f;
            const std::size_t size = 9 * padded * (first || last ? 1 : padded);
            const auto* w = reinterpret_cast<const float*>(weights[l]);
            const auto* b = reinterpret_cast<const float*>(biases[l]);
            using dr::Kind;
            const Kind kind = first ? Kind::expand : last ? Kind::reduce : Kind::mix;
            const Kind turned = first ? Kind::reduce : last ? Kind::expand : Kind::mix;
            chain_.forward[l] = pack(w, out, in, false, kind, scale, size);
            chain_.backward[l] = pack(w, out, in, true, turned, scale, size);
            Packed bias(padded);
            for (int k = 0; k < out; ++k) bias.begin[k] = last ? b[k] / gain : b[k];
            chain_.bias[l] = bias.begin;
            kept_.push_back(std::move(bias));
        }
    }

    std::string isa() const { return kernels_->name; }

    void gradient(Address x, Address value, Address grad, Address planes, int b, int h, int w, int threads) const {
        py::gil_scoped_release free;
        kernels_->gradient(chain_, {b, h, w, threads}, reinterpret_cast<const float*>(x),
                           reinterpret_cast<double*>(value), reinterpret_cast<float*>(grad),
                           reinterpret_cast<float*>(planes));
    }
    void hvp(Address v, Address planes, Address out, int b, int h, int w, int threads) const {
        py::gil_scoped_release free;
        kernels_->hvp(chain_, {b, h, w, threads}, reinterpret_cast<const float*>(v),
                      reinterpret_cast<const float*>(planes), reinterpret_cast<float*>(out));
    }
    void param_vjp(Address x, Address v, Address out, int b, int h, int w, int threads) const {
        py::gil_scoped_release free;
        kernels_->param_vjp(chain_, {b, h, w, threads}, reinterpret_cast<const float*>(x),
                            reinterpret_cast<const float*>(v), reinterpret_cast<double*>(out));
    }

  private:
    const float* pack(const float* w, int out, int in, bool transpose, dr::Kind kind, float scale, std::size_t size) {
        Packed packed(size);
        kernels_->pack(w, out, in, transpose, kind, scale, packed.begin);
        const float* begin = packed.begin;
        kept_.push_back(std::move(packed));
        return begin;
    }

    const dr::Kernels* kernels_;
    dr::Chain chain_;
    std::vector<Packed> kept_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels for the CPU.";
    m.def("instruction_sets", &instruction_sets);
    py::class_<ConvChain>(m, "ConvChain")
        .def(py::init<const std::vector<Address>&, const std::vector<Address>&, int, int, float, float, float,
                      const std::string&>())
        .def_property_readonly("isa", &ConvChain::isa)
        .def("gradient", &ConvChain::gradient)
        .def("hvp", &ConvChain::hvp)
        .def("param_vjp", &ConvChain::param_vjp);
}
