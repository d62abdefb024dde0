"""Weight files of other packages as regularizers: CRR, WCRR and TDV of the authors' repositories."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import checks
from ..ambient import outside_inference
from ..errors import CheckpointError, InputError
from ..regularizers import TDV, MultiConvRidge, Regularizer

KINDS = ("auto", "CRR", "WCRR", "TDV")
_RIDGE = "filters.0.parametrizations.weight.original"
_GOUJON = "conv_layer.conv_layers.0.parametrizations.weight.original"
_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError)


@outside_inference
def load_peer(
    path: str | Path, kind: str = "auto", *, sigma: float | None = None, config: str | Path | None = None
) -> tuple[Regularizer, dict[str, Any]]:
    """Load a prior from a weight file of its authors, recognized by the names of its tensors.

    - CRR, WCRR and TDV of Hertrich et al. 2025 (github.com/johertrich/LearnedRegularizers).
    - CRR and WCRR of Goujon et al. 2024 (github.com/axgoujon/weakly_convex_ridge_regularizer), at one noise level.
    - TDV of Kobler et al. 2020 (github.com/VLOGroup/tdv).

    The file is read without running code from it. `dr.save` writes the regularizer to a file of this package.

    Parameters
    ----------
    path : str or Path
    kind : "auto", "CRR", "WCRR" or "TDV"
        With "auto", CRR and WCRR of Hertrich et al., whose tensors have the same names, are distinguished by the
        file's name.
    sigma : float, optional
        Noise level of images in [0, 1] for a prior of Goujon et al.; default: `noise_val` of their config, over 255.
    config : str or Path, optional
        Their `config.json`; default: the one beside the file or in the folder above.

    Returns
    -------
    (Regularizer, dict)
        The notes contain `peer`, the source, and further values of the file; `mu` is the weight of the trained
        denoiser, if there is one.

    Raises
    ------
    InputError
        If the file is missing, damaged, of no known kind, or not of the named kind.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.load_peer("absent.pt")
    Traceback (most recent call last):
    deepreg_fast.errors.CheckpointError: Weights must be a file, but there is none at absent.pt; check the path.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {list(KINDS)}, but is {kind!r}.")
    path = Path(path)
    content = _read(path)
    state = _tensors(content)
    if f"regularizer.{_RIDGE}" in state or "regularizer.K1.weight" in state:
        kinds, load = ("CRR", "WCRR") if f"regularizer.{_RIDGE}" in state else ("TDV",), _hertrich
    elif _GOUJON in state:
        kinds, load = ("CRR", "WCRR"), _goujon
    elif "R.K1.weight" in state or "K1.weight" in state:
        kinds, load = ("TDV",), _kobler
    else:
        raise CheckpointError(
            f"{path} must hold CRR, WCRR or TDV weights of their authors, but has tensors {sorted(state)[:3]}."
        )
    if kind != "auto" and kind not in kinds:
        raise InputError(f"kind is {kind!r}, but {path} holds weights of {' or '.join(kinds)}.")
    if load is not _goujon and (sigma is not None or config is not None):
        raise InputError(f"sigma and config are for priors of Goujon et al., but {path} is another's; leave them out.")
    if non_finite := sorted(k for k, v in state.items() if not bool(torch.isfinite(v).all())):
        raise CheckpointError(f"Weights must be finite, but {path} holds NaN or infinity in {non_finite[:3]}.")
    try:
        if load is _goujon:
            return _goujon(path, state, kind, sigma, config)
        return _hertrich(path, state, kind) if load is _hertrich else _kobler(path, state, content)
    except InputError:
        raise
    except (KeyError, RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        line = (str(error).splitlines() or [""])[-1].strip()
        raise CheckpointError(
            f"{path} must hold all tensors of its prior in their shapes, but does not ({line})."
        ) from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"Weights must be a file, but there is none at {path}; check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{path} must be a whole file of torch.save with tensors only, but cannot be read ({line}); copy it again."
        ) from error


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    """The state dict in a file: its whole content, or an entry of it."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        return {}
    return {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}


def _chain(state: dict[str, torch.Tensor], first: str, other: str) -> dict[str, torch.Tensor]:
    """The filters of a chain of convolutions under our names."""
    filters = {"filters.0": state[first]}
    while (name := other.format(len(filters))) in state:
        filters[f"filters.{len(filters)}"] = state[name]
    return filters


T = TypeVar("T", bound=Regularizer)


def _load_tensors(reg: T, tensors: dict[str, torch.Tensor]) -> T:
    """Load tensors into a regularizer; weight and contrast are 1 unless the file has them."""
    unscaled = {n: torch.zeros((), dtype=torch.float32, device="cpu") for n in ("log_weight", "log_contrast")}
    reg.load_state_dict(unscaled | tensors)
    return reg.eval()


def _ridge(tensors: dict[str, torch.Tensor], **options: Any) -> MultiConvRidge:
    """The ridge regularizer with these tensors; channels and sizes are those of the filters."""
    filters = [v for k, v in tensors.items() if k.startswith("filters.")]
    channels = (filters[0].shape[1], *(w.shape[0] for w in filters))
    reg = MultiConvRidge(channels, tuple(w.shape[-1] for w in filters), **options)
    return _load_tensors(reg, tensors)


def _blocks(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a TDV under our names. Masks and the blur, which are constants, are left out."""
    names = {"K1.weight": "first", "KN.weight": "last"}
    out = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name in names:
            out[names[name]] = value
        elif micro := re.fullmatch(r"mb\.(\d+)\.mb\.(\d+)\.([01])\.conv([12])\.weight", name):
            block, scale, place, conv = micro.groups()
            part = f"{('before', 'after')[int(place)]}.{scale}.{('first', 'second')[int(conv) - 1]}"
            out[f"blocks.{block}.{part}"] = value
        elif step := re.fullmatch(r"mb\.(\d+)\.conv_(down|up)\.(\d+)\.weight", name):
            out["blocks.{}.{}.{}".format(*step.groups())] = value
    return out


