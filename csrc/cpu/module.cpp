// The Python module deepreg_fast._cpu. Tensors cross as addresses, so that one build serves every release of torch;
// shapes and dtypes are checked on the Python side (deepreg_fast/backend/cpu.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_chain.h"
#include "ridge.h"
#include "srm.h"
#include "tv.h"
#include "vectors.h"

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

// A forked child has none of its parent's OpenMP threads and would wait for them for ever: it works alone.
bool forked = false;

// Threads to use of those asked for: no more than this process may run on, since waiting ones spin.
int team(int asked) {
#ifdef _OPENMP
    return forked ? 1 : std::max(1, std::min(asked, omp_get_num_procs()));
#else
    return 1;
#endif
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

// A conv chain with its filters packed for one instruction set.
class ConvChain {
  public:
    // `weights` and `biases` of the convolutions, then (with a LayerNorm) `gammas` and `betas`: addresses of floats.
    ConvChain(const std::vector<Address>& weights, const std::vector<Address>& biases,
              const std::vector<Address>& gammas, const std::vector<Address>& betas, int channels, int head, float alpha,
              float center, float gain, float eps, bool whole, const std::string& isa)
        : kernels_(&kernels(isa)) {
        const int depth = static_cast<int>(weights.size());
        const bool norm = !gammas.empty();
        if (depth < 2 || depth > dr::MAX_DEPTH || biases.size() != weights.size() || gammas.size() != betas.size() ||
            (norm && gammas.size() + 1 != weights.size()))
            throw std::invalid_argument("2 <= depth <= 16, and a bias for each filter");
        // With few channels Winograd's additions round more than the products that it saves.
        chain_ = dr::Chain{depth, channels, head, norm && !whole, norm && whole, channels >= MOST_DIRECT, alpha, center, eps, {}, {}, {}, {}, {}};
        const std::size_t C = channels;
        for (int l = 0; l < depth; ++l) {
            const bool first = l == 0, last = l == depth - 1, inner = !first && !last;
            const dr::Layer layer{last ? 1 : channels, first ? 1 : channels, first ? gain : last ? 1.0 / gain : 1.0,
                                  chain_.norm && !last};
            const bool winograd = inner && chain_.winograd;
            const dr::Form form = winograd ? dr::Form::winograd : dr::Form::direct;
            const std::size_t size = C * (winograd ? 16 * ((C + 7) / 8 * 8) : inner ? 9 * C : 9);
            const float* w = raw(weights[l], static_cast<std::size_t>(9) * layer.out * layer.in);
            chain_.forward[l] = pack(w, layer, false, form, size);
            chain_.backward[l] = pack(w, layer, true, form, size);
            const float* b = raw(biases[l], layer.out);
            double mean = 0.0;
            for (int k = 0; k < layer.out && layer.centred; ++k) mean += b[k] / static_cast<double>(layer.out);
            const double scale = last ? layer.scale : 1.0;
            chain_.bias[l] = keep(layer.out, [&](int k) { return static_cast<float>(scale * (b[k] - mean)); });
            if (!norm || last) continue;
            const float *gamma = raw(gammas[l], channels), *beta = raw(betas[l], channels);
            chain_.gamma[l] = keep(channels, [&](int k) { return gamma[k]; });
            chain_.beta[l] = keep(channels, [&](int k) { return beta[k]; });
        }
    }
    ConvChain(const ConvChain&) = delete;
    ConvChain& operator=(const ConvChain&) = delete;

    std::string isa() const { return kernels_->name; }

    // Whether the parameters still have the values that were packed.
    bool current() const {
        for (const auto& p : given_)
            if (std::memcmp(p.at, p.values.data(), p.values.size() * sizeof(float)) != 0) return false;
        return true;
    }

    // Floats that `gradient` keeps for the products if it is given memory for them.
    std::size_t kept(int b, int height, int width) const { return kernels_->kept(chain_, {b, height, width, 1}); }

    void gradient(Address x, Address value, Address grad, Address kept, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->gradient(chain_, {b, height, width, team(threads)}, floats(x), reinterpret_cast<double*>(value), floats(grad),
                           floats(kept));
    }
    void hvp(Address x, Address v, Address kept, Address out, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->hvp(chain_, {b, height, width, team(threads)}, floats(x), floats(v), floats(kept), floats(out));
    }
    void param_vjp(Address x, Address v, Address kept, Address out, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->param_vjp(chain_, {b, height, width, team(threads)}, floats(x), floats(v), floats(kept),
                            reinterpret_cast<double*>(out));
    }

  private:
    static constexpr int MOST_DIRECT = 8;
    struct Given {
        const float* at;
        std::vector<float> values;
    };

    static float* floats(Address a) { return reinterpret_cast<float*>(a); }
    const float* raw(Address a, std::size_t n) {
        const float* p = floats(a);
        given_.push_back({p, {p, p + n}});
        return p;
    }
    const float* keep(Packed packed) {
        const float* begin = packed.begin;
        kept_.push_back(std::move(packed));
        return begin;
    }
    template <class F>
    const float* keep(int n, F value) {
        Packed packed(n);
        for (int k = 0; k < n; ++k) packed.begin[k] = value(k);
        return keep(std::move(packed));
    }
    const float* pack(const float* w, const dr::Layer& layer, bool transpose, dr::Form form, std::size_t size) {
        Packed packed(size);
        kernels_->pack(w, layer, transpose, form, packed.begin);
        return keep(std::move(packed));
    }

    const dr::Kernels* kernels_;
    dr::Chain chain_;
    std::vector<Packed> kept_;
    std::vector<Given> given_;
};

// The twiddles of an FFT of n points as srm.inc walks through them, and the angles of a DCT.
dr::Lines dct_lines(int n) {
    const double pi = 3.14159265358979323846;
    dr::Lines plan;
    plan.n = n;
    int rest = n;
    for (const int radix : {4, 2, 3, 5})
        for (; rest % radix == 0; rest /= radix) plan.radices.push_back(radix);
    for (int radix = 7; rest > 1; radix += 2)
        for (; rest % radix == 0; rest /= radix) plan.radices.push_back(radix);
    const auto turn = [&](double part) {
        plan.twiddles.push_back(static_cast<float>(std::cos(2 * pi * part)));
        plan.twiddles.push_back(static_cast<float>(-std::sin(2 * pi * part)));
    };
    long before = 1;
    for (const int radix : plan.radices) {
        const long inner = n / (before * radix);
        for (long i = 0; i < inner; ++i)
            for (long j = 1; j < radix; ++j) turn(static_cast<double>(before * i * j % n) / n);
        for (long j = 0; j < radix && radix > 5; ++j) turn(static_cast<double>(j) / radix);
        before *= radix;
    }
    for (int k = 0; 2 * k <= n; ++k) {
        const double angle = pi * k / (2.0 * n), scale = k ? std::sqrt(0.5 / n) : std::sqrt(1.0 / n);
        plan.angles.push_back(static_cast<float>(scale * std::cos(angle)));
        plan.angles.push_back(static_cast<float>(scale * std::sin(angle)));
    }
    return plan;
}

// `matrix` [n, n] of +-1: which signed sums an output takes (srm.h).
dr::Lines hadamard_lines(int n, const std::int8_t* matrix) {
    dr::Lines plan;
    plan.n = n;
    for (int transposed = 0; transposed < 2; ++transposed)
        for (int k = 0; k < n; ++k)
            for (int c = 0; c < plan.chunks(); ++c) {
                std::uint64_t picks = 0;
                for (int j = plan.GROUPED * plan.first(c); j < std::min(n, plan.GROUPED * plan.first(c + 1)); ++j) {
                    const int group = j / plan.GROUPED - plan.first(c), bit = 8 * group + 3 + j % plan.GROUPED;
                    const bool negative = (transposed ? matrix[j * n + k] : matrix[k * n + j]) < 0;
                    picks |= static_cast<std::uint64_t>(negative) << bit;
                }
                plan.choice[transposed].push_back(picks);
            }
    return plan;
}

// As srm.h has them.
std::vector<std::int32_t> sign_bits(const std::int8_t* signs, std::size_t n) {
    std::vector<std::uint32_t> bits((n + 511) / 512 * 16);
    for (std::size_t i = 0; i < n; ++i)
        if (signs[i] < 0) bits[i / 512 * 16 + i % 16] |= 1u << (31 - i / 16 % 32);
    return {bits.begin(), bits.end()};
}

// The table of this machine's best instruction set, or of the one that is named.
template <class Table>
const Table& table(const std::string& isa, const Table& avx512, const Table& avx2, const Table& portable) {
    const std::string name = kernels(isa).name;
    return name == "avx512" ? avx512 : name == "avx2" ? avx2 : portable;
}
#if defined(__x86_64__)
#define DR_TABLES(kind) dr::kind##_avx512, dr::kind##_avx2, dr::kind##_portable
#else
#define DR_TABLES(kind) dr::kind##_portable, dr::kind##_portable, dr::kind##_portable
#endif

class Srm {
  public:
    // `rows` and `perm` are int64, `signs` and the Hadamard matrices of the two sizes int8; 0 where there is none.
    Srm(int transform, int channels, int height, int width, int block, int measurements, Address rows, Address signs,
        Address perm, Address columns_matrix, Address lines_matrix, const std::string& isa)
        : kernels_(&table(isa, DR_TABLES(srm))) {
        s_.transform = static_cast<dr::Transform>(transform);
        s_.channels = channels, s_.height = height, s_.width = width, s_.block = block, s_.measurements = measurements;
        const std::size_t d = static_cast<std::size_t>(channels) * height * width;
        const auto* r = reinterpret_cast<const std::int64_t*>(rows);
        s_.kept.assign((d + 15) / 16, 0);
        for (int j = 0; j < measurements; ++j) s_.kept[r[j] / 16] |= static_cast<std::uint16_t>(1u << r[j] % 16);
        if (signs) {
            const auto* p = reinterpret_cast<const std::int8_t*>(signs);
            s_.signs.assign(p, p + d);
            if (s_.transform == dr::Transform::walsh) s_.sign_bits = sign_bits(p, d);
        }
        if (perm) {
            const auto* p = reinterpret_cast<const std::int64_t*>(perm);
            s_.perm.assign(p, p + d);
        }
        if (s_.transform == dr::Transform::dct) {
            s_.columns = dct_lines(height);
            s_.lines = dct_lines(width);
        } else if (s_.transform == dr::Transform::hadamard) {
            s_.columns = hadamard_lines(height, reinterpret_cast<const std::int8_t*>(columns_matrix));
            s_.lines = hadamard_lines(width, reinterpret_cast<const std::int8_t*>(lines_matrix));
        }
    }

    // `weight` 0: `one` is every image's.
    void apply(int product, int count, int threads, Address x, Address y, Address weight, float one, Address out) const {
        py::gil_scoped_release free;
        std::vector<float> same;
        if (!weight) same.assign(count, one);
        kernels_->apply(s_, static_cast<dr::Product>(product), count, team(threads), reinterpret_cast<const float*>(x),
                        reinterpret_cast<const float*>(y), weight ? reinterpret_cast<const float*>(weight) : same.data(),
                        reinterpret_cast<float*>(out));
    }

  private:
    const dr::SrmKernels* kernels_;
    dr::Srm s_;
};

// A ridge energy with copies of its numbers.
class Ridge {
  public:
    // Addresses of floats: filters [filters, side, side], coefficients [filters, steps], scales [steps].
    Ridge(int filters, int side, int steps, float center, Address w, Address c, Address s, const std::string& isa)
        : kernels_(&table(isa, DR_TABLES(ridge))) {
        if (filters < 1 || steps < 1 || side < 3 || side > dr::MAX_SIDE || side % 2 == 0)
            throw std::invalid_argument("an odd side from 3 to 15, and at least one filter and one step");
        const std::size_t n = filters;
        w_.assign(floats(w), floats(w) + n * side * side);
        c_.assign(floats(c), floats(c) + n * steps);
        s_.assign(floats(s), floats(s) + steps);
        ridge_ = {filters, side, steps, center, w_.data(), c_.data(), s_.data()};
    }
    Ridge(const Ridge&) = delete;
    Ridge& operator=(const Ridge&) = delete;

    // Floats that `gradient` keeps of each image for `hvp` if it is given memory for them.
    std::size_t kept(int height, int width) const { return kernels_->kept(ridge_, height, width); }

    void gradient(Address x, Address value, Address grad, Address kept, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->gradient(ridge_, {b, height, width, team(threads)}, floats(x), doubles(value), floats(grad), floats(kept));
    }
    void hvp(Address v, Address kept, Address out, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->hvp(ridge_, {b, height, width, team(threads)}, floats(v), floats(kept), floats(out));
    }
    void param_vjp(Address x, Address v, Address dw, Address dc, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->param_vjp(ridge_, {b, height, width, team(threads)}, floats(x), floats(v), doubles(dw), doubles(dc));
    }

  private:
    static float* floats(Address a) { return reinterpret_cast<float*>(a); }
    static double* doubles(Address a) { return reinterpret_cast<double*>(a); }

    const dr::RidgeKernels* kernels_;
    std::vector<float> w_, c_, s_;
    dr::Ridge ridge_;
};

// Smoothed total variation.
class Tv {
  public:
    Tv(int channels, double eps, const std::string& isa) : kernels_(&table(isa, DR_TABLES(tv))), tv_{channels, eps} {
        if (channels < 1 || !(eps > 0)) throw std::invalid_argument("at least one channel, and eps > 0");
    }

    // Floats that `gradient` keeps of each image for `hvp` if it is given memory for them.
    std::size_t kept(int height, int width) const { return kernels_->kept(tv_, height, width); }

    void gradient(Address x, Address value, Address grad, Address kept, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->gradient(tv_, {b, height, width, team(threads)}, floats(x), reinterpret_cast<double*>(value), floats(grad),
                           floats(kept));
    }
    void hvp(Address v, Address kept, Address out, int b, int height, int width, int threads) const {
        py::gil_scoped_release free;
        kernels_->hvp(tv_, {b, height, width, team(threads)}, floats(v), floats(kept), floats(out));
    }

  private:
    static float* floats(Address a) { return reinterpret_cast<float*>(a); }

    const dr::TvKernels* kernels_;
    dr::Tv tv_;
};

// The solvers' vector work.
class Vectors {
  public:
    explicit Vectors(const std::string& isa) : kernels_(&table(isa, DR_TABLES(vectors))) {}

    void dot(int count, std::size_t n, int threads, Address a, Address b, Address out) const {
        py::gil_scoped_release free;
        kernels_->dot(count, n, team(threads), in(a), in(b), sums(out));
    }
    void add(int count, std::size_t n, int threads, Address x, Address s, Address p, Address rows, Address out,
             Address size) const {
        py::gil_scoped_release free;
        kernels_->add(count, n, team(threads), in(x), in(s), in(p), reinterpret_cast<const std::uint8_t*>(rows), floats(out),
                      sums(size));
    }
    void secant(int count, std::size_t n, int threads, Address idx, Address candidate, Address candidate_g, Address x,
                Address g, Address out) const {
        py::gil_scoped_release free;
        kernels_->secant({count, team(threads), n, places(idx)}, in(candidate), in(candidate_g), in(x), in(g), sums(out));
    }
    void remember(int count, std::size_t n, int threads, Address idx, int memory, const std::vector<Address>& state,
                  Address slot, Address fresh, Address x, Address f, Address gram, Address rhs) const {
        py::gil_scoped_release free;
        kernels_->remember({count, team(threads), n, places(idx)}, differences(memory, state), places(slot),
                           reinterpret_cast<const std::uint8_t*>(fresh), in(x), in(f), sums(gram), sums(rhs));
    }
    void combine(int count, std::size_t n, int threads, Address idx, int memory, const std::vector<Address>& state,
                 Address c, Address limit, Address x, Address f, Address out) const {
        py::gil_scoped_release free;
        kernels_->combine({count, team(threads), n, places(idx)}, differences(memory, state), in(c),
                          reinterpret_cast<const double*>(limit), in(x), in(f), floats(out));
    }

  private:
    static const float* in(Address a) { return reinterpret_cast<const float*>(a); }
    static float* floats(Address a) { return reinterpret_cast<float*>(a); }
    static double* sums(Address a) { return reinterpret_cast<double*>(a); }
    static const std::int64_t* places(Address a) { return reinterpret_cast<const std::int64_t*>(a); }
    static dr::Differences differences(int memory, const std::vector<Address>& state) {
        return {memory, floats(state.at(0)), floats(state.at(1)), floats(state.at(2)), floats(state.at(3))};
    }

    const dr::VectorKernels* kernels_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels for the CPU.";
#ifdef __unix__
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
    m.def("instruction_sets", &instruction_sets);
    m.def("multiply_adds", [](const std::string& isa, int threads, int scale) {
        py::gil_scoped_release free;
        float sink = 0.0f;
        return kernels(isa).multiply_adds(team(threads), 2000000L * scale, &sink);
    });
    py::class_<ConvChain>(m, "ConvChain")
        .def(py::init<const std::vector<Address>&, const std::vector<Address>&, const std::vector<Address>&,
                      const std::vector<Address>&, int, int, float, float, float, float, bool, const std::string&>())
        .def("current", &ConvChain::current)
        .def_property_readonly("isa", &ConvChain::isa)
        .def("kept", &ConvChain::kept)
        .def("gradient", &ConvChain::gradient)
        .def("hvp", &ConvChain::hvp)
        .def("param_vjp", &ConvChain::param_vjp);
    py::class_<Srm>(m, "Srm")
        .def(py::init<int, int, int, int, int, int, Address, Address, Address, Address, Address, const std::string&>())
        .def("apply", &Srm::apply);
    py::class_<Ridge>(m, "Ridge")
        .def(py::init<int, int, int, float, Address, Address, Address, const std::string&>())
        .def("kept", &Ridge::kept)
        .def("gradient", &Ridge::gradient)
        .def("hvp", &Ridge::hvp)
        .def("param_vjp", &Ridge::param_vjp);
    py::class_<Tv>(m, "Tv")
        .def(py::init<int, double, const std::string&>())
        .def("kept", &Tv::kept)
        .def("gradient", &Tv::gradient)
        .def("hvp", &Tv::hvp);
    py::class_<Vectors>(m, "Vectors")
        .def(py::init<const std::string&>())
        .def("dot", &Vectors::dot)
        .def("add", &Vectors::add)
        .def("secant", &Vectors::secant)
        .def("remember", &Vectors::remember)
        .def("combine", &Vectors::combine);
}
