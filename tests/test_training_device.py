"""Trainings on any device: what crosses between host and device, where things live, and what resumes where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepreg_fast as dr
from deepreg_fast import checks
from deepreg_fast.data import ImageSet
from deepreg_fast.solvers import LinearSolution
from deepreg_fast.training import hypergradients, placement, recoveries
from deepreg_fast.training import trainer as loop
from deepreg_fast.training.baselines import GradientStep
from deepreg_fast.training.bilevel import Bilevel
from deepreg_fast.training.checkpoint import load_checkpoint
from deepreg_fast.training.placement import PinnedSamples, Placement
from deepreg_fast.training.samples import Samples, load_samples

from .fake_cuda import CUDA, Read, fake_cuda
from .helpers import log_lines, relative, small_config


class Plain(dr.Regularizer):
    """`r = w/2 ||x||^2` with its derivatives written out: torch's autograd wants a driver for CUDA tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = self.w.detach().sum()
        return 0.5 * w * x.square().flatten(1).sum(1), w * x

    def linearize(self, x: torch.Tensor) -> Any:
        self.x, (self.value, self.grad) = x, self.value_and_grad(x)
        return self

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        return self.w.detach().sum() * v

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"w": (self.x * v).sum() * torch.ones_like(self.w)}


def _no_loop(y: torch.Tensor, A: Any, reg: Any, mu: Any, options: Any, x0: torch.Tensor, tau0: Any) -> dr.Solution:
    """In place of the recovery: the devices of what came are compared, nothing is asked."""
    zero = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    x = x0 - reg.value_and_grad(x0)[1] + A.A_adjoint(y) * mu.reshape(-1, 1, 1, 1)
    return dr.Solution(x, zero, zero, zero, tau0 * 1.0, tau0 * 1.0)


def _no_solve(lin: Any, A: Any, mu: torch.Tensor, b: torch.Tensor, options: Any, x0: Any, c: float) -> LinearSolution:
    zero = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    x = A.normal(b + x0) + mu.reshape(-1, 1, 1, 1) * lin.hvp(b)
    return LinearSolution(x, zero, zero, zero.double())


def _no_backward(outputs: Any, inputs: Any, *_: Any, **__: Any) -> list[torch.Tensor]:
    """In place of torch's backward pass, which asks for a driver."""
    assert outputs.device == CUDA
    return [torch.zeros_like(p) for p in ([inputs] if isinstance(inputs, torch.Tensor) else inputs)]


def _step_on_fake_cuda(trainer: type[loop.Trainer], config: Any, monkeypatch: pytest.MonkeyPatch) -> list[Read]:
    """The second of two steps on a device that is not there; what the host read in it."""
    samples, validation = load_samples(config)
    with fake_cuda(monkeypatch) as (mode, reads), monkeypatch.context() as patch:
        images = ImageSet(samples.images.names, mode.from_tensor(samples.images.x))
        fake = Samples(images, config.crop, samples.orientations, config.seed), mode.from_tensor(validation)
        patch.setattr(loop, "load_samples", lambda _: fake)
        patch.setattr(recoveries, "pgd", _no_loop)
        patch.setattr(hypergradients, "solve_adjoint", _no_solve)
        patch.setattr(torch.autograd, "grad", _no_backward)
        t = trainer(config, progress=False)
        assert {p.device for p in t.params} == {CUDA} and t.A.rows.device == CUDA
        t._step()
        reads.clear()
        t.step_done = 1
        t._step()
        assert {p.device for p in t.params} == {CUDA}
        found = list(reads)
        if trainer is not dr.BilevelTrainer:  # whose validation is made of loops
            assert t.objective.validate()
        return found


@pytest.mark.parametrize(
    ("fits", "options"),
    [(True, {}), (False, {}), (True, {"penalty": "curvature"}), (True, {"delta_ball": "free", "jfb_steps": 1})],
)
def test_a_step_reads_the_host_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool, options: dict[str, Any]
) -> None:
    """Apart from the loops of the solvers, and whether or not the device holds the samples: once what guards and log
    want to know, 12 numbers of each image and one of all, once the squared norms of the gradients. The operands
    of every operation are on one device, or the step would not end."""
    monkeypatch.setattr(Placement, "take", lambda *_: fits)
    c = small_config(folder, tmp_path, device="cuda", delta_steps=2, device_budget_mb=1, **options)
    monkeypatch.setattr(Bilevel, "build", lambda _: Plain())
    told, norms = _step_on_fake_cuda(dr.BilevelTrainer, c, monkeypatch)
    assert told == Read("cpu", 12 * c.batch + 1, "deepreg_fast.training.placement")
    assert norms == Read("cpu", 1, "deepreg_fast.training.guards")


