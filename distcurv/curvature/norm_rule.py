"""How long the update may be: the two rules that follow the preconditioner.

Tensor operations alone, no ``.item()``: the training step does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.errors import ShapeError


def kl_clip_scale(
    grads: Sequence[Tensor],
    directions: Sequence[Tensor],
    clip: float | Tensor,
    lr: float | Tensor,
) -> Tensor:
    """min(1, √(clip / |lr² Σ ⟨∇W, P⟩|)), a 0-dim float32 tensor (1 where the sum is 0).

    lr² Σ⟨∇W, P⟩ is the quadratic model's KL divergence between the model before and after the step,
    to a factor. Source: Ba, Grosse and Martens 2017, "Distributed Second-Order Optimization using
    Kronecker-Factored Approximations", section 5 (rescaling of the update); in the form of
    kfac-pytorch (Pauloski and others 2020), ``kl_clip``.

    Args:
        grads: ∇W of every block.
        directions: P of every block, shapes as in ``grads``.
        clip: largest lr² Σ⟨∇W, P⟩ that passes unscaled, > 0.
        lr: learning rate of this step.

    Raises:
        ShapeError: the lists differ in length or shapes, or are empty.
    """
    if not grads or len(grads) != len(directions):
        raise ShapeError(
            f"kl_clip_scale got {len(grads)} gradients and {len(directions)} directions: give one "
            f"direction per gradient, at least one"
        )
    products = []
    for grad, direction in zip(grads, directions, strict=True):
        if grad.shape != direction.shape:
            raise ShapeError(
                f"kl_clip_scale got a gradient of shape {tuple(grad.shape)} with a direction of "
                f"shape {tuple(direction.shape)}: they must be equal"
            )
        products.append((grad.float() * direction.float()).sum())
    total = torch.stack(products).sum().abs() * lr**2
    scale = torch.where(total > 0, clip / total, 1.0).sqrt().clamp(max=1.0)
    # A sum that is not a number must stay visible; clamp keeps NaN, and so must the branch above.
    return torch.where(torch.isnan(total), total, scale).float()


def graft(direction: Tensor, grad: Tensor) -> Tensor:
    """The direction with the norm of the gradient, over the last two dimensions ([..., O, I]).

    Norm grafting: Agarwal, Anil, Hazan, Koren and Zhang 2020, "Disentangling Adaptive Gradient
    Methods from Learning Rates". A zero direction stays zero.
    """
    dims = (-2, -1) if direction.dim() > 1 else (-1,)
    wanted = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
    length = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
    ratio: Tensor = wanted / torch.where(length > 0, length, 1.0)
    return direction * ratio
