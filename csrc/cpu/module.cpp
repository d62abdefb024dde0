// The Python module deepreg_fast._cpu. Tensors are passed as Python objects, so one build serves every release of PyTorch;
// dtype, device, layout and size of each are checked before its memory is touched (tensor.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_chain.h"
#include "conv_chain_pack.h"
#include "dispatch.h"
#include "ridge.h"
#include "srm.h"
#include "srm_tables.h"
#include "subnormals.h"
#include "tensor.h"
#include "tv.h"
#include "vectors.h"

namespace py = pybind11;

namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto* k : dr::supported_kernels()) names.emplace_back(k->name);
    return names;
}

// A forked child has none of its parent's OpenMP threads and would wait for them forever, so it uses one thread.
bool forked = false;

// Number of threads to use: at most the processors available to this process, because waiting threads spin.
int team(int requested) {
#ifdef _OPENMP
    return forked ? 1 : std::max(1, std::min(requested, omp_get_num_procs()));
#else
    return 1;
#endif
}

using Tensors = std::vector<py::object>;

struct Batch : dr::Batch {
    int channels;
    std::size_t numbers() const { return static_cast<std::size_t>(count) * channels * height * width; }
};
Batch batch(int b, int height, int width, int threads, int channels = 1) {
    if (b < 0 || height < 1 || width < 1) throw std::invalid_argument("a batch of images with pixels");
    return {{b, height, width, team(threads)}, channels};
}

// Run a kernel without Python's lock and with subnormals.
template <class F>
void run(F work) {
    py::gil_scoped_release free;
    const dr::Subnormals all;
    work();
}

// Value and gradient of an energy, which saves `floats` floats for the products if `saved` is not None.
template <class Kernels, class Energy>
void run_gradient(const Kernels& kernels, const Energy& energy, const Batch& batch, std::size_t floats, py::handle x,
                  py::handle value, py::handle grad, py::handle saved) {
    const float* in = dr::memory<float>(x, batch.numbers(), "x");
    double* values = dr::memory<double>(value, batch.count, "value");
    float* out = dr::memory<float>(grad, batch.numbers(), "grad");
    float* memory = dr::memory_or_null<float>(saved, floats, "the memory", dr::Extent::at_least);
    run([&] { kernels.gradient(energy, batch, in, values, out, memory); });
}
// Hessian-vector product of an energy, from what the gradient saved.
template <class Kernels, class Energy>
void run_hvp(const Kernels& kernels, const Energy& energy, const Batch& batch, std::size_t floats, py::handle v,
             py::handle saved, py::handle out) {
    const float* along = dr::memory<float>(v, batch.numbers(), "v");
    const float* memory = dr::memory<float>(saved, floats, "the memory", dr::Extent::at_least);
    float* product = dr::memory<float>(out, batch.numbers(), "out");
    run([&] { kernels.hvp(energy, batch, along, memory, product); });
}

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

// A structurally random matrix with copies of its buffers.
class Srm {
  public:
    // `rows` and `perm` are int64, `signs` and the Hadamard matrices of the two sizes int8; None if absent.
    Srm(int transform, int channels, int height, int width, int block, int measurements, py::handle rows, py::handle signs,
        py::handle perm, py::handle column_matrix, py::handle row_matrix, const std::string& isa)
        : kernels_(&dr::dispatch(isa, DR_TABLES(srm))) {
        if (transform < 0 || transform > 2 || channels < 1 || height < 1 || width < 1 || measurements < 1)
            throw std::invalid_argument("one of three transforms, of images with pixels");
        s_.transform = static_cast<dr::Transform>(transform);
        s_.channels = channels, s_.height = height, s_.width = width, s_.block = block, s_.measurements = measurements;
        const std::size_t d = numbers();
        if (s_.transform == dr::Transform::walsh && (block < 1 || block & (block - 1) || d % block))
            throw std::invalid_argument("a block of a power of two that divides the number of pixels");
        const auto* r = dr::indices(rows, measurements, d, "rows");
        rows_.assign(r, r + measurements);
        s_.kept = dr::pack_selection(r, measurements, d);
        if (const auto* p = dr::memory_or_null<std::int8_t>(signs, d, "signs")) {
            signs_.assign(p, p + d);
            for (std::size_t i = 0; i < d; ++i)
                if (p[i] != 1 && p[i] != -1) throw std::invalid_argument("signs must be 1 or -1");
            s_.signs.assign(p, p + d);
            if (s_.transform == dr::Transform::walsh) s_.sign_bits = dr::pack_signs(p, d);
        }
        if (!perm.is_none()) {
            const auto* p = dr::indices(perm, d, d, "perm");
            perm_.assign(p, p + d);
            std::vector<bool> seen(d, false);
            for (std::size_t i = 0; i < d; ++i) {
                if (seen[p[i]]) throw std::invalid_argument("perm must hold each place once");
                seen[p[i]] = true;
            }
            s_.perm.assign(p, p + d);
        }
        if (s_.transform == dr::Transform::dct) {
            s_.along_columns = dr::dct_lines(height);
            s_.along_rows = dr::dct_lines(width);
        } else if (s_.transform == dr::Transform::hadamard) {
            const auto square = [](int n) { return static_cast<std::size_t>(n) * n; };
            s_.along_columns = dr::hadamard_lines(height, dr::memory<std::int8_t>(column_matrix, square(height), "a matrix"));
            s_.along_rows = dr::hadamard_lines(width, dr::memory<std::int8_t>(row_matrix, square(width), "a matrix"));
        }
    }

