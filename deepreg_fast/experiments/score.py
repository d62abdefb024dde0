"""A row's figures on the test images, in pieces that a stopped run keeps."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.compare import Measured, Method, figures, means, measure
from ..evaluation.metrics import psnr
from ..evaluation.tuning import Tuner, tuned_tv
from ..files import write_atomically
from ..inverse.recovery import recover
from ..regularizers import TV, DenoiserField
from ..solvers import PGDOptions
from ..weights.io import load, save
from . import lipschitz
from .folder import Folder
from .settings import Chain, Row, Settings
from .training_curves import training

ITERATIONS = 50
# Gradients that 50 accepted steps may take: the step size grows by 1.2 and is halved, so one in five is refused.
_GRADIENTS = 2 * ITERATIONS + 20
# What `deepreg-fast evaluate` recovers at a time; a piece on a CPU takes seconds.
_PIECE = {"cpu": 5, "cuda": 64}


class _Kept(dict[str, float]):
    """Scores that are written to a file as they come."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        self._path = path

    def __setitem__(self, key: str, value: float) -> None:
        super().__setitem__(key, value)
        write_atomically(self._path, json.dumps(dict(self)).encode())


@dataclass(frozen=True)
class _Candidate:
    """A tuned method, its score on the tuning images, and where it comes from."""

    method: Method
    score: float
    chain: Chain | None
    meta: dict[str, Any]


