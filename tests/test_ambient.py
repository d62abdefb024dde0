"""No answer depends on what a program has switched in torch for all that follows (`deepreg_fast/ambient.py`)."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import deepreg_fast as dr
from deepreg_fast.backend.cpu.extension import extension
from deepreg_fast.errors import InputError
from deepreg_fast.evaluation.compare import Method, evaluate
from deepreg_fast.inverse.adjoint import adjoint_named
from deepreg_fast.regularizers.base import Regularizer

from .helpers import grad_s, images, random_red

ROOT = Path(__file__).parents[1]
needs_cpu = pytest.mark.skipif(dr.backends()["cpu"] is not None, reason="the C++ extension is not built")
BACKENDS = ["reference", *(["cpu"] if dr.backends()["cpu"] is None else [])]

# What makes tensors out of nothing, and layers with parameters.
MAKERS = set(
    (
        "empty zeros ones full tensor as_tensor asarray scalar_tensor arange range eye linspace logspace rand randn "
        "randint randperm normal empty_strided tril_indices triu_indices hann_window Tensor FloatTensor DoubleTensor "
        "Conv2d ConvTranspose2d Linear LayerNorm GroupNorm BatchNorm2d Embedding"
    ).split()
)


def unnamed(text: str) -> list[str]:
    """The calls `torch.x(...)` and `nn.x(...)` that make a tensor without naming its dtype and its device."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in MAKERS:
            continue
        named = {k.arg for k in node.keywords}
        # `**new` carries both.
        if ast.unparse(node.func.value) in ("torch", "nn", "torch.nn") and not (
            {"dtype", "device"} <= named or None in named
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_every_buffer_names_its_dtype_and_device() -> None:
    paths = sorted([*ROOT.glob("deepreg_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])
    assert len(paths) > 100
    assert {str(p): calls for p in paths if (calls := unnamed(p.read_text(encoding="utf-8")))} == {}


def test_what_the_reading_of_sources_sees() -> None:
    assert len(unnamed("torch.empty(3)\ntorch.zeros(3, dtype=d)\nnn.Conv2d(1, 1, 3)\ntorch.arange(3, device=d)")) == 4
    assert (
        unnamed("torch.empty(3, dtype=d, device=e)\nx.new_empty(3)\ntorch.empty_like(x)\ntorch.zeros(3, **new)") == []
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


STATES: dict[str, Callable[[], object]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "flushed": flushed,
}


class Blur(nn.Module):
    """A convolution of the user's, with an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            for i, p in enumerate(self.conv.parameters()):
                p.copy_(images(*p.shape, seed=i, dtype=torch.float32) - 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(self.conv(x)).square().flatten(1).sum(1)


MODULE = Blur()
REGULARIZERS: dict[str, Callable[[], Regularizer]] = {
    "red": lambda: random_red(double=False),
    "pixel": lambda: random_red(double=False, norm="pixel"),
    "image": lambda: random_red(double=False, norm="image", head="norm"),
    "after": lambda: random_red(double=False, norm="pixel", norm_place="after"),
    "ridge": lambda: dr.Ridge(3, 3, 2, False),
    "icnn": lambda: dr.ICNN(3, 2),
    "tv": dr.TV,
    "sum": lambda: dr.Sum([random_red(double=False), dr.Ridge(2, 3)]),
    "scaled": lambda: dr.Ridge(2, 3).rescaled(1.5),
    "module": lambda: dr.EnergyRegularizer(MODULE),
}
X = images(2, 1, 8, 8, dtype=torch.float32)
V = images(2, 1, 8, 8, seed=1, dtype=torch.float32) - 0.5


def derivatives(reg: Regularizer) -> dict[str, torch.Tensor]:
    """All that a regularizer answers."""
    value, grad = reg.value_and_grad(X)
    lin = reg.linearize(X)
    found = {"value": value, "grad": grad, "again": lin.grad, "hvp": lin.hvp(V), "grad_s": grad_s(reg, X)}
    ours = dr.ops.value_and_grad(reg, X)
    return found | {"op": ours[0], "op_grad": ours[1], "energy": dr.ops.energy(reg, X)} | lin.param_vjp(V)


def products() -> dict[str, torch.Tensor]:
    """Operators, with images so dark that products are subnormal."""
    found = {}
    for transform in ("dct", "hadamard", "walsh"):
        for dtype in (torch.float32, torch.float64):
            A = dr.SRM((1, 8, 8), np.float32(0.4), transform=transform, randomizer="both")
            for scale in (1.0, 1e-39):
                x = X.to(dtype) * scale
                y = A.A(x)
                more = {"y": y, "back": A.A_adjoint(y), "normal": A.normal(x), "prox": A.prox_l2(x, y, 2.0)}
                more |= {"inverse": A.shifted_inverse(x, 0.5), "dagger": A.A_dagger(y)}
                found |= {f"{transform} {dtype} {scale} {k}": t for k, t in more.items()}
    return found


class Dense(dr.LinearOperator):
    """An operator of the user's, by a product that autocast would round."""

    def __init__(self) -> None:
        super().__init__((1, 8, 8), 20)
        self.register_buffer("matrix", images(20, 64, seed=3, dtype=torch.float32) / 8)
        self.matrix: torch.Tensor

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.matrix.T

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return (y @ self.matrix).reshape(-1, *self.image_shape)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        return self.A_adjoint(y)


DENSE = Dense()
MATRIX = torch.eye(64) + DENSE.matrix.T @ DENSE.matrix


def solves() -> dict[str, torch.Tensor]:
    """Recoveries, their derivatives, linear systems and spectra."""
    reg, A = random_red(double=False, alpha=1.0), dr.SRM((1, 8, 8), 0.4)
    y = A.A(X)
    found = {}
    for acceleration in ("none", "fista", "anderson"):
        sol = dr.recover(y, A, reg, 1e-2, options=dr.PGDOptions(6, acceleration=acceleration, record=True))
        found |= {f"{acceleration} {k}": getattr(sol, k) for k in ("x", "status", "residual", "tau")}
    found["dense"] = dr.recover(DENSE.A(X), DENSE, MODULE, 1e-2, options=dr.PGDOptions(3)).x
    for method in ("cg", "minres", "jfb", "unrolled"):
        options = adjoint_named(method, max_iterations=3, steps=3)
        h = dr.hypergradient(X, y, A, reg, mu=1e-2, options=dr.PGDOptions(5), adjoint=options)
        found |= {f"{method} {k}": g for k, g in h.theta.items()} | {f"{method} mu": h.log_mu, f"{method} loss": h.loss}
    for solve in (dr.cg, dr.minres):
        found[solve.__name__] = solve(lambda v: (v.flatten(1) @ MATRIX).reshape(v.shape), V).x
    low, high = dr.spectrum(reg, X, steps=4)
    point = dr.beta_hat(reg, X, 0.1 * V)
    found |= {"low": low, "high": high, "beta": point.beta, "delta": point.grad_delta()}
    large, B = X.repeat(1, 1, 2, 2), dr.SRM((1, 16, 16))
    scores = evaluate([Method("red", reg, 1e-2, dr.PGDOptions(3))], large, B.A(large), B)
    found["psnr"] = torch.from_numpy(np.array(scores["red"]["psnr"] + scores["red"]["ssim"]))
    found["noise"] = dr.add_noise(y, 0.1, 3)
    return found


def weights() -> dict[str, torch.Tensor]:
    """What is drawn at first, and what a file holds."""
    shipped, _ = dr.load("cs5-beta10")
    built = {"shipped": shipped, **{name: make() for name, make in REGULARIZERS.items()}}
    return {f"{n}.{k}": t for n, reg in built.items() for k, t in reg.state_dict().items()}


def everything(backend: str) -> dict[str, torch.Tensor]:
    """All of the above, by the backend where it serves."""
    found = {}
    with dr.use_backend(backend if backend == "reference" else "auto"):
        for name, make in REGULARIZERS.items():
            found |= {f"{name} {k}": t for k, t in derivatives(make()).items()}
        found |= products() | solves()
    return found | weights()


@pytest.fixture(name="plain", scope="module")
def _plain() -> dict[str, dict[str, torch.Tensor]]:
    return {backend: everything(backend) for backend in BACKENDS}


def alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """The names of the answers that are others."""
    assert found.keys() == wanted.keys()
    return [
        k
        for k, w in wanted.items()
        if found[k].dtype != w.dtype or found[k].device != w.device or not torch.equal(found[k].detach(), w.detach())
    ]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits(state: str, backend: str, plain: dict[str, dict[str, torch.Tensor]]) -> None:
    with STATES[state]():  # type: ignore[attr-defined]
        found = everything(backend)
    other = alike(found, plain[backend])
    if state == "flushed":
        # torch itself flushes between the kernels and in its own arithmetic.
        other = [k for k in other if "1e-39" not in k]
    assert other == []


def train(folder: Path, out: Path, method: str) -> dict[str, torch.Tensor]:
    """Two steps and a validation: the weights, and what the run says of itself."""
    common = {"data": str(folder), "out": str(out), "crop": 12, "batch": 2, "steps": 2, "channels": 2, "warmup": 0}
    common |= {"validation": 2, "validation_crop": 12, "validate_every": 2, "threads": 1}
    if method == "bilevel":
        config = dr.BilevelConfig(**common, inner_iterations=3, adjoint_iterations=2, beta=0.1, xi=0.3, sigma=0.01)  # type: ignore[arg-type]
        trainer: Any = dr.BilevelTrainer(config, progress=False)
    else:
        kinds = {"denoiser": dr.DenoiserTrainer, "step": dr.GradientStepTrainer, "adversarial": dr.AdversarialTrainer}
        trainer = kinds[method](dr.BaselineConfig(**common), progress=False)  # type: ignore[arg-type]
    trainer.fit()
    with safe_open(out / "last.safetensors", framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


@pytest.mark.parametrize("method", ["bilevel", "denoiser", "step", "adversarial"])
def test_a_training_takes_the_same_steps(method: str, folder: Path, tmp_path: Path) -> None:
    wanted = train(folder, tmp_path / "plain", method)
    seeds = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with (
        default_dtype(torch.float64),
        torch.device("meta"),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
    ):
        found = train(folder, tmp_path / "switched", method)
    assert alike(found, wanted) == []
    assert torch.equal(seeds[0], torch.get_rng_state()) and random.getstate() == seeds[2]
    assert np.array_equal(seeds[1], np.random.get_state()[1])  # noqa: NPY002


def test_nothing_moves_the_global_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    seeds = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    everything("auto")
    dr.DenoiserField(2)
    dr.save(random_red(), tmp_path / "w.safetensors")
    dr.load(tmp_path / "w.safetensors")
    assert torch.equal(seeds[0], torch.get_rng_state()) and random.getstate() == seeds[2]
    assert np.array_equal(seeds[1], np.random.get_state()[1])  # noqa: NPY002


def test_results_have_no_graph() -> None:
    """Whatever follows what comes in: the derivative of a recovery is `hypergradient`."""
    reg, A = random_red(double=False, alpha=1.0), dr.SRM((1, 8, 8), 0.4)
    y, x = A.A(X).requires_grad_(), X.clone().requires_grad_()
    mu, tau = torch.full((2,), 1e-2, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)

    class Own(dr.RED):
        """Answers with a graph."""

        def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x.detach().requires_grad_()
            value = self.energy(x)
            return value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]

    options = dr.PGDOptions(4, acceleration="anderson", record=True)
    for r in (reg, Own(2), dr.TV(), dr.EnergyRegularizer(MODULE)):
        for operator, data in ((A, y), (DENSE, DENSE.A(X).requires_grad_())):
            sol = dr.recover(data, operator, r, mu, x0=x, tau0=tau, options=options)
            assert [k for k, t in vars(sol).items() if isinstance(t, torch.Tensor) and t.requires_grad] == []
            assert not sol.history["residual"].requires_grad
    for method in ("cg", "unrolled"):
        adjoint = adjoint_named(method, max_iterations=2, steps=2)
        h = dr.hypergradient(x, y, A, reg, mu, options=options, adjoint=adjoint)
        assert not any(t.requires_grad for t in (*h.theta.values(), h.log_mu, h.loss, h.solution.x))
    point = dr.beta_hat(reg, x, (0.1 * V).requires_grad_())
    assert not any(t.requires_grad for t in (point.beta, point.grad_delta(), *point.grad_theta(mu).values()))
    assert not any(t.requires_grad for t in (*dr.spectrum(reg, x, 3), *reg.value_and_grad(x), reg.linearize(x).hvp(x)))
    assert not dr.cg(lambda v: v, y).x.requires_grad


def test_a_prox_by_cg_says_that_nothing_follows_it() -> None:
    with pytest.raises(InputError, match="autograd does not follow"):
        DENSE.prox_l2(X.clone().requires_grad_(), DENSE.A(X), 1.0)


@needs_cpu
def test_a_wrong_buffer_is_an_exception() -> None:
    """The binding looks at each tensor before a kernel touches its memory."""
    module, _ = extension()
    assert module is not None
    vectors = module.Vectors("")
    a, out = torch.ones(2, 4), torch.zeros(2, dtype=torch.float64)
    wrong: list[Any] = [a.double(), a[:, :3], torch.ones(4, 2).T, torch.ones(2, 4, device="meta"), a.numpy(), None]
    for bad in wrong:
        for args in ((bad, a, out), (a, bad, out)):
            with pytest.raises((ValueError, AttributeError)):
                vectors.dot(2, 4, 1, *args)
    for bad in (torch.zeros(2), torch.zeros(1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)[::2]):
        with pytest.raises(ValueError, match="out must be a contiguous torch.float64 tensor of 2 numbers"):
            vectors.dot(2, 4, 1, a, a, bad)
    idx, four = torch.tensor([0, 2]), torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(IndexError, match=r"idx must lie in \[0, 2\)"):
        vectors.secant(2, 4, 1, idx, 2, a, a, a, a, four)
    w, s = torch.ones(1, 3, 3), torch.ones(1)
    ridge = module.Ridge(1, 1, 3, 1, 0.5, w, s, s, "")
    x, value = torch.ones(1, 1, 4, 4), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="the memory must be"):
        ridge.gradient(x, value, torch.ones_like(x), torch.ones(3), 1, 4, 4, 1)
    with pytest.raises(ValueError, match="grad must be"):
        ridge.gradient(x, value, torch.ones(15), None, 1, 4, 4, 1)
    rows = torch.arange(3)
    for bad_rows in (rows + 14, rows.flip(0), rows.int(), rows[:2]):
        with pytest.raises((ValueError, IndexError)):
            module.Srm(0, 1, 4, 4, 0, 3, bad_rows, None, None, None, None, "")
    for bad_signs in (torch.zeros(16, dtype=torch.int8), torch.ones(16), torch.ones(15, dtype=torch.int8)):
        with pytest.raises(ValueError, match="signs must be"):
            module.Srm(0, 1, 4, 4, 0, 3, rows, bad_signs, None, None, None, "")


def changed(name: str) -> Callable[[Any], None]:
    def flip(A: Any) -> None:
        A.signs.data[::2] *= -1

    def not_signs(A: Any) -> None:
        A.signs[3] = 2

    def zero(A: Any) -> None:
        A.signs.zero_()

    def as_floats(A: Any) -> None:
        A.signs = A.signs.float()

    def unsorted(A: Any) -> None:
        A.rows = A.rows.flip(0)

    def twice(A: Any) -> None:
        A.rows[1] = A.rows[0]

    def fewer(A: Any) -> None:
        A.rows = A.rows[:-2]

    def no_permutation(A: Any) -> None:
        A.perm[1] = A.perm[0]

    def other_transform(A: Any) -> None:
        A.transform = "hadamard"

    return locals()[name]


@pytest.mark.parametrize(
    "change",
    ["flip", "not_signs", "zero", "as_floats", "unsorted", "twice", "fewer", "no_permutation", "other_transform"],
)
def test_a_changed_srm_is_what_the_definition_computes(change: str) -> None:
    A = dr.SRM((1, 8, 8), 0.4, randomizer="both")
    before = A.A(X)
    changed(change)(A)
    y = A.A(X)
    with dr.use_backend("reference"):
        wanted, back, normal = A.A(X), A._adjoint(y), A.normal(X)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(A._adjoint(y), back)
    torch.testing.assert_close(A.normal(X), normal)
    assert y.shape != before.shape or not torch.allclose(y, before) or change in ("as_floats", "no_permutation")


def test_products_of_a_subclass_are_made_of_its_own() -> None:
    class Twice(dr.SRM):
        gram_scale = 4.0

        def _forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super()._forward(x)

        def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
            return 2.0 * super()._adjoint(y)

    A, plain = Twice((1, 8, 8), 0.4), dr.SRM((1, 8, 8), 0.4)
    torch.testing.assert_close(A.normal(X), 4.0 * plain.normal(X))
    y = A.A(X + 0.1)
    p = A.prox_l2(X, y, 0.5)
    torch.testing.assert_close(p - X + 0.5 * A.A_adjoint(A.A(p) - y), torch.zeros_like(X), rtol=0, atol=1e-5)
