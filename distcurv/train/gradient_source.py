"""Statistics of a block that no layer and no function call shows: from its gradient alone.

Over a batch of N loss terms with gradients g_n, which have mean zero under the model's own
distribution, E[(sum g_n)(sum g_n)^T] = sum E[g_n g_n^T]: so N ḡ ḡ^T, of the gradient ḡ of the
mean loss, estimates the Fisher of one term.  It errs by the part N E[ḡ] E[ḡ]^T, which is small far
from where all samples agree.  For a matrix it is split as Shampoo splits it (Gupta et al. 2018),
exact for a gradient of rank one: X^T X / ‖X‖² for side A, N X X^T for side G.

Shape suffixes: O output features, I input features (with the bias coordinate), d units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.sample_gradients import EIGENBASIS, encode_samples
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.curvature.statistics import encode_gradient, guard_finite


def gradient_statistic(
    spec: BlockSpec, grad: AffineGradient, factor: float | Tensor, share: float, basis: Tensors
) -> Tensors:
    """The statistic, without ``steps``.

    Args:
        spec: the block; with one side (not ``unitwise``), or with two.
        grad: of the reduced and unscaled gradient, the same on all ranks.
        factor: what makes the Fisher of one term of the gradient's outer product: N for a mean
            loss, 1/N for a summed one.
        share: 1 / number of ranks: what each of them adds.
        basis: published tensors of the version to sketch against.
    """
    if len(spec.sides) == 1:
        made = _of_one_sample(spec, grad, basis, factor * share)
        made["F.count"] = next(iter(made.values())).new_full((), share)
        return guard_finite(made)
    grad_OI = grad.whole().detach().float()
    statistic = encode_gradient(spec, grad_OI, basis)
    del statistic["steps"]
    size = torch.linalg.vector_norm(grad_OI, dim=-1).square().sum()
    scales = {"A": share / torch.where(size > 0, size, 1.0), "G": factor * share}
    made = {
        name: value * (share if name.endswith(".count") else scales[name[0]])
        for name, value in statistic.items()
    }
    if spec.kind == EIGENBASIS:
        return guard_finite(made | _of_one_sample(spec, grad, basis, factor * share))
    return made


def _of_one_sample(
    spec: BlockSpec, grad: AffineGradient, basis: Tensors, scale: float | Tensor
) -> Tensors:
    row_1P = grad.whole().detach().float().reshape(1, -1)
    return {name: value * scale for name, value in encode_samples(spec, row_1P, basis).items()}
