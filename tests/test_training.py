"""Trainings: they learn, survive, resume to the same bits, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast.errors import InputError, TrainingDiverged
from deepreg_fast.regularizers.initialize import grow, grow_ridge
from deepreg_fast.training.guards import MedianClip, ToleranceSchedule
from deepreg_fast.training.lanes import Batch, Lanes
from deepreg_fast.training.samples import load_samples

from .helpers import log_lines, random_red, relative, small_config
from .kill_and_resume import config as killed_config
from .kill_and_resume import kill

HERE = Path(__file__).parent


def test_bilevel_training_learns(folder: Path, tmp_path: Path) -> None:
    trainer = dr.BilevelTrainer(small_config(folder, tmp_path, steps=80, lr=6e-3), progress=False)
    reg = trainer.fit()
    lines = log_lines(tmp_path)
    loss = [d["mse_loss"] for d in lines if "mse_loss" in d]
    assert len(loss) == 80 and np.mean(loss[-10:]) < 0.8 * np.mean(loss[:10])
    score = [d["val_psnr"] for d in lines if "val_psnr" in d]
    assert len(score) == 4 and score[-1] > score[0]
    loaded, meta = dr.load(tmp_path / "weights.safetensors")
    assert meta["method"] == "bilevel" and meta["mu"] == trainer.mu
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reg.parameters(), strict=True))
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_either_backend_trains_alike(folder: Path, tmp_path: Path, norm: str) -> None:
    """From one seed, with tight solves, the first 20 losses agree to rounding.

    The learning rate keeps the loss from jumping: each jump of an unstable training multiplies the rounding by ten, and
    how many there are depends on the processor. test_training_alike.py trains to the end.
    """
    if (missing := dr.backends()["cpu"]) is not None:
        pytest.skip(missing)
    tight = {"inner_iterations": 300, "tolerance_start": 1e-5, "tolerance_end": 1e-5}
    tight |= {"adjoint_iterations": 200, "adjoint_tolerance": 1e-4}
    losses: dict[str, list[float]] = {}
    for name in ("cpu", "reference"):
        out = tmp_path / name
        c = small_config(folder, out, steps=20, channels=8, crop=24, norm=norm, lr=5e-4, **tight)
        with dr.use_backend(name):
            dr.BilevelTrainer(c, progress=False).fit()
        losses[name] = [d["mse_loss"] for d in log_lines(out) if "mse_loss" in d]
    assert len(losses["cpu"]) == 20
    np.testing.assert_allclose(losses["cpu"], losses["reference"], rtol=1e-6)


@pytest.mark.parametrize("adjoint", ["cg", "unrolled"])
def test_psnr_loss_weighs_each_images_hypergradient(folder: Path, tmp_path: Path, adjoint: str) -> None:
    """`d/dp mean_b 10 log10(error_b/d + 1e-5)` is the sum of the images' hypergradients by `10/ln 10` over
    `B (error_b + 1e-5 d)`, and the loss that is told is that mean."""
    tight = {"inner_iterations": 2000, "tolerance_start": 1e-6, "tolerance_end": 1e-6, "adjoint_iterations": 300}
    c = small_config(
        folder, tmp_path, adjoint=adjoint, adjoint_tolerance=1e-6, loss="psnr", beta=0.0, sigma=0.0, **tight
    )
    trainer = dr.BilevelTrainer(c, random_red(double=False, channels=4), progress=False)
    batch = trainer.batch([np.arange(3)])
    x = batch.x
    metrics = trainer.gradients(batch)
    reg, d = trainer.reg.double(), x[0].numel()
    A, x = dr.SRM(trainer.samples.shape, c.ratio, seed=c.operator_seed).double(), x.double()
    theta = {k: torch.zeros_like(p) for k, p in reg.named_parameters()}
    log_mu, losses = 0.0, []
    for image in x.split(1):
        options = dr.PGDOptions(5000, 1e-9, "anderson"), dr.ImplicitAdjoint(dr.CGOptions(1000, 1e-9))
        g = dr.hypergradient(image, A.A(image), A, reg, trainer.mu, options=options[0], adjoint=options[1])
        error = float(g.loss) + 1e-5 * d
        weight = 10.0 / np.log(10.0) / 3 / error
        log_mu += weight * float(g.log_mu)
        theta = {k: v + weight * g.theta[k] for k, v in theta.items()}
        losses.append(10.0 * np.log10(error / d))
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert trainer.log_mu.grad is not None and float(trainer.log_mu.grad) == pytest.approx(log_mu, rel=2e-2)
    found = torch.cat([p.grad.flatten() for p in reg.parameters()])  # type: ignore[union-attr]
    assert relative(found.double(), torch.cat([v.flatten() for v in theta.values()])) < 2e-2


@pytest.mark.parametrize(("adjoint", "steps"), [("minres", 60), ("jfb", 40), ("unrolled", 40)])
def test_other_hypergradients_learn_too(folder: Path, tmp_path: Path, adjoint: str, steps: int) -> None:
    dr.BilevelTrainer(small_config(folder, tmp_path, steps=steps, lr=6e-3, adjoint=adjoint), progress=False).fit()
    loss = [d["mse_loss"] for d in log_lines(tmp_path) if "mse_loss" in d]
    assert np.mean(loss[-10:]) < 0.9 * np.mean(loss[:10])


def test_penalty_holds_the_slope(folder: Path, tmp_path: Path) -> None:
    """With beta below what training would reach freely, `beta_hat` ends lower."""
    ends = []
    for beta in (0.2, 50.0):
        c = small_config(folder, tmp_path / str(beta), steps=60, lr=6e-3, beta=beta, xi=10.0)
        dr.BilevelTrainer(c, progress=False).fit()
        ends.append(np.mean([d["beta_hat"] for d in log_lines(tmp_path / str(beta))[-10:] if "beta_hat" in d]))
    assert ends[0] < 0.6 * ends[1]


@pytest.fixture(name="whole", scope="module")
def _whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that others are cut from, left alone."""
    whole = tmp_path_factory.mktemp("whole")
    dr.BilevelTrainer(killed_config(str(folder), str(whole), 64), progress=False).fit()
    return whole


