"""The two norm rules against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import generator

from distcurv.curvature.norm_rule import graft, kl_clip_scale
from distcurv.errors import ShapeError


def test_kl_clip_against_plain_numbers() -> None:
    grads = [torch.randn(3, 4, generator=generator(0)), torch.randn(5, generator=generator(1))]
    directions = [2 * grads[0], -0.5 * grads[1]]
    inner = 2 * (grads[0] ** 2).sum().item() - 0.5 * (grads[1] ** 2).sum().item()
    scale = kl_clip_scale(grads, directions, clip=1e-3, lr=0.1)
    assert scale.dim() == 0
    assert scale.item() == pytest.approx(math.sqrt(1e-3 / abs(inner * 0.01)), rel=1e-5)
    assert kl_clip_scale(grads, directions, clip=1e6, lr=0.1).item() == 1.0
    tensor_lr = kl_clip_scale(grads, directions, torch.tensor(1e-3), torch.tensor(0.1))
    assert tensor_lr.item() == pytest.approx(scale.item(), rel=1e-6)


def test_clipped_directions_meet_the_bound() -> None:
    grads = [torch.randn(6, 6, generator=generator(s)) for s in range(3)]
    directions = [grad * (i + 1) for i, grad in enumerate(grads)]
    scale = kl_clip_scale(grads, directions, clip=1e-4, lr=0.3).item()
    inner = sum((g * d * scale).sum().item() for g, d in zip(grads, directions, strict=True))
    # The scale enters once here and once more through the step itself.
    assert inner * scale * 0.3**2 == pytest.approx(1e-4, rel=1e-5)


def test_kl_clip_edges() -> None:
    zero = [torch.zeros(2, 2)]
    assert kl_clip_scale(zero, zero, clip=1e-3, lr=0.1).item() == 1.0
    nan = [torch.full((2, 2), float("nan"))]
    assert kl_clip_scale(nan, nan, clip=1e-3, lr=0.1).isnan().item()
    with pytest.raises(ShapeError, match="1 gradients and 0 directions"):
        kl_clip_scale(zero, [], clip=1e-3, lr=0.1)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        kl_clip_scale(zero, [torch.zeros(4)], clip=1e-3, lr=0.1)


def test_graft_takes_the_length_of_the_gradient() -> None:
    grad = torch.randn(2, 3, 4, generator=generator(0))
    direction = torch.randn(2, 3, 4, generator=generator(1)) * 1e-9
    direction[1] = 0.0
    got = graft(direction, grad)
    assert got[0].norm().item() == pytest.approx(grad[0].norm().item(), rel=1e-5)
    cosine = (got[0] * direction[0]).sum() / (got[0].norm() * direction[0].norm())
    assert cosine.item() == pytest.approx(1.0, abs=1e-6)
    assert got[1].abs().max().item() == 0.0
    assert graft(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])).tolist() == [0.0, 5.0]
