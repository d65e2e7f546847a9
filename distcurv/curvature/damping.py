"""How one damping number is shared between the Kronecker sides of a block.

Absolute: (A + π√δ I) ⊗ (G + √δ/π I) with π² = (tr A/d_A)/(tr G/d_G), the factored Tikhonov damping
of Martens and Grosse 2015 ("Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", section 6.3), with exact traces. Relative: each side is damped by √κ times its own mean
eigenvalue, so the loss's scale drops out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.errors import ConfigError, ShapeError


def split_damping(
    damping: float | Tensor, traces: Sequence[Tensor], dims: Sequence[int], relative: bool
) -> tuple[Tensor, ...]:
    """One damping per side, in the order of ``traces`` (A, G), in float64.

    With one side the whole of the damping goes there. A trace that is 0, negative or not finite has
    no scale to offer: then π = 1 (absolute), or the mean eigenvalue of that side counts as 1
    (relative), so the result is finite and positive whenever the damping is.

    Args:
        damping: δ (absolute) or κ (relative), a number ≥ 0 or a tensor like a trace.
        traces: tr of each side, [...].
        dims: d of each side.
        relative: which of the two forms.

    Raises:
        ConfigError: a negative or non-finite number (tensors are not looked at: no waiting).
        ShapeError: different numbers of traces and dimensions, or none.
    """
    if not traces or len(traces) != len(dims):
        raise ShapeError(
            f"split_damping got {len(traces)} traces and {len(dims)} dims: "
            f"give one of each per side"
        )
    if not isinstance(damping, Tensor) and not 0.0 <= damping < float("inf"):
        raise ConfigError(f"damping is {damping}: give a finite number ≥ 0")
    root = torch.as_tensor(damping, dtype=torch.float64, device=traces[0].device) ** (
        1.0 / len(traces)
    )
    means = [trace.double() / dim for trace, dim in zip(traces, dims, strict=True)]
    usable = [torch.isfinite(mean) & (mean > 0) for mean in means]
    if relative:
        return tuple(
            root * torch.where(good, mean, 1.0) for good, mean in zip(usable, means, strict=True)
        )
    all_usable = torch.stack(usable).all(0)
    safe = [torch.where(all_usable, mean, 1.0) for mean in means]
    log_mean = sum((mean.log() for mean in safe), torch.zeros_like(safe[0])) / len(safe)
    return tuple(root * torch.exp(mean.log() - log_mean) for mean in safe)