@pytest.mark.parametrize("trainer", [dr.DenoiserTrainer, dr.GradientStepTrainer, dr.AdversarialTrainer])
def test_a_step_of_a_baseline_reads_the_host_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[loop.Trainer]
) -> None:
    """Its loss, and the squared norms of the gradients."""
    c = small_config(folder, tmp_path)
    same = {k: getattr(c, k) for k in dr.BaselineConfig.__dataclass_fields__ if hasattr(c, k)}
    config = dr.BaselineConfig(**{**same, "device": "cuda", "device_budget_mb": 1})
    monkeypatch.setattr(GradientStep, "build", lambda _: Plain())
    loss, norms = _step_on_fake_cuda(trainer, config, monkeypatch)
    assert loss.count == (3 if trainer is dr.AdversarialTrainer else 1) and norms.module.endswith("guards")


def test_the_fake_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as (_, reads):
        a, b = torch.zeros(3, device=CUDA), torch.zeros(3)
        for mixed in (lambda: a + b, lambda: torch.where(a > 0, b, a), lambda: a.index_copy_(0, b.long(), a)):
            with pytest.raises(RuntimeError, match="device"):
                mixed()
        assert reads == [] and float(b.sum()) == bool(b.any()) == 1 and reads == []
        assert Placement("cuda", 1).upload(b).device == CUDA and reads == []
        placement.read({"a": a, "any": (a > 0).any()})
        assert reads == [Read("cpu", 4, "deepreg_fast.training.placement")]


class Apart(Placement):
    """The CPU taken for a device with memory of its own, whose budget is `budget` bytes."""

    budget = 0

    def __init__(self, name: str, budget_mb: int = 0) -> None:
        super().__init__(name, budget_mb)
        self.has_own_memory, self.left = True, self.budget


def _end(trainer: dr.BilevelTrainer) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in load_checkpoint(trainer.checkpoint_path)[0].items()}


def _cut(trainer: dr.BilevelTrainer, at: int) -> None:
    """Train, and stop after step `at` as Ctrl-C would."""
    inner = trainer._step

    def step() -> dict[str, Any]:
        if trainer.step_done == at:
            raise KeyboardInterrupt
        return inner()

    trainer._step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


STORE = 3 * 4 * 24 * 16 * 16
HOMES = {"device": (10 * STORE, 0), "pinned": (0, 64), "disk": (0, 0), "store alone": (STORE, 0)}