def _tdv(variant: str, tensors: dict[str, torch.Tensor]) -> TDV:
    """The TDV with these tensors, whose sizes are read from their shapes."""
    first = tensors["first"]
    blocks = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))
    steps = [k for k in tensors if k.startswith("blocks.0.down.")]
    multiplier = tensors[steps[0]].shape[0] // first.shape[0] if steps else 1
    sizes = {"multiplier": multiplier, "blocks": blocks, "scales": len(steps) + 1}
    reg = TDV(variant, first.shape[1], first.shape[0], **sizes)
    return _load_tensors(reg, tensors)


def _hertrich(path: Path, state: dict[str, torch.Tensor], kind: str) -> tuple[Regularizer, dict[str, Any]]:
    """A `ParameterLearningWrapper` of LearnedRegularizers: `exp(alpha - 2s) g(exp(s) x)`."""
    scalars = {"log_weight": state["alpha"], "log_contrast": state["scale"]}
    notes: dict[str, Any] = {"peer": "LearnedRegularizers", "mu": 1.0}
    if "regularizer.K1.weight" in state:
        return _tdv("hertrich", _blocks(state, "regularizer.") | scalars), notes | {"prior": "TDV"}
    if kind == "auto":
        named = re.search(r"(?<![A-Z])W?CRR", path.name.upper())
        if named is None:
            raise InputError(f"{path} holds CRR or WCRR, whose tensors have the same names; give the kind.")
        kind = named.group()
    filters = _chain(state, f"regularizer.{_RIDGE}", "regularizer.filters.{}.weight")
    tensors = {"log_scales": state["regularizer.scaling"].flatten(), "log_slope": state["regularizer.beta"]}
    reg = _ridge(filters | tensors | scalars, rho=1.0 if kind == "WCRR" else 0.0)
    return reg, notes | {"prior": kind}


