"""deepinv's physics as operators, and operators, regularizers and the recovery as deepinv objects.

Noise models are left out: a physics stands for its forward operator.
"""

from __future__ import annotations

from .conversion import from_deepinv, to_deepinv
from .prior import DeepInvPrior
from .reconstructor import RecoverModel

__all__ = ["DeepInvPrior", "RecoverModel", "from_deepinv", "to_deepinv"]