def test_every_home_gives_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops and noise kept or made at each visit, warm starts here or there, and moved between two at a resume."""
    c = small_config(folder, tmp_path / "cpu", steps=14, checkpoint_seconds=0.0)
    whole = dr.BilevelTrainer(c, progress=False)
    assert whole.objective.store.location == "device" and whole.placed.table is None
    whole.fit()
    monkeypatch.setattr(loop, "Placement", Apart)
    for first, second in zip(HOMES, [*HOMES][1:] + [*HOMES][:1], strict=True):
        out = tmp_path / first
        for home, cut in ((first, 8), (second, 0)):
            Apart.budget, host_mb = HOMES[home]
            t = dr.BilevelTrainer(replace(c, out=str(out), memory_budget_mb=host_mb), progress=False)
            assert t.objective.store.location == ("device" if home == "store alone" else home)
            if cut:
                _cut(t, cut)
            else:
                t.resume()
            assert (t.placed.table is not None) == (t.objective.recover.noise.table is not None) == (home == "device")
        a, b = _end(whole), _end(t)
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a), first


def test_a_run_may_go_on_elsewhere(folder: Path, tmp_path: Path) -> None:
    """The device is told, and nothing that a resumed run must keep."""
    c = small_config(folder, tmp_path, steps=4, checkpoint_seconds=0.0)
    _cut(dr.BilevelTrainer(c, progress=False), 2)
    state = load_checkpoint(tmp_path / "last.safetensors")[1]
    assert state["device"] == "cpu" and state["config"]["device"] == "cpu"
    t = dr.BilevelTrainer(replace(c, device="auto", device_budget_mb=99), progress=False)
    t.resume()
    assert t.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert [d["device"] for d in log_lines(tmp_path) if "loss" in d] == ["cpu", "cpu", str(t.device), str(t.device)]


def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    for wrong in ("tpu", "cuda:", "cuda:-1", "cuda 1", "gpu", 1, None):
        with pytest.raises(dr.errors.InputError, match="'cuda:1' .any index. or 'auto'"):
            dr.BilevelConfig(device=wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.device("auto") == checks.device("cpu") == torch.device("cpu")
    with pytest.raises(dr.errors.InputError, match="'cuda:3', but torch sees no CUDA device"):
        dr.BilevelTrainer(small_config(folder, tmp_path, device="cuda:3"), progress=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert checks.device("cuda") == checks.device("auto") == checks.device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(dr.errors.InputError, match="one of the 2 CUDA devices.*'cuda:2'"):
        checks.device("cuda:2")


def test_a_step_that_does_not_fit_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    t = dr.BilevelTrainer(small_config(folder, tmp_path), progress=False)
    monkeypatch.setattr(t, "gradients", full)
    with pytest.raises(dr.errors.OutOfMemory, match=r"batches of 4 .*20 GiB.*last\.safetensors"):
        t.fit()
    assert t.checkpoint_path.exists()


def _devices() -> list[str]:
    return [f"cuda:{i}" for i in range(min(2, torch.cuda.device_count()))] or ["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("device", _devices())
def test_the_same_data_on_a_gpu(folder: Path, tmp_path: Path, device: str) -> None:
    """Crops, noise and perturbations are those of the CPU to the bit, in every home, twice."""
    here = dr.BilevelTrainer(small_config(folder, tmp_path / "cpu"), progress=False)
    for fits in (True, False):
        there = dr.BilevelTrainer(small_config(folder, tmp_path / f"{fits}", device=device), progress=False)
        assert str(there.device) == device or device == "cuda"
        if not fits:
            there.placement.left = 0
        for step in (0, 1, 0):
            first, second = (t.batch(t.lanes.samples(step)) for t in (here, there))
            a, b, x, z = first.rows, second.rows, first.x, second.x
            assert z.device == there.device and torch.equal(z.cpu(), x)
            assert torch.equal(there.objective.recover.noise.batch(b).cpu(), here.objective.recover.noise.batch(a))
            r = torch.ones(4, dtype=torch.float64)
            penalties = here.objective.penalty, there.objective.penalty
            drawn = penalties[1].perturbation(second, r.to(device)).cpu()
            assert relative(drawn, penalties[0].perturbation(first, r)) <= 1e-6
        assert (there.placed.table is not None) == fits


@pytest.mark.gpu
@pytest.mark.parametrize("device", _devices())
def test_a_gpu_trains_like_the_cpu(folder: Path, tmp_path: Path, device: str) -> None:
    """Tight solves, 10 steps: losses agree to the rounding that the solves leave."""
    tight = {"inner_iterations": 300, "tolerance_start": 1e-5, "tolerance_end": 1e-5}
    tight |= {"adjoint_iterations": 200, "adjoint_tolerance": 1e-4, "steps": 10}
    losses = []
    for name in ("cpu", device):
        out = tmp_path / name.replace(":", "")
        dr.BilevelTrainer(small_config(folder, out, device=name, **tight), progress=False).fit()
        losses.append([d["mse_loss"] for d in log_lines(out) if "mse_loss" in d])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("host_mb", [64, 0])
@pytest.mark.parametrize("device", _devices())
def test_a_run_moves_between_devices(folder: Path, tmp_path: Path, device: str, host_mb: int) -> None:
    """CPU, GPU, CPU, GPU: each takes over the other's state whole."""
    c = small_config(folder, tmp_path, steps=12, checkpoint_seconds=0.0, memory_budget_mb=host_mb)
    for i, name in enumerate(("cpu", device, "cpu", device)):
        t = dr.BilevelTrainer(replace(c, device=name), progress=False)
        if i:
            before = _end(t)
            t.load_state()
            assert {p.device for p in t.params} == {t.device}
            t.save_checkpoint()
            after = _end(t)
            assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
        _cut(t, 3 * (i + 1)) if i < 3 else t.fit()
    assert t.step_done == 12 and all(bool(torch.isfinite(p).all()) for p in t.params)
    reg, _ = dr.load(tmp_path / "weights.safetensors")
    assert {p.device.type for p in reg.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_pinned_memory_keeps_what_it_is_given() -> None:
    device = torch.device(_devices()[-1])
    table = PinnedSamples((6, 1, 300, 300), device)
    assert table.data.is_pinned()
    value = torch.randn(3, 1, 300, 300, device=device)
    rows = Placement(str(device), 1).rows(np.array([4, 0, 3]))
    for k in range(20):
        table.put(rows, value + k)
        assert torch.equal(table.get(rows), value + k)
    kept = np.asarray(table.array())
    assert np.array_equal(kept[[4, 0, 3]], (value + 19).cpu().numpy()) and not kept[[1, 2, 5]].any()
