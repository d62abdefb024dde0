"""Initialize a wider network, or one with larger filters, as the same function as a trained smaller one (Net2Net)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..functional.ridge import inverse_softplus
from .base import Regularizer
from .red import RED
from .ridge import Ridge
from .sum import Sum

_GROWING = ("channels", "kernel_size")
_GROWING_RIDGE = ("filters", "kernel_size")
# Relative to the mean strength of the old filters. With 0.01 new filters were still inactive after 2500 training steps.
_NEW_FILTER_STRENGTH = 0.3


def initialize_from(small: Regularizer, large: Regularizer) -> bool:
    """Initialize `large` from `small` by a copy, `grow` or `grow_ridge`. In a `Sum`, this applies to the first part.
    Returns False if the two are of different kinds.

    Raises
    ------
    InputError
        If `large` differs in settings that cannot grow.
    """
    if small.describe() == large.describe():
        large.load_state_dict(small.state_dict())
    elif isinstance(small, RED) and isinstance(large, RED):
        grow(small, large)
    elif isinstance(small, Ridge) and isinstance(large, Ridge):
        grow_ridge(small, large)
    elif isinstance(large, Sum):
        return initialize_from(small, next(iter(large)))
    else:
        return False
    return True


def grow(small: RED, large: RED) -> None:
    """Make `large` equal to `small` as a function, with additional channels that can be trained.

    `large` has at least as many channels and at least as large filters, and otherwise the same settings, without
    LayerNorm. The filters of `small` are centered in those of `large`. The additional channels keep their initial
    weights, but the old channels' and the output's weights for them are zero (Chen, Goodfellow, Shlens 2016).

    Raises
    ------
    InputError
        If the two differ in anything else.
    """
    a, b = small.describe(), large.describe()
    if not _grows(a, b, _GROWING) or a["norm"] != "none":
        raise InputError(
            "A network can start from one without LayerNorm that has no more channels, no larger filters, and is like "
            f"it in all else, but this one is {_text(b)} and that one {_text(a)}; change the settings or the weights."
        )
    with torch.no_grad():
        for old, new in zip(small.net.convs, large.net.convs, strict=True):
            assert isinstance(old, nn.Conv2d) and isinstance(new, nn.Conv2d)
            assert old.bias is not None and new.bias is not None
            outs, ins = old.weight.shape[:2]
            edge = (b["kernel_size"] - a["kernel_size"]) // 2
            new.weight[:outs] = 0.0
            inner = slice(edge, edge + a["kernel_size"])
            new.weight[:outs, :ins, inner, inner] = old.weight
            new.bias[:outs] = old.bias


def grow_ridge(small: Ridge, large: Ridge) -> None:
    """Make `large` equal to `small` except for its additional filters.

    These keep their initial weights and get 0.3 of the mean profile of the old filters, because a filter without a
    profile never gets a gradient. `large` has at least as many filters of at least the same size, and otherwise the
    same settings. The filters of `small` are centered in those of `large`.

    Raises
    ------
    InputError
        If the two differ in anything else.
    """
    a, b = small.describe(), large.describe()
    if not _grows(a, b, _GROWING_RIDGE):
        raise InputError(
            "A ridge can start from one that has no more filters, no larger ones, and is like it in all else, but this "
            f"one is {_text(b)} and that one {_text(a)}; change the settings or the weights."
        )
    count, edge = a["filters"], (b["kernel_size"] - a["kernel_size"]) // 2
    old, new = small.net, large.net
    with torch.no_grad():
        new.filters[:count] = F.pad(old.numbers()[0], [edge] * 4)
        # Coefficients are divided by the number of filters.
        strength = F.softplus(old.raw) * (b["filters"] / count)
        added = _NEW_FILTER_STRENGTH * strength.mean(0).expand(b["filters"] - count, -1)
        new.raw.copy_(inverse_softplus(torch.cat([strength, added])))


def _grows(small: dict[str, Any], large: dict[str, Any], growing: tuple[str, ...]) -> bool:
    same = all(small.get(k) == v for k, v in large.items() if k not in growing)
    return same and all(small[k] <= large[k] for k in growing)


def _text(description: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in description.items() if k != "kind")
