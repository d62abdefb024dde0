"""The measurement problem as one small value: what measures the images, and the noise.

Settings files, the command line, evaluation and reports all use it. `inverse/problem.py` builds the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from . import checks
from .checks import option
from .errors import InputError

PROBLEMS: dict[str, str] = {
    "cs": "compressive sensing by a structurally random matrix",
    "denoise": "white noise alone",
    "deblur-gaussian": "blur by a Gaussian of 25 x 25 pixels, standard deviation 1.6, circular",
    "deblur-motion": "blur by a line of 30 pixels at 45 degrees, circular",
    "sr2": "Gaussian blur as in deblur-gaussian, then every second pixel",
    "sr3": "the same with every third pixel",
    "inpaint": "a random half of the pixels",
    "ct": "parallel-beam tomography at 60 angles",
    "fourier": "a quarter of the frequencies, more of the low ones",
}
"""The named problems, each with a description."""

PROBLEM_HELP = (
    f"Inverse problem: {', '.join(PROBLEMS)} (cs is an SRM), or a file: the picture of a blur kernel, or an operator's "
    "description in JSON."
)
TRANSFORMS = ("dct", "hadamard", "walsh")
RANDOMIZERS = ("sign", "permutation", "both")
SRM_OPTIONS = ("ratio", "transform", "randomizer", "keep_dc")
"""The fields that only the problem "cs" uses."""


@dataclass(frozen=True)
class Problem:
    """A measurement problem: `y = A x + noise`.

    Parameters
    ----------
    problem : str
        A name of `PROBLEMS`, or a file: the picture of a blur kernel, or an operator's description in JSON
        (`inverse.problem.build_operator`).
    ratio, transform, randomizer, keep_dc
        Options of the SRM of "cs"; other problems do not use them.
    operator_seed : int
        Seed of the SRM and of the random masks.
    sigma : float
        Standard deviation of the measurement noise; 1 is the range from black to white.
    color : bool
        Whether the images are read in color, with three channels, instead of gray.

    Raises
    ------
    InputError
        If a value is invalid, or an option of the SRM is set for another problem.
    """

    problem: str = option("cs", PROBLEM_HELP)
    ratio: float = option(0.2, "Measurements per pixel of the SRM.")
    transform: str = option("dct", "Transform of the SRM: dct, hadamard or walsh.")
    randomizer: str = option("sign", "Randomizer of the SRM: sign, permutation or both.")
    keep_dc: bool | None = option(None, "Keep the SRM's coefficients of the means; none: for a permutation only.")
    operator_seed: int = option(0, "Seed of the operator.")
    sigma: float = option(0.0, "Standard deviation of the measurement noise.")
    color: bool = option(False, "Read images in color (red, green, blue) instead of gray.")

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.fields_typed(self)
        checks.choice(self.transform, "transform", TRANSFORMS)
        checks.choice(self.randomizer, "randomizer", RANDOMIZERS)
        checks.integer(self.operator_seed, "operator_seed", 0)
        checks.number(self.sigma, "sigma", 0.0)
        checks.number(self.ratio, "ratio", 0.0, 1.0, open_low=True)
        changed = [f.name for f in fields(Problem) if f.name in SRM_OPTIONS and getattr(self, f.name) != f.default]
        if self.problem != "cs" and changed:
            raise InputError(
                f"{' and '.join(changed)} must be left out for problem {self.problem!r}: they are options of cs, which "
                "is compressive sensing."
            )

    @property
    def image_channels(self) -> int:
        """The channels of the images."""
        return 3 if self.color else 1

    @classmethod
    def of(cls, source: Any) -> Self:
        """The problem in a larger object or mapping, such as a training's settings; absent fields take defaults."""
        values = source if isinstance(source, Mapping) else vars(source)
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def describe(self) -> str:
        """What the problem is, in words."""
        words = PROBLEMS.get(self.problem, f"the operator of {self.problem}")
        if self.problem == "cs":
            words += f" ({self.transform}, {self.ratio:g} measurements per pixel)"
        words += ", in color" if self.color else ""
        return words + (f", noise of {255 * self.sigma:.3g}/255" if self.sigma else "")


FIELDS = tuple(f.name for f in fields(Problem))
"""The names of a problem's fields, in every file and on the command line."""