def _goujon(
    path: Path, state: dict[str, torch.Tensor], kind: str, sigma: float | None, config: str | Path | None
) -> tuple[Regularizer, dict[str, Any]]:
    """A `WCvxConvNet` of Goujon et al. at the noise level `sigma`."""
    settings = _settings(path, config)
    spline, noise_range = settings["spline_activation"], settings["noise_range"]
    rho = float(settings["rho_wcvx"])
    prior = "WCRR" if rho else "CRR"
    if kind not in ("auto", prior):
        raise InputError(f"kind is {kind!r}, but the config of {path} is that of {prior} (rho_wcvx = {rho:g}).")
    if spline["x_min"] != -spline["x_max"]:
        ends = f"{spline['x_min']} and {spline['x_max']}"
        raise CheckpointError(f"The outer knots of {path} must be symmetric about zero, but are {ends}.")
    default = float(settings.get("noise_val", 25.0)) / 255.0
    sigma = checks.number(default if sigma is None else sigma, "sigma", 0.0, open_low=True)
    gray_level, low, high = 255.0 * sigma, float(noise_range[0]), float(noise_range[1])
    if not low <= gray_level <= high * (1.0 + 1e-9):
        raise InputError(f"sigma must be at most {high:g}/255 for {path}, but is {gray_level:.4g}/255.")
    table = state["spline_scaling.coefficients"].double()
    place = (gray_level - low) * (table.shape[1] - 1) / (high - low)
    j = min(int(place), table.shape[1] - 2)
    log_scales = table[:, j] + (place - j) * (table[:, j + 1] - table[:, j]) - math.log(gray_level + 1e-5)
    reach, knots = float(spline["x_max"]), state["activation_cvx.coefficients"].shape[1]
    filters = _chain(state, _GOUJON, "conv_layer.conv_layers.{}.weight")
    # The authors pad the filters' autocorrelation by 127 pixels less its reach before the FFT.
    grid = 255 + sum(w.shape[-1] - 1 for w in filters.values())
    tensors = {
        **filters,
        "log_scales": log_scales,
        "log_slope": state["mu_"],
        "convex_spline": state["activation_cvx.coefficients"][0],
        "concave_spline": state["activation_ccv.coefficients"][0],
    }
    reg = _ridge(tensors, rho=rho, profile="spline", knots=knots, reach=reach, grid=grid)
    return reg, {"peer": "weakly_convex_ridge_regularizer", "prior": prior, "mu": 1.0, "sigma": sigma}


def _settings(path: Path, config: str | Path | None) -> dict[str, Any]:
    """The authors' config file."""
    places = [Path(config)] if config is not None else [path.parent / "config.json", path.parent.parent / "config.json"]
    place = next((p for p in places if p.is_file()), None)
    if place is None:
        raise CheckpointError(
            f"Weights of Goujon et al. need their config.json, but there is none at {places[0]}; give config."
        )
    try:
        settings = json.loads(place.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{place} must be JSON, but cannot be read ({error}); copy it again.") from error
    required = {"spline_activation", "noise_range", "rho_wcvx"}
    if not isinstance(settings, dict) or not required <= settings.keys():
        raise CheckpointError(f"{place} must have the entries {sorted(required)}, but lacks some; copy it again.")
    return settings


def _kobler(path: Path, state: dict[str, torch.Tensor], content: Any) -> tuple[Regularizer, dict[str, Any]]:
    """A checkpoint of VLOGroup/tdv. The step T and the weight lambda of its ten steps are in the notes."""
    prefix = "R." if "R.K1.weight" in state else ""
    notes: dict[str, Any] = {"peer": "VLOGroup/tdv", "prior": "TDV"}
    notes |= {k: float(state[k]) for k in ("T", "lmbda") if k in state}
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        notes["steps"] = content["config"].get("S")
    return _tdv("kobler", _blocks(state, prefix)), notes