    // Whether these buffers equal those of the constructor.
    bool current(py::handle rows, py::handle signs, py::handle perm) const {
        return same(rows, rows_) && same(signs, signs_) && same(perm, perm_);
    }

    // `x`, `y` and `weight` are None if the product does not use them; without `weight`, `one` applies to every image.
    void apply(int product, int count, int threads, py::handle x, py::handle y, py::handle weight, float one,
               py::handle out) const {
        const bool by_x = product != 1, by_y = product == 1 || product == 3;
        if (product < 0 || product > 3 || count < 0 || x.is_none() == by_x || y.is_none() == by_y)
            throw std::invalid_argument("one of four products, with its vectors");
        const std::size_t pixels = count * numbers(), measured = static_cast<std::size_t>(count) * s_.measurements;
        const auto* image = dr::memory_or_null<float>(x, pixels, "x");
        const auto* data = dr::memory_or_null<float>(y, measured, "y");
        auto* found = dr::memory<float>(out, product == 0 ? measured : pixels, "out");
        const float* weights = dr::memory_or_null<float>(weight, count, "weight");
        std::vector<float> all;
        if (!weights) {
            all.assign(count, one);
            weights = all.data();
        }
        run([&] { kernels_->apply(s_, static_cast<dr::Product>(product), count, team(threads), image, data, weights, found); });
    }

  private:
    std::size_t numbers() const { return static_cast<std::size_t>(s_.channels) * s_.height * s_.width; }
    template <class T>
    static bool same(py::handle tensor, const std::vector<T>& values) {
        if (tensor.is_none() || values.empty()) return tensor.is_none() && values.empty();
        return std::memcmp(dr::memory<T>(tensor, values.size(), "a buffer"), values.data(), values.size() * sizeof(T)) == 0;
    }

    const dr::SrmKernels* kernels_;
    dr::Srm s_;
    std::vector<std::int64_t> rows_, perm_;
    std::vector<std::int8_t> signs_;
};

// A ridge energy with copies of its parameters.
class Ridge {
  public:
    // Floats: filters [filters, side, side], coefficients [filters, steps], scales [steps].
    Ridge(int filters, int side, int steps, float center, py::handle w, py::handle c, py::handle s, const std::string& isa)
        : kernels_(&dr::dispatch(isa, DR_TABLES(ridge))) {
        if (filters < 1 || steps < 1 || side < 3 || side > dr::MAX_SIDE || side % 2 == 0)
            throw std::invalid_argument("an odd side from 3 to 15, and at least one filter and one step");
        const std::size_t n = filters;
        take(w_, w, n * side * side);
        take(c_, c, n * steps);
        take(s_, s, steps);
        ridge_ = {filters, side, steps, center, w_.data(), c_.data(), s_.data()};
    }
    Ridge(const Ridge&) = delete;
    Ridge& operator=(const Ridge&) = delete;

    // Floats per image that `gradient` saves for `hvp` if `saved` is passed.
    std::size_t saved_floats(int height, int width) const { return kernels_->saved_floats(ridge_, height, width); }