def _kill(*arguments: object) -> tuple[int, ...]:
    if not torch.cuda.is_available():
        return kill(*arguments)  # type: ignore[arg-type]
    command = [sys.executable, str(HERE / "kill_and_resume.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return tuple(map(int, answer.stdout.split()))


@pytest.mark.parametrize(
    ("budget", "kills"),
    [(64, 2), (0, 2), pytest.param(64, 10, marks=pytest.mark.long), pytest.param(0, 10, marks=pytest.mark.long)],
)
def test_killed_and_resumed_gives_the_same_bits(
    folder: Path, whole: Path, tmp_path: Path, budget: int, kills: int
) -> None:
    """kill -9 at random moments with the warm starts in memory or on disk, a checkpoint at every step."""
    cut = tmp_path / "cut"
    assert _kill(str(folder), str(cut), budget, kills) == (kills, 0)
    a, b = dr.load(whole / "weights.safetensors"), dr.load(cut / "weights.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True))
    assert a[1]["mu"] == b[1]["mu"]
    assert (cut / "store_x.bin").exists() == (budget == 0)
    keys = ("step", "loss", "val_psnr")
    assert [[d.get(k) for k in keys] for d in log_lines(whole)] == [[d.get(k) for k in keys] for d in log_lines(cut)]


def test_what_a_resumed_run_refuses(folder: Path, tmp_path: Path) -> None:
    c = small_config(folder, tmp_path / "run", steps=3)
    dr.BilevelTrainer(c, progress=False).fit()
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    with pytest.raises(dr.errors.CheckpointError, match="holds|has a checkpoint"):
        dr.BilevelTrainer(c, progress=False).fit()
    with pytest.raises(dr.errors.CheckpointError, match="beta=2.0 .now 3.0"):
        dr.BilevelTrainer(replace(c, beta=3.0), progress=False).resume()
    with pytest.raises(dr.errors.CheckpointError, match="bilevel"):
        same = {k: getattr(c, k) for k in dr.BaselineConfig.__dataclass_fields__ if hasattr(c, k)}
        dr.GradientStepTrainer(dr.BaselineConfig(**same), progress=False).resume()
    with pytest.raises(dr.errors.CheckpointError, match="parameters"):
        dr.BilevelTrainer(c, reg=dr.RED(channels=5), progress=False).resume()
    with pytest.raises(dr.errors.CheckpointError, match="there is none"):
        dr.BilevelTrainer(c, progress=False).resume(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    for p in folder.iterdir():
        Image.open(p).transpose(Image.Transpose.ROTATE_90).save(other / p.name)
    with pytest.raises(dr.errors.CheckpointError, match="images it began with"):
        dr.BilevelTrainer(replace(c, data=str(other)), progress=False).resume()
    for damage in (before[: len(before) // 2], b"", b"no checkpoint at all"):
        (tmp_path / "bad.safetensors").write_bytes(damage)
        with pytest.raises(dr.errors.CheckpointError, match="whole checkpoint"):
            dr.BilevelTrainer(c, progress=False).resume(tmp_path / "bad.safetensors")
    with pytest.raises(dr.errors.CheckpointError, match="training checkpoint"):
        dr.BilevelTrainer(c, progress=False).resume(tmp_path / "run" / "weights.safetensors")
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = dr.BilevelTrainer(small_config(folder, tmp_path, steps=20, checkpoint_seconds=0.0), progress=False)
    sound = trainer.gradients

    def poisoned(batch: Batch) -> dict[str, float]:
        metrics = sound(batch)
        if trainer.step_done == 6:
            trainer.params[0].grad = torch.full_like(trainer.params[0], torch.nan)
        return metrics

    monkeypatch.setattr(trainer, "gradients", poisoned)
    with pytest.raises(dr.errors.TrainingDiverged, match=r"step 7.*last\.safetensors"):
        trainer.fit()
    monkeypatch.undo()
    again = dr.BilevelTrainer(small_config(folder, tmp_path, steps=20, checkpoint_seconds=0.0), progress=False)
    again.load_state()
    assert again.step_done == 6
    assert all(bool(torch.isfinite(p).all()) for p in again.params)
    assert all(bool(torch.isfinite(p).all()) for p in again.resume().parameters())


def test_an_absurd_learning_rate_does_not_leave_nan_behind(folder: Path, tmp_path: Path) -> None:
    trainer = dr.BilevelTrainer(small_config(folder, tmp_path, steps=30, lr=1e4, warmup=0, clip=0.0), progress=False)
    try:
        trainer.fit()
    except dr.errors.TrainingDiverged as error:
        assert "last.safetensors" in str(error)
    again = dr.BilevelTrainer(small_config(folder, tmp_path, steps=30, lr=1e4, warmup=0, clip=0.0), progress=False)
    again.load_state()
    assert all(bool(torch.isfinite(p).all()) for p in again.params)
    assert all(np.isfinite(np.asarray(a)).all() for a in again.objective.store.state().values())
    acted = trainer.counters.values
    assert acted["runaway_resets"] + acted["nonfinite_resets"] + acted["negative_curvature"] > 0


class Edges(torch.nn.Module):
    """A regularizer of a user's: weighted smoothed differences, one parameter frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.log_weight = torch.nn.Parameter(torch.zeros(2))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.log_weight.exp() * self.frozen
        rows, columns = x.diff(dim=-2), x.diff(dim=-1)
        return sum(  # type: ignore[return-value]
            (wk * (1e-2 + d**2).sqrt()).flatten(1).sum(1) for wk, d in zip(w, (rows, columns), strict=True)
        )


def test_any_module_trains(folder: Path, tmp_path: Path) -> None:
    reg = dr.EnergyRegularizer(Edges())
    trainer = dr.BilevelTrainer(
        small_config(folder, tmp_path, steps=40, lr=5e-2, beta=0.0, mu_lr=5e-2), reg=reg, progress=False
    )
    trainer.fit()
    loss = [d["mse_loss"] for d in log_lines(tmp_path) if "mse_loss" in d]
    assert np.mean(loss[-6:]) < 0.95 * np.mean(loss[:6])
    path = tmp_path / "weights.safetensors"
    loaded, _ = dr.load(path, dr.EnergyRegularizer(Edges()))
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), reg.parameters(), strict=True))
    assert float(next(loaded.parameters()).detach().abs().max()) > 0.1
    with pytest.raises(InputError, match=r"Edges.*load\(path, reg\)"):
        dr.load(path)
    with pytest.raises(dr.errors.CheckpointError, match="must fit"):
        dr.load(path, dr.RED())
    whole = dr.BilevelTrainer(replace(trainer.config, out=str(tmp_path / "b"), steps=1), reg=Edges(), progress=False)
    assert isinstance(whole.reg, dr.EnergyRegularizer)


@pytest.mark.parametrize(
    ("trainer", "key", "better"),
    [
        (dr.DenoiserTrainer, "val_denoising_psnr", 1.0),
        (dr.GradientStepTrainer, "val_denoising_psnr", 1.0),
        (dr.AdversarialTrainer, "val_gap", 0.0),
    ],
)
def test_baselines_improve_on_their_own_criterion(
    folder: Path, tmp_path: Path, trainer: type, key: str, better: float
) -> None:
    c = small_config(folder, tmp_path)
    same = {k: getattr(c, k) for k in dr.BaselineConfig.__dataclass_fields__ if hasattr(c, k)}
    config = dr.BaselineConfig(**{**same, "steps": 200, "validate_every": 50, "noise_level": 0.1, "sigma": 0.0})
    t = trainer(config, progress=False)
    first = t.objective.validate()[key]
    reg = t.fit()
    assert t.objective.validate()[key] > first + better
    loaded, meta = dr.load(tmp_path / "weights.safetensors")
    assert meta["method"] == t.method
    x = t.validation
    assert torch.equal(loaded.value_and_grad(x)[1], reg.value_and_grad(x)[1])
    sol = dr.recover(t.operator(x).A(x), t.operator(x), reg, 0.01)
    assert bool(torch.isfinite(sol.x).all())


def test_baselines_resume_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    c = small_config(folder, tmp_path / "a", steps=12)
    same = {k: getattr(c, k) for k in dr.BaselineConfig.__dataclass_fields__ if hasattr(c, k)}
    for trainer in (dr.DenoiserTrainer, dr.AdversarialTrainer):
        a = dr.BaselineConfig(**{**same, "out": str(tmp_path / f"a-{trainer.method}"), "checkpoint_seconds": 0.0})
        b = replace(a, out=str(tmp_path / f"b-{trainer.method}"))
        whole = trainer(a, progress=False).fit()
        cut = trainer(b, progress=False)
        steps = 0

        def stop(inner: Callable[[], dict[str, Any]] = cut._step) -> dict[str, Any]:
            nonlocal steps
            steps += 1
            if steps == 7:
                raise KeyboardInterrupt
            return inner()

        cut._step = stop  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            cut.fit()
        again = trainer(b, progress=False).resume()
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_progress_bar_goes_to_stderr(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dr.BilevelTrainer(small_config(folder, tmp_path, steps=3), progress=True).fit()
    printed = capsys.readouterr()
    assert "3/3" in printed.err and "validation" in printed.err and printed.out == ""


def test_samples_are_the_same_at_every_visit_and_apart_from_validation(folder: Path, tmp_path: Path) -> None:
    samples, validation = load_samples(small_config(folder, tmp_path))
    assert len(samples) == 6 * 4 and len(validation) == 2
    assert torch.equal(samples.batch(np.array([3, 7])), samples.batch(np.array([3, 7])))
    for v in validation:
        assert not any(torch.equal(v, crop) for crop in samples.batch(np.arange(24)))
    for epoch in range(3):
        seen = np.concatenate([Lanes(24, 4, 1, 0).samples(epoch * 6 + k)[0] for k in range(6)])
        assert sorted(seen) == list(range(24))


def test_embedded_validation_shares_no_picture_with_training(folder: Path, tmp_path: Path) -> None:
    c = dr.BilevelConfig(out=str(tmp_path), validation=6)
    samples, validation = load_samples(c)
    pictures = {n.rpartition("-")[0] for n in samples.images.names}
    assert len(pictures) == 6 and len(samples.images.names) == 54 and len(validation) == 6
    with pytest.raises(dr.errors.DataError, match="at most 18"):
        load_samples(replace(c, validation=19))
    assert len(load_samples(replace(c, validation=0))[0].images.names) == 72
    with pytest.raises(dr.errors.DataError, match="within the embedded images"):
        load_samples(replace(c, crop=1000))
    with pytest.raises(dr.errors.DataError, match="use a smaller crop"):
        load_samples(replace(c, data=str(folder), crop=100, validation=2))


def test_median_clip() -> None:
    clip, p = MedianClip(2.0), torch.nn.Parameter(torch.zeros(4))
    for _ in range(20):
        p.grad = torch.ones(4)
        assert clip([p]) == (2.0, False)
    p.grad = torch.full((4,), 100.0)
    norm, clipped = clip([p])
    assert (norm, clipped) == (200.0, True) and float(p.grad.norm()) == pytest.approx(4.0)
    off = MedianClip(0.0)
    for _ in range(20):
        p.grad = torch.full((4,), 100.0)
        assert not off([p])[1]


def test_inner_accuracy_tightens_when_the_loss_stalls() -> None:
    a = ToleranceSchedule(1e-2, 1e-3, 5)
    for loss in np.linspace(10, 1, 50):
        a.observe(float(loss))
    assert a.tolerance == 1e-2
    for _ in range(5):
        a.observe(1.5)
    assert a.tolerance == 5e-3
    for _ in range(50):
        a.observe(1.5)
    assert a.tolerance == 1e-3


def test_settings_are_checked_and_round_trip(tmp_path: Path) -> None:
    c = dr.BilevelConfig(out=str(tmp_path), beta=7.0)
    assert dr.BilevelConfig.from_json(c.to_json()) == c
    for bad in (
        {"steps": 0},
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"sigma": -1.0},
        {"adjoint": "qr"},
        {"beta": float("nan")},
        {"lr": 0.0},
        {"final_lr": 2.0},
        {"depth": 1},
        {"acceleration": "heavy"},
    ):
        with pytest.raises(InputError):
            dr.BilevelConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="colour"):
        dr.BilevelConfig.from_json('{"colour": 1}')


@pytest.mark.parametrize(("channels", "kernel_size"), [(6, 3), (4, 5), (7, 5)])
def test_a_network_grows_without_changing(channels: int, kernel_size: int) -> None:
    small = random_red(1, double=False, channels=4, gain=3.0)
    large = dr.RED(channels, 3, gain=3.0, kernel_size=kernel_size, seed=2)
    grow(small, large)
    x = torch.rand(2, 1, 12, 13, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(large.energy(x), small.energy(x))
    # What is new has a say as soon as the last convolution listens to it.
    slope = torch.autograd.grad(large.energy(x).sum(), list(large.parameters()))
    last = slope[[n for n, _ in large.named_parameters()].index("net.convs.2.weight")]
    assert bool((last.abs().amax((0, 2, 3)) > 0).all())


def test_a_network_grows_from_its_like_only() -> None:
    with pytest.raises(InputError, match="no more channels"):
        grow(dr.RED(8, 3), dr.RED(4, 3))
    with pytest.raises(InputError, match="depth=4"):
        grow(dr.RED(4, 3), dr.RED(8, 4))


class _Bottomless(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1e-6 * self.weight - 50.0) * x.square().sum((1, 2, 3))


def test_a_training_that_recovers_nothing_ends(folder: Path, tmp_path: Path) -> None:
    c = small_config(folder, tmp_path / "a", steps=150, validate_every=0, beta=0.0)
    trainer = dr.BilevelTrainer(c, _Bottomless(), progress=False)
    with pytest.raises(TrainingDiverged, match="every recovery of the last 100 steps ran away"):
        trainer.fit()
    assert trainer.step_done == 99


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize(("filters", "kernel_size"), [(6, 5), (4, 7), (7, 9)])
def test_a_ridge_grows_by_further_filters(filters: int, kernel_size: int, convex: bool) -> None:
    small, large = dr.Ridge(4, 5, convex=convex, seed=1), dr.Ridge(filters, kernel_size, convex=convex, seed=2)
    with torch.no_grad():
        small.net.raw.add_(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))
    grow_ridge(small, large)
    x = torch.rand(2, 1, 12, 13, generator=torch.Generator().manual_seed(3))
    more = dr.Ridge(filters, kernel_size, convex=convex, seed=2)
    more.load_state_dict(large.state_dict())
    with torch.no_grad():
        more.net.raw[4:] = -40.0  # no profile at all
    torch.testing.assert_close(more.energy(x), small.energy(x))
    assert filters == 4 or bool((large.energy(x) > 1.01 * small.energy(x)).all())
    slope = torch.autograd.grad(large.energy(x).sum(), list(large.parameters()))
    assert all(bool((g.flatten(1).norm(dim=1) > 0).all()) for g in slope)


def test_a_ridge_grows_from_its_like_only() -> None:
    with pytest.raises(InputError, match="no more filters"):
        grow_ridge(dr.Ridge(8, 5), dr.Ridge(4, 5))
    with pytest.raises(InputError, match="convex=True"):
        grow_ridge(dr.Ridge(4, 5, convex=False), dr.Ridge(8, 5, convex=True))


def test_a_second_stage_starts_from_weights(folder: Path, tmp_path: Path) -> None:
    first = dr.BilevelTrainer(small_config(folder, tmp_path / "a", steps=4), progress=False)
    first.fit()
    c = small_config(folder, tmp_path / "b", steps=4, init=str(tmp_path / "a" / "weights.safetensors"))
    second = dr.BilevelTrainer(c, progress=False)
    assert second.mu == pytest.approx(first.mu)
    third = dr.BilevelTrainer(dataclasses.replace(c, init_mu=False, mu0=0.03), progress=False)
    assert third.mu == pytest.approx(0.03)
    assert all(torch.equal(a, b) for a, b in zip(second.reg.parameters(), first.reg.parameters(), strict=True))
    with pytest.raises(InputError, match="init must hold a regularizer"):
        dr.AdversarialTrainer(
            dr.BaselineConfig(data=str(folder), crop=24, validation=0, init=c.init, out=str(tmp_path / "c"))
        )


@pytest.mark.parametrize(("batch", "steps"), [(4, 60), (5, 8)])
def test_first_visits_take_their_own_number_of_gradients(folder: Path, tmp_path: Path, batch: int, steps: int) -> None:
    """Those of the first epoch, also where the batch does not divide the number of samples."""
    tight = {"tolerance_start": 1e-5, "tolerance_end": 1e-5}
    c = small_config(folder, tmp_path, steps=steps, batch=batch, inner_iterations=3, first_iterations=40, **tight)
    trainer = dr.BilevelTrainer(c, progress=False)
    trainer.fit()
    first = len(trainer.samples) // c.batch
    taken = [line["inner_gradients"] for line in log_lines(tmp_path) if "inner_gradients" in line]
    assert first < len(taken)
    # The untrained r of the first step is recovered with at once.
    assert min(taken[1:first]) > 3 and max(taken[first:]) <= 3
