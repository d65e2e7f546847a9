"""How long the update may be: the two rules that follow the preconditioner.

They see only the numbers that `distcurv.curvature.apply` measured, and yield a factor.  Tensor
operations alone, no ``.item()``: the training step does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.errors import ShapeError


def kl_clip_scale(inner: Sequence[Tensor], clip: float | Tensor, lr: float | Tensor) -> Tensor:
    """min(1, √(clip / |lr² Σ ⟨∇W, P⟩|)), a 0-dim float32 tensor (1 where the sum is 0).

    lr² Σ⟨∇W, P⟩ is the quadratic model's KL divergence between the model before and after the step,
    to a factor. Source: Ba, Grosse and Martens 2017, "Distributed Second-Order Optimization using
    Kronecker-Factored Approximations", section 5 (rescaling of the update); in the form of
    kfac-pytorch (Pauloski and others 2020), ``kl_clip``.

    Args:
        inner: ⟨∇W, P⟩ of every block, [...] each; summed in float64.
        clip: largest lr² Σ⟨∇W, P⟩ that passes unscaled, > 0.
        lr: learning rate of this step.

    Raises:
        ShapeError: the list is empty.
    """
    if not inner:
        raise ShapeError("kl_clip_scale got no inner product: give that of one block at least")
    total = torch.stack([product.double().sum() for product in inner]).sum().abs() * lr**2
    scale = torch.where(total > 0, clip / total, 1.0).sqrt().clamp(max=1.0)
    # A sum that is not a number must stay visible; clamp keeps NaN, and so must the branch above.
    return torch.where(torch.isnan(total), total, scale).float()


def graft_scale(grad_norm: Tensor, norm: Tensor) -> Tensor:
    """‖∇W‖ / ‖P‖, elementwise: what gives the direction the length of the gradient.

    Norm grafting: Agarwal, Anil, Hazan, Koren and Zhang 2020, "Disentangling Adaptive Gradient
    Methods from Learning Rates". Finite where P is zero, so that a zero direction stays zero.
    """
    return grad_norm / torch.where(norm > 0, norm, 1.0)
