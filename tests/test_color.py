"""Images of several channels: gray regularizers on color and complex images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.backend import active_images, active_mask
from deepreg_fast.errors import InputError
from deepreg_fast.functional.ridge import nested_dct
from deepreg_fast.regularizers import for_channels, from_description
from deepreg_fast.regularizers.luma import opponent, opponent_adjoint

from .helpers import assert_as_exact_as_torch, central, images, moved, normal, random_red, relative
from .test_cpu_backend import _sets
from .test_derivatives import Quartic

GRAY = {
    "red": lambda: random_red(norm="pixel", alpha=0.2),
    "ridge": lambda: dr.Ridge(3, 3, 2, convex=False).double(),
    "tv": lambda: dr.TV(0.1),
    "module": lambda: dr.EnergyRegularizer(Quartic()),
}
WRAPPERS = {
    "per-channel": (dr.PerChannel, 3),
    "luma": (dr.Luma, 3),
    "luma-shared": (lambda reg: dr.Luma(reg, chroma_weight=2.5), 3),
    "luma-two": (lambda reg: dr.Luma(reg, dr.Ridge(2, 3, 1, center=0.0).double(), 0.7), 3),
    "real-imag": (dr.RealImag, 2),
    "magnitude": (lambda reg: dr.Magnitude(reg, 0.2), 2),
}


@pytest.fixture(name="case", params=[(w, g) for w in WRAPPERS for g in GRAY], ids="-".join)
def _case(request: pytest.FixtureRequest) -> tuple[dr.Regularizer, int]:
    wrapper, gray = request.param
    make, channels = WRAPPERS[wrapper]
    return make(GRAY[gray]()), channels


def test_derivatives_agree_with_differences(case: tuple[dr.Regularizer, int]) -> None:
    reg, c = case
    x, v = images(2, c, 7, 6) - (0.3 if c == 2 else 0.0), normal(2, c, 7, 6)
    value, grad = reg.value_and_grad(x)
    with torch.no_grad():
        assert relative(value, reg.energy(x)) <= 1e-14
        slope = central(lambda t: reg.energy(x + t * v))
    assert relative((grad * v).flatten(1).sum(1), slope) <= 1e-6
    lin = reg.linearize(x)
    assert relative(lin.value, value) <= 1e-13 and relative(lin.grad, grad) <= 1e-13 and torch.equal(lin.x, x)
    assert relative(lin.hvp(v), central(lambda t: reg.value_and_grad(x + t * v)[1])) <= 1e-6
    product = lin.param_vjp(v)
    direction = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(reg.named_parameters())}
    assert set(product) == set(direction)
    if direction:
        found = torch.as_tensor(sum((product[k] * direction[k]).sum() for k in product))
        wanted = central(lambda t: moved(reg, direction, t, lambda: (reg.value_and_grad(x)[1] * v).sum()))
        assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("gray", ["red", "ridge", "tv"])
def test_each_channel_has_the_bits_of_the_gray_regularizer(gray: str) -> None:
    reg = GRAY[gray]().float()
    x, v = images(2, 3, 13, 9, dtype=torch.float32), normal(2, 3, 13, 9).float()
    whole = dr.PerChannel(reg)
    value, grad = whole.value_and_grad(x)
    lin, parts = whole.linearize(x), [reg.linearize(x[:, c : c + 1]) for c in range(3)]
    assert torch.equal(value, parts[0].value + parts[1].value + parts[2].value)
    assert torch.equal(grad, torch.cat([p.grad for p in parts], 1))
    assert torch.equal(lin.hvp(v), torch.cat([p.hvp(v[:, c : c + 1]) for c, p in enumerate(parts)], 1))
    assert whole.backend_for(x).name == reg.backend_for(x[:, :1]).name


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_neighbors_change_no_bit(wrapper: str) -> None:
    make, c = WRAPPERS[wrapper]
    reg = make(GRAY["red"]()).float()
    x, v = images(4, c, 13, 9, dtype=torch.float32), normal(4, c, 13, 9).float()
    assert not reg.backend_for(x).batch_invariant or _answers(reg, x, v) == [
        pair for i in range(4) for pair in _answers(reg, x[i : i + 1], v[i : i + 1])
    ]
    broken = x.clone()
    broken[1, 0, 3, 4] = torch.nan
    assert _answers(reg, broken, v)[2:] == _answers(reg, x, v)[2:]


def _answers(reg: dr.Regularizer, x: torch.Tensor, v: torch.Tensor) -> list[bytes]:
    """Value, gradient and product of each image, as bytes."""
    lin = reg.linearize(x)
    product = lin.hvp(v)
    return [b"".join(t[i].numpy().tobytes() for t in (lin.value, lin.grad, product)) for i in range(len(x))]


def test_the_mask_of_active_images_is_folded() -> None:
    masks = []

    class Watched(dr.TV):
        def energy(self, x: torch.Tensor) -> torch.Tensor:
            masks.append(active_mask(x))
            return super().energy(x)

    x, mask = images(2, 3, 5, 5), torch.tensor([True, False])
    with active_images(mask):
        dr.PerChannel(Watched()).value_and_grad(x)
        dr.Luma(Watched()).value_and_grad(x)
    assert [m.tolist() for m in masks] == [[True] * 3 + [False] * 3, [True, False], [True] * 2 + [False] * 2]
    dr.PerChannel(Watched()).value_and_grad(x)
    assert masks[-1] is None


def test_the_color_transform_is_orthonormal() -> None:
    x, z = images(2, 3, 4, 5), normal(2, 3, 4, 5)
    assert relative(opponent_adjoint(opponent(x)), x) < 1e-15
    assert abs(float((opponent(x) * z).sum() - (x * opponent_adjoint(z)).sum())) < 1e-12
    gray = opponent(images(1, 1, 4, 5).expand(1, 3, 4, 5))
    assert relative(gray[:, :1], 3**0.5 * images(1, 1, 4, 5)) < 1e-15 and float(gray[:, 1:].abs().max()) < 1e-15


def test_wrappers_of_a_gray_image() -> None:
    """On three equal channels, `Luma` and `PerChannel` agree; a real image has its gray energy as `Magnitude`."""
    reg, x = GRAY["ridge"](), images(2, 1, 8, 9)
    color = x.expand(2, 3, 8, 9)
    one, two = dr.PerChannel(reg), dr.Luma(reg)
    assert relative(one.energy(color).detach(), 3 * reg.energy(x).detach()) < 1e-14
    assert relative(two.energy(color).detach(), 3 * reg.energy(x).detach()) < 1e-12
    assert relative(one.value_and_grad(color)[1].sum(1), two.value_and_grad(color)[1].sum(1)) < 1e-12
    complex_image = torch.cat([x, torch.zeros_like(x)], 1)
    assert relative(dr.Magnitude(reg, 1e-9).energy(complex_image).detach(), reg.energy(x).detach()) < 1e-12


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_files_hold_wrappers(wrapper: str, tmp_path: Path) -> None:
    make, c = WRAPPERS[wrapper]
    reg, x = make(GRAY["red"]()), images(2, c, 7, 6)
    dr.save(reg, tmp_path / "w.safetensors", {"mu": 0.1})
    loaded, meta = dr.load(tmp_path / "w.safetensors")
    assert type(loaded) is type(reg) and meta["mu"] == 0.1 and loaded.describe() == reg.describe()
    assert all(map(torch.equal, loaded.value_and_grad(x), reg.value_and_grad(x)))
    assert (loaded.alpha, loaded.center, loaded.image_channels) == (reg.alpha, reg.center, reg.image_channels)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_another_contrast(wrapper: str) -> None:
    make, c = WRAPPERS[wrapper]
    reg, x = make(GRAY["ridge"]()), images(2, c, 7, 6)
    moved_to = reg.center + 1.7 * (x - reg.center)
    with torch.no_grad():
        assert relative(reg.rescaled(1.7).energy(x), reg.energy(moved_to) / 1.7**2) < 1e-12


def test_a_gray_regularizer_is_lifted_to_the_images() -> None:
    ridge, color = dr.Ridge(2, 3), dr.RED(channels=2, image_channels=3)
    assert for_channels(ridge, 1) is ridge and for_channels(color, 3) is color
    assert isinstance(for_channels(ridge, 3), dr.PerChannel)
    tv = dr.TV()
    assert for_channels(tv, 3) is tv
    with pytest.raises(InputError, match="takes images of 3 channels, but they have 1"):
        for_channels(color, 1)
    assert dr.Sum([dr.PerChannel(ridge), color]).image_channels == 3


def test_errors_name_the_remedy() -> None:
    gray, color = dr.RED(channels=2), dr.RED(channels=2, image_channels=3)
    with pytest.raises(InputError, match="takes images .B, 1, H, W.*PerChannel applies it to each channel"):
        gray.value_and_grad(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match="takes images .B, 3, H, W.*convert the images"):
        dr.Luma(gray).value_and_grad(torch.rand(1, 1, 8, 8))
    with pytest.raises(InputError, match="Luma takes a regularizer of gray images, but RED takes images of 3"):
        dr.Luma(color)
    with pytest.raises(InputError, match=r"Sum must take the same images, but take images of \[1, 3\]"):
        dr.Sum([gray, color])
    lin = dr.PerChannel(gray).linearize(torch.rand(2, 3, 8, 8))
    with pytest.raises(InputError, match="must have the shape"):
        lin.hvp(torch.rand(2, 3, 8, 9))


def test_recovery_and_hypergradient_of_color_images() -> None:
    """The hypergradient of a color recovery is the sum of those of its channels."""
    reg, A = random_red(scale=0.05, alpha=1.0), dr.Blur((1, 9, 8), torch.full((3, 3), 1 / 9, dtype=torch.float64))
    B = dr.Blur((3, 9, 8), torch.full((3, 3), 1 / 9, dtype=torch.float64))
    x, options = images(2, 3, 9, 8), dr.PGDOptions(2000, 1e-10, acceleration="anderson")
    chosen = dr.ImplicitAdjoint(dr.CGOptions(500, 1e-10))
    color = dr.hypergradient(x, B.A(x), B, dr.PerChannel(reg), 0.1, options=options, adjoint=chosen)
    planes = x.reshape(6, 1, 9, 8)
    gray = dr.hypergradient(planes, A.A(planes), A, reg, 0.1, options=options, adjoint=chosen)
    assert relative(color.solution.x.reshape(6, 1, 9, 8), gray.solution.x) < 1e-8
    for k, g in gray.theta.items():
        assert relative(color.theta[f"reg.{k}"], g) < 1e-6


def test_a_ridge_of_color_images() -> None:
    """Its derivatives against differences, its description, and its color directions: luma and two chromas."""
    reg, x, v = dr.Ridge(7, 3, 2, convex=False, image_channels=3).double(), images(2, 3, 7, 6), normal(2, 3, 7, 6)
    lin = reg.linearize(x)
    assert relative(lin.hvp(v), central(lambda t: reg.value_and_grad(x + t * v)[1])) <= 1e-6
    direction = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(reg.named_parameters())}
    found = torch.as_tensor(sum((g * direction[k]).sum() for k, g in lin.param_vjp(v).items()))
    wanted = central(lambda t: moved(reg, direction, t, lambda: (reg.value_and_grad(x)[1] * v).sum()))
    assert relative(found, wanted) <= 1e-6
    assert from_description(reg.describe()).image_channels == 3
    assert "image_channels" not in dr.Ridge(7, 3).describe()
    start = nested_dct(6, 3, 3)
    gram = start.reshape(6, -1) @ start.reshape(6, -1).T
    assert torch.allclose(gram, torch.eye(6), atol=1e-6)
    assert float(start[1].sum(0).abs().max()) < 1e-6 and torch.equal(start[0, 0], start[0, 2])
    with pytest.raises(InputError, match="takes images .B, 3, H, W"):
        reg.energy(x[:, :1])


@pytest.mark.skipif(dr.backends()["cpu"] is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", _sets())
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_the_ridge_kernels_take_several_channels(channels: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their error is at most twice that of torch, against float64, and no bit depends on neighbors."""
    monkeypatch.setenv("DEEPREG_FAST_ISA", isa)
    reg = dr.Ridge(9, 5, 3, convex=False, image_channels=channels, seed=channels)
    x, v = images(18, channels, 19, 23, dtype=torch.float32), normal(18, channels, 19, 23).float()

    def answers(x: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        lin = reg.linearize(x)
        parts = [reg.linearize(a).param_vjp(b) for a, b in zip(x.chunk(9), v.chunk(9), strict=True)]
        theta = {k: torch.stack([p[k] for p in parts]) for k in parts[0]}
        return {"value": lin.value[:, None], "grad": lin.grad, "hvp": lin.hvp(v), **theta}

    with dr.use_backend("cpu"):
        ours = answers(x, v)
        assert torch.equal(reg.value_and_grad(x)[1], ours["grad"])
        for i in (0, 5):
            alone = reg.linearize(x[i : i + 1])
            assert torch.equal(alone.grad[0], ours["grad"][i]) and torch.equal(alone.value, ours["value"][i])
            assert torch.equal(alone.hvp(v[i : i + 1])[0], ours["hvp"][i])
    with dr.use_backend("reference"):
        theirs = answers(x, v)
        reg.double()
        exact = answers(x.double(), v.double())
    assert_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectorial_tv(dtype: torch.dtype) -> None:
    """One root per pixel: a rotation of the colors changes nothing, and equal channels count sqrt C times."""
    x, eps = images(2, 3, 8, 9, dtype=dtype), 0.05
    tv = dr.TV(eps)
    down, across = x.diff(dim=2), x.diff(dim=3)
    square = torch.zeros(2, 8, 9, dtype=dtype)
    square[:, :-1] += down.square().sum(1)
    square[..., :-1] += across.square().sum(1)
    accuracy = 1e-5 if dtype == torch.float32 else 1e-13
    value, grad = tv.value_and_grad(x)
    assert relative(value, ((square + eps**2).sqrt() - eps).sum((1, 2))) < accuracy
    turned, turned_grad = tv.value_and_grad(opponent(x))
    assert relative(turned, value) < accuracy and relative(opponent_adjoint(turned_grad), grad) < accuracy
    gray = dr.TV(eps / 3**0.5).value_and_grad(x[:, :1])[0]
    assert relative(tv.value_and_grad(x[:, :1].expand(2, 3, 8, 9))[0], 3**0.5 * gray) < accuracy
    v = normal(2, 3, 8, 9).to(dtype)
    product = opponent_adjoint(tv.linearize(opponent(x)).hvp(opponent(v)))
    assert relative(product, tv.linearize(x).hvp(v)) < 10 * accuracy


def test_vectorial_tv_against_differences() -> None:
    x, v, tv = images(2, 3, 7, 6), normal(2, 3, 7, 6), dr.TV(0.1)
    assert relative(tv.linearize(x).hvp(v), central(lambda t: tv.value_and_grad(x + t * v)[1])) <= 1e-6
    assert tv.backend_for(x.float()[:, [0, 1, 2, 0, 1]]).name == "reference"
