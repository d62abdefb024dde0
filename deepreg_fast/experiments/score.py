"""Evaluation of a row on the test images, saved in pieces so that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import io
import json
import math
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
# Limit on the gradients of 50 accepted steps: the step size grows by 1.2 and is halved, so one in five is rejected.
_GRADIENTS = 2 * ITERATIONS + 20
# Images per piece, as in `deepreg-fast evaluate`; a piece on a CPU takes seconds.
_PIECE = {"cpu": 5, "cuda": 64}


class _SavedScores(dict[str, float]):
    """Scores that are saved to a file as they are computed."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        self._path = path

    def __setitem__(self, key: str, value: float) -> None:
        super().__setitem__(key, value)
        write_atomically(self._path, json.dumps(dict(self)).encode())


@dataclass(frozen=True)
class _Candidate:
    """A tuned method, its score on the tuning images, and its origin."""

    method: Method
    score: float
    chain: Chain | None
    meta: dict[str, Any]


class Scorer:
    """Tunes and evaluates one row. `result()` writes `images.npz` and `weights.safetensors` and returns the results."""

    def __init__(self, folder: Folder, settings: Settings, row: Row, device: torch.device) -> None:
        self.folder, self.settings, self.row, self.device = folder, settings, row, device
        self.problem: Measured = measure(row.problem, device)
        self.parts = folder.row(row) / f"parts-{self._fingerprint()}"

    @property
    def ratio(self) -> float:
        """Measurements per pixel."""
        if self.row.problem.problem == "cs":
            return self.row.problem.ratio
        A = self.problem.A
        return A.measurements / math.prod(A.image_shape)

    def _sources(self) -> list[tuple[Chain | None, Path]]:
        """Candidate weight files with their chains."""
        if self.row.weights:
            source = self.settings[self.row.weights]
            return [(source.chains[0] if len(source.chains) == 1 else None, self.folder.start(source))]
        return [(c, self.folder.trained(self.row, c)) for c in self.row.chains]

    def _fingerprint(self) -> str:
        """Hash of everything that the pieces depend on, so that no stale piece is used."""
        digest = hashlib.sha256(repr((replace(self.row.problem, data=""), self.row.tune, self.row.recovery)).encode())
        for _, path in self._sources():
            digest.update(path.read_bytes())
        digest.update(self.problem.x.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def result(self) -> dict[str, Any]:
        """The row's results, except those that depend on other rows, the run or the machine."""
        chosen = self._choose()
        method, row = chosen.method, self.row
        evaluation, images = self._evaluate(method, chosen)
        source = row if not row.weights else self.settings[row.weights]
        config = chosen.chain.last.config if chosen.chain else {}
        summary = training(self.folder, source, chosen.chain) if chosen.chain and not row.weights else None
        beta_hat = summary["curve"]["beta_hat"] if summary else []
        result = {
            "parameters": sum(p.numel() for p in method.reg.parameters()) if method.reg else 0,
            "beta": config.get("beta") if row.method == "bilevel" else None,
            "mu": method.mu,
            "scale": method.scale if "scale" in row.tune else None,
            "chosen": chosen.chain.values if chosen.chain and chosen.chain.values else None,
            "tuning_psnr": chosen.score if np.isfinite(chosen.score) else None,
            **evaluation,
            "training": summary,
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
            values = [b for b in beta_hat if b is not None]
            result["lipschitz"]["beta_hat_train"] = values[-1] if values else None
        self._save(chosen, result, images)
        return result

    # -- tuning ----------------------------------------------------------------------------------------------------

    def _choose(self) -> _Candidate:
        """The tuned candidate with the best PSNR on the tuning images."""
        row, problem = self.row, self.problem
        if row.method in ("adjoint", "minimum_norm"):
            return _Candidate(Method(row.method), -np.inf, None, {})
        tuning = problem.x_tuning, problem.y_tuning, problem.A
        if row.method == "tv":
            scores = _SavedScores(self.parts / "scores.json")
            method = tuned_tv(*tuning, scores=scores)
            method = replace(method, options=replace(method.options, **row.recovery))
            return _Candidate(method, max(scores.values()), None, {})
        candidates = []
        for i, (chain, path) in enumerate(self._sources()):
            reg, meta = load(path)
            method = Method(row.method, reg.to(self.device), float(meta["mu"]), PGDOptions(**row.recovery))
            tuner = Tuner(*tuning, scores=_SavedScores(self.parts / f"scores-{i}.json"))
            for setting in (*row.tune, *(["mu"] if "scale" in row.tune and "mu" in row.tune else [])):
                method = tuner.mu(method) if setting == "mu" else tuner.scale(method)
            candidates.append(_Candidate(method, tuner.score(method), chain, meta))
        return max(candidates, key=lambda c: c.score)

    # -- the test images -------------------------------------------------------------------------------------------

    def _evaluate(self, method: Method, chosen: _Candidate) -> tuple[dict[str, Any], torch.Tensor]:
        """Combined results of all pieces, and the recovered images."""
        radius = chosen.chain.last.config.get("delta_radius", 0.05) if chosen.chain else 0.05
        parts, images = zip(*self._pieces(method, radius), strict=True)
        first = parts[0]
        results: dict[str, Any] = {
            k: [v for p in parts for v in p[k]] for k in ("psnr", "ssim", "iterations", "gradients")
        }
        results |= means(results)
        results["status"] = {
            k: sum(p["status"].get(k, 0) for p in parts) for k in {k: 0 for p in parts for k in p["status"]}
        }
        results["seconds"] = sum(p["seconds"] for p in parts)
        results["trajectory"] = results["converged"] = results["lipschitz"] = None
        if first["steps"] is not None:
            steps = np.array([s for p in parts for s in p["steps"]])
            count = np.array([s for p in parts for s in p["step_gradients"]])
            results["trajectory"] = {
                "iterations": list(range(ITERATIONS + 1)),
                "psnr_mean": steps.mean(0).tolist(),
                "psnr_median": np.median(steps, 0).tolist(),
                "gradients_mean": count.mean(0).tolist(),
            }
            longest = max(len(c) for p in parts for c in p["rounds"])
            rounds = np.array([c + [c[-1]] * (longest - len(c)) for p in parts for c in p["rounds"]])
            results["converged"] = {"gradients": list(range(1, longest + 1)), "psnr_mean": rounds.mean(0).tolist()}
        if first["lipschitz"] is not None:
            results["lipschitz"] = {k: [v for p in parts for v in p["lipschitz"][k]] for k in first["lipschitz"]}
        return results, torch.cat(images)

    def _pieces(self, method: Method, radius: float) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Results and images of each piece, computed or loaded."""
        size = _PIECE[self.device.type]
        for i in range(0, len(self.problem.x), size):
            path = self.parts / f"images-{i}.npz"
            if not path.exists():
                x, y = self.problem.x[i : i + size], self.problem.y[i : i + size]
                results, image = _measured(method, x, y, self.problem.A, radius)
                _write(path, x=image.half().cpu().numpy(), figures=np.array(json.dumps(results)))
            with np.load(path) as saved:
                yield json.loads(str(saved["figures"])), torch.from_numpy(saved["x"])

    def _save(self, chosen: _Candidate, result: dict[str, Any], images: torch.Tensor) -> None:
        """Save the images, and the weights with their metadata."""
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
    """Results, curves and Lipschitz estimates of a few images, and the recovered images."""
    results, image = figures(method, x, y, A)
    results |= {"steps": None, "step_gradients": None, "rounds": None, "lipschitz": None}
    if method.reg is not None:
        results["steps"], results["step_gradients"] = _plain_steps(method, x, y, A)
        results["rounds"] = _rounds(method, x, y, A)
        if not isinstance(method.reg, (TV, DenoiserField)):
            results["lipschitz"] = lipschitz.estimates(method.regularizer, x, radius)
    return results, image


def _plain_steps(method: Method, x: torch.Tensor, y: torch.Tensor, A: Any) -> tuple[list[list[float]], list[list[int]]]:
    """PSNR of each image after 0 to 50 accepted steps of plain PGD, and the number of gradients until then.

    An image that ends earlier, or whose steps are rejected too often, stays at its last point.
    """
    scores: list[list[float]] = [[] for _ in x]
    counts: list[list[int]] = [[] for _ in x]
    previous = torch.full_like(x, torch.nan)

    def look(number: int, now: torch.Tensor) -> None:
        moved = (now != previous).flatten(1).any(1).tolist()
        for b, (new, value) in enumerate(zip(moved, psnr(now, x).tolist(), strict=True)):
            if new and len(scores[b]) <= ITERATIONS:
                scores[b].append(value)
                counts[b].append(number + 1)
        previous.copy_(now)

    options = PGDOptions(_GRADIENTS, 0.0, tau=method.options.tau)
    recover(y, A, method.regularizer, method.mu, options=options, observer=look)
    return [_filled(s, ITERATIONS + 1) for s in scores], [_filled(c, ITERATIONS + 1) for c in counts]


def _filled(values: list[Any], count: int) -> list[Any]:
    """The list, padded to `count` with its last value."""
    return values + [values[-1]] * (count - len(values))


def _rounds(method: Method, x: torch.Tensor, y: torch.Tensor, A: Any) -> list[list[float]]:
    """PSNR of each image after each gradient of the row's recovery."""
    scores: list[list[float]] = []
    sol = recover(
        y,
        A,
        method.regularizer,
        method.mu,
        options=method.options,
        observer=lambda _, now: scores.append(psnr(now, x).tolist()),
    )
    scores.append(psnr(sol.x, x).tolist())
    return [list(image) for image in zip(*scores, strict=True)]


def _write(path: Path, **arrays: np.ndarray) -> None:
    """Write an npz file atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(path, buffer.getvalue())