class Scorer:
    """Tunes and evaluates one row; `result()` leaves `result.json`, `images.npz` and `weights.safetensors`."""

    def __init__(self, folder: Folder, settings: Settings, row: Row, device: torch.device) -> None:
        self.folder, self.settings, self.row, self.device = folder, settings, row, device
        self.problem: Measured = measure(row.problem, device)
        self.kept = folder.row(row) / f"parts-{self._fingerprint()}"

    def _sources(self) -> list[tuple[Chain | None, Path]]:
        """Weight files to choose from, with their chains."""
        if self.row.weights:
            source = self.settings[self.row.weights]
            return [(source.chains[0] if len(source.chains) == 1 else None, self.folder.start(source))]
        return [(c, self.folder.trained(self.row, c)) for c in self.row.chains]

    def _fingerprint(self) -> str:
        """Of everything that the pieces depend on, so that none outlives its weights or settings."""
        digest = hashlib.sha256(repr((self.row.problem, self.row.tune, self.row.recovery)).encode())
        for _, path in self._sources():
            digest.update(path.read_bytes())
        digest.update(self.problem.x.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def result(self) -> dict[str, Any]:
        """Everything about the row but what needs other rows, run and machine."""
        chosen = self._choose()
        method, row = chosen.method, self.row
        found, images = self._evaluate(method, chosen)
        source = row if not row.weights else self.settings[row.weights]
        config = chosen.chain.last.config if chosen.chain else {}
        told = training(self.folder, source, chosen.chain) if chosen.chain and not row.weights else None
        beta_hat = told["curve"]["beta_hat"] if told else []
        result = {
            "parameters": sum(p.numel() for p in method.reg.parameters()) if method.reg else 0,
            "beta": config.get("beta") if row.method == "bilevel" else None,
            "mu": method.mu,
            "scale": method.scale if "scale" in row.tune else None,
            "chosen": chosen.chain.values if chosen.chain and chosen.chain.values else None,
            "tuning_psnr": chosen.score if np.isfinite(chosen.score) else None,
            **found,
            "training": told,
            "seeds": {
                "operator": row.problem.operator_seed,
                "training": config.get("seed"),
                "validation": 0,
                "test_noise": 1,
                "tuning_noise": 2,
            },
            "images": list(self.problem.names),
        }
        if result["lipschitz"]:
            seen = [b for b in beta_hat if b is not None]
            result["lipschitz"]["beta_hat_train"] = seen[-1] if seen else None
        self._save(chosen, result, images)
        return result

    # -- tuning ----------------------------------------------------------------------------------------------------

    def _choose(self) -> _Candidate:
        """The tuned candidate that recovers the tuning images best."""
        row, problem = self.row, self.problem
        if row.method in ("adjoint", "minimum_norm"):
            return _Candidate(Method(row.method), -np.inf, None, {})
        tuning = problem.x_tuning, problem.y_tuning, problem.A
        if row.method == "tv":
            scores = _Kept(self.kept / "scores.json")
            method = tuned_tv(*tuning, scores=scores)
            method = replace(method, options=replace(method.options, **row.recovery))
            return _Candidate(method, max(scores.values()), None, {})
        found = []
        for i, (chain, path) in enumerate(self._sources()):
            reg, meta = load(path)
            method = Method(row.method, reg.to(self.device), float(meta["mu"]), PGDOptions(**row.recovery))
            tuner = Tuner(*tuning, scores=_Kept(self.kept / f"scores-{i}.json"))
            for what in (*row.tune, *(["mu"] if "scale" in row.tune and "mu" in row.tune else [])):
                method = tuner.mu(method) if what == "mu" else tuner.scale(method)
            found.append(_Candidate(method, tuner.score(method), chain, meta))
        return max(found, key=lambda c: c.score)

    # -- the test images -------------------------------------------------------------------------------------------

    def _evaluate(self, method: Method, chosen: _Candidate) -> tuple[dict[str, Any], torch.Tensor]:
        """Figures of all pieces together, and the recovered images."""
        radius = chosen.chain.last.config.get("delta_radius", 0.05) if chosen.chain else 0.05
        parts, images = zip(*self._pieces(method, radius), strict=True)
        first = parts[0]
        out: dict[str, Any] = {k: [v for p in parts for v in p[k]] for k in ("psnr", "ssim", "iterations", "gradients")}
        out |= means(out)
        out["status"] = {
            k: sum(p["status"].get(k, 0) for p in parts) for k in {k: 0 for p in parts for k in p["status"]}
        }
        out["seconds"] = sum(p["seconds"] for p in parts)
        out["trajectory"] = out["converged"] = out["lipschitz"] = None
        if first["steps"] is not None:
            steps = np.array([s for p in parts for s in p["steps"]])
            count = np.array([s for p in parts for s in p["step_gradients"]])
            out["trajectory"] = {
                "iterations": list(range(ITERATIONS + 1)),
                "psnr_mean": steps.mean(0).tolist(),
                "psnr_median": np.median(steps, 0).tolist(),
                "gradients_mean": count.mean(0).tolist(),
            }
            longest = max(len(c) for p in parts for c in p["rounds"])
            rounds = np.array([c + [c[-1]] * (longest - len(c)) for p in parts for c in p["rounds"]])
            out["converged"] = {"gradients": list(range(1, longest + 1)), "psnr_mean": rounds.mean(0).tolist()}
        if first["lipschitz"] is not None:
            out["lipschitz"] = {k: [v for p in parts for v in p["lipschitz"][k]] for k in first["lipschitz"]}
        return out, torch.cat(images)

    def _pieces(self, method: Method, radius: float) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Each piece's figures and images, computed or as kept."""
        size = _PIECE[self.device.type]
        for i in range(0, len(self.problem.x), size):
            path = self.kept / f"images-{i}.npz"
            if not path.exists():
                x, y = self.problem.x[i : i + size], self.problem.y[i : i + size]
                found, image = _measured(method, x, y, self.problem.A, radius)
                _write(path, x=image.half().cpu().numpy(), figures=np.array(json.dumps(found)))
            with np.load(path) as kept:
                yield json.loads(str(kept["figures"])), torch.from_numpy(kept["x"])

    def _save(self, chosen: _Candidate, result: dict[str, Any], images: torch.Tensor) -> None:
        """The images, and the weights with what is known of them."""
        row = self.row
        _write(self.folder.row(row) / "images.npz", x=images.numpy())
        if chosen.method.reg is None or row.method == "tv":
            return
        meta = {
            "name": row.name,
            "label": row.label,
            "method": row.method,
            "mu": chosen.method.mu,
            "step": chosen.meta.get("step"),
            "problem": asdict(row.problem),
            "recovery": row.recovery,
            "training": [s["config"] for s in result["training"]["stages"]] if result["training"] else [],
            **{
                k: result[k]
                for k in ("psnr_mean", "psnr_median", "ssim_mean", "parameters", "seeds", "chosen", "scale")
            },
        }
        save(chosen.method.regularizer, self.folder.weights(row), meta)


def _measured(
    method: Method, x: torch.Tensor, y: torch.Tensor, A: Any, radius: float
) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures, curves and Lipschitz estimates of a few images, and the images recovered."""
    found, image = figures(method, x, y, A)
    found |= {"steps": None, "step_gradients": None, "rounds": None, "lipschitz": None}
    if method.reg is not None:
        found["steps"], found["step_gradients"] = _plain_steps(method, x, y, A)
        found["rounds"] = _rounds(method, x, y, A)
        if not isinstance(method.reg, (TV, DenoiserField)):
            found["lipschitz"] = lipschitz.estimates(method.regularizer, x, radius)
    return found, image


def _plain_steps(method: Method, x: torch.Tensor, y: torch.Tensor, A: Any) -> tuple[list[list[float]], list[list[int]]]:
    """PSNR of each image after 0 to 50 accepted steps of plain PGD, and the gradients it had then taken.

    An image that ends earlier, or whose steps are refused too often, stays at its last point.
    """
    scores: list[list[float]] = [[] for _ in x]
    counts: list[list[int]] = [[] for _ in x]
    before = torch.full_like(x, torch.nan)

    def look(number: int, now: torch.Tensor) -> None:
        moved = (now != before).flatten(1).any(1).tolist()
        for b, (new, value) in enumerate(zip(moved, psnr(now, x).tolist(), strict=True)):
            if new and len(scores[b]) <= ITERATIONS:
                scores[b].append(value)
                counts[b].append(number + 1)
        before.copy_(now)

    options = PGDOptions(_GRADIENTS, 0.0, tau=method.options.tau)
    recover(y, A, method.regularizer, method.mu, options=options, observer=look)
    return [_filled(s, ITERATIONS + 1) for s in scores], [_filled(c, ITERATIONS + 1) for c in counts]


def _filled(values: list[Any], count: int) -> list[Any]:
    """The list, its last value repeated."""
    return values + [values[-1]] * (count - len(values))


def _rounds(method: Method, x: torch.Tensor, y: torch.Tensor, A: Any) -> list[list[float]]:
    """PSNR of each image after each gradient of the row's own recovery."""
    seen: list[list[float]] = []
    sol = recover(
        y,
        A,
        method.regularizer,
        method.mu,
        options=method.options,
        observer=lambda _, now: seen.append(psnr(now, x).tolist()),
    )
    seen.append(psnr(sol.x, x).tolist())
    return [list(image) for image in zip(*seen, strict=True)]


def _write(path: Path, **arrays: np.ndarray) -> None:
    """An npz file, never half written."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(path, buffer.getvalue())