    void gradient(py::handle x, py::handle value, py::handle grad, py::handle saved, int b, int height, int width,
                  int threads) const {
        const Batch size = batch(b, height, width, threads);
        run_gradient(*kernels_, ridge_, size, b * saved_floats(height, width), x, value, grad, saved);
    }
    void hvp(py::handle v, py::handle saved, py::handle out, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads);
        run_hvp(*kernels_, ridge_, size, b * saved_floats(height, width), v, saved, out);
    }
    void param_vjp(py::handle x, py::handle v, py::handle dw, py::handle dc, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads);
        const float *in = dr::memory<float>(x, size.numbers(), "x"), *along = dr::memory<float>(v, size.numbers(), "v");
        double *by_w = dr::memory<double>(dw, w_.size(), "dw"), *by_c = dr::memory<double>(dc, c_.size(), "dc");
        run([&] { kernels_->param_vjp(ridge_, size, in, along, by_w, by_c); });
    }

  private:
    static void take(std::vector<float>& to, py::handle tensor, std::size_t n) {
        const float* p = dr::memory<float>(tensor, n, "a parameter");
        to.assign(p, p + n);
    }

    const dr::RidgeKernels* kernels_;
    std::vector<float> w_, c_, s_;
    dr::Ridge ridge_;
};

// Smoothed total variation.
class Tv {
  public:
    Tv(int channels, double eps, const std::string& isa) : kernels_(&dr::dispatch(isa, DR_TABLES(tv))), tv_{channels, eps} {
        if (channels < 1 || !(eps > 0)) throw std::invalid_argument("at least one channel, and eps > 0");
    }

    // Floats per image that `gradient` saves for `hvp` if `saved` is passed.
    std::size_t saved_floats(int height, int width) const { return kernels_->saved_floats(tv_, height, width); }

    void gradient(py::handle x, py::handle value, py::handle grad, py::handle saved, int b, int height, int width,
                  int threads) const {
        const Batch size = batch(b, height, width, threads, tv_.channels);
        run_gradient(*kernels_, tv_, size, b * saved_floats(height, width), x, value, grad, saved);
    }
    void hvp(py::handle v, py::handle saved, py::handle out, int b, int height, int width, int threads) const {
        const Batch size = batch(b, height, width, threads, tv_.channels);
        run_hvp(*kernels_, tv_, size, b * saved_floats(height, width), v, saved, out);
    }

  private:
    const dr::TvKernels* kernels_;
    dr::Tv tv_;
};

// The solvers' vector operations.
class Vectors {
  public:
    explicit Vectors(const std::string& isa) : kernels_(&dr::dispatch(isa, DR_TABLES(vectors))) {}

    // `n` numbers of each of `count` images.
    void dot(int count, std::size_t n, int threads, py::handle a, py::handle b, py::handle out) const {
        const std::size_t all = total(count, n);
        run([&, a = in(a, all, "a"), b = in(b, all, "b"), sums = dr::memory<double>(out, count, "out")] {
            kernels_->dot(count, n, team(threads), a, b, sums);
        });
    }
    void add(int count, std::size_t n, int threads, py::handle x, py::handle s, py::handle p, py::handle rows, py::handle out,
             py::handle size) const {
        const std::size_t all = total(count, n);
        run([&, x = in(x, all, "x"), s = in(s, count, "s"), p = in(p, all, "p"), rows = flags(rows, count, "rows"),
             out = dr::memory<float>(out, all, "out"), size = dr::memory<double>(size, count, "size")] {
            kernels_->add(count, n, team(threads), x, s, p, rows, out, size);
        });
    }
    // `idx` are indices into the `batch` images of x and g.
    void secant(int count, std::size_t n, int threads, py::handle idx, int batch, py::handle candidate, py::handle candidate_g,
                py::handle x, py::handle g, py::handle out) const {
        const std::size_t all = total(count, n), of_batch = total(batch, n);
        const dr::ActiveImages active{count, team(threads), n, dr::indices(idx, count, batch, "idx")};
        run([&, c = in(candidate, all, "candidate"), cg = in(candidate_g, all, "candidate_g"), x = in(x, of_batch, "x"),
             g = in(g, of_batch, "g"), sums = dr::memory<double>(out, 4 * static_cast<std::size_t>(count), "out")] {
            kernels_->secant(active, c, cg, x, g, sums);
        });
    }
    // `state` of `batch` images: dx, df [batch, memory, n], x, f [batch, n].
    void remember(int count, std::size_t n, int threads, py::handle idx, int batch, int memory, const Tensors& state,
                  py::handle slot, py::handle fresh, py::handle x, py::handle f, py::handle gram, py::handle rhs) const {
        const std::size_t all = total(count, n), products = static_cast<std::size_t>(count) * memory;
        const dr::ActiveImages active{count, team(threads), n, dr::indices(idx, count, batch, "idx")};
        const dr::AndersonHistory history = anderson_history(batch, n, memory, state);
        run([&, slot = dr::indices(slot, count, memory, "slot"), fresh = flags(fresh, count, "fresh"), x = in(x, all, "x"),
             f = in(f, all, "f"), gram = dr::memory<double>(gram, products, "gram"),
             rhs = dr::memory<double>(rhs, products, "rhs")] {
            kernels_->remember(active, history, slot, fresh, x, f, gram, rhs);
        });
    }
    void combine(int count, std::size_t n, int threads, py::handle idx, int batch, int memory, const Tensors& state,
                 py::handle c, py::handle limit, py::handle x, py::handle f, py::handle out) const {
        const std::size_t all = total(count, n), products = static_cast<std::size_t>(count) * memory;
        const dr::ActiveImages active{count, team(threads), n, dr::indices(idx, count, batch, "idx")};
        const dr::AndersonHistory history = anderson_history(batch, n, memory, state);
        run([&, c = in(c, products, "c"), limit = dr::memory<double>(limit, count, "limit"), x = in(x, all, "x"),
             f = in(f, all, "f"), out = dr::memory<float>(out, all, "out")] {
            kernels_->combine(active, history, c, limit, x, f, out);
        });
    }

  private:
    static std::size_t total(int count, std::size_t n) {
        if (count < 0) throw std::invalid_argument("a number of images");
        return count * n;
    }
    static const float* in(py::handle t, std::size_t n, const char* name) { return dr::memory<float>(t, n, name); }
    static const std::uint8_t* flags(py::handle t, std::size_t n, const char* name) {
        return reinterpret_cast<const std::uint8_t*>(dr::memory<bool>(t, n, name));
    }
    static dr::AndersonHistory anderson_history(int batch, std::size_t n, int memory, const Tensors& state) {
        if (memory < 1 || state.size() != 4) throw std::invalid_argument("dx, df, x and f");
        const std::size_t all = total(batch, n);
        return {memory, dr::memory<float>(state[0], all * memory, "dx"), dr::memory<float>(state[1], all * memory, "df"),
                dr::memory<float>(state[2], all, "x of all"), dr::memory<float>(state[3], all, "f of all")};
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
        return dr::kernels(isa).multiply_adds(team(threads), 2000000L * scale, &sink);
    });
    py::class_<ConvChain>(m, "ConvChain")
        .def(py::init<const Tensors&, const Tensors&, const Tensors&, const Tensors&, int, int, float, float, float, float,
                      bool, const std::string&>())
        .def("current", &ConvChain::current)
        .def_property_readonly("isa", &ConvChain::isa)
        .def("saved_floats", &ConvChain::saved_floats)
        .def("gradient", &ConvChain::gradient)
        .def("hvp", &ConvChain::hvp)
        .def("param_vjp", &ConvChain::param_vjp);
    py::class_<Srm>(m, "Srm")
        .def(py::init<int, int, int, int, int, int, py::handle, py::handle, py::handle, py::handle, py::handle,
                      const std::string&>())
        .def("current", &Srm::current)
        .def("apply", &Srm::apply);
    py::class_<Ridge>(m, "Ridge")
        .def(py::init<int, int, int, float, py::handle, py::handle, py::handle, const std::string&>())
        .def("saved_floats", &Ridge::saved_floats)
        .def("gradient", &Ridge::gradient)
        .def("hvp", &Ridge::hvp)
        .def("param_vjp", &Ridge::param_vjp);
    py::class_<Tv>(m, "Tv")
        .def(py::init<int, double, const std::string&>())
        .def("saved_floats", &Tv::saved_floats)
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
