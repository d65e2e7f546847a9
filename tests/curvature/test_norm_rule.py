"""The two norm rules against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import generator

from distcurv.curvature.norm_rule import graft_scale, kl_clip_scale
from distcurv.errors import ShapeError


def test_kl_clip_against_plain_numbers() -> None:
    inner = [torch.tensor([2.0, 3.0]), torch.tensor(-0.5, dtype=torch.float64)]
    scale = kl_clip_scale(inner, clip=1e-3, lr=0.1)
    assert scale.dim() == 0
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(math.sqrt(1e-3 / (4.5 * 0.01)), rel=1e-6)
    assert kl_clip_scale([-inner[0]], clip=1e-3, lr=0.1).item() == pytest.approx(
        math.sqrt(1e-3 / (5.0 * 0.01)), rel=1e-6
    )
    assert kl_clip_scale(inner, clip=1e6, lr=0.1).item() == 1.0
    tensor_lr = kl_clip_scale(inner, torch.tensor(1e-3), torch.tensor(0.1))
    assert tensor_lr.item() == pytest.approx(scale.item(), rel=1e-6)


def test_clipped_directions_meet_the_bound() -> None:
    grads = [torch.randn(6, 6, generator=generator(s)) for s in range(3)]
    directions = [grad * (i + 1) for i, grad in enumerate(grads)]
    products = [(g * d).sum() for g, d in zip(grads, directions, strict=True)]
    scale = kl_clip_scale(products, clip=1e-4, lr=0.3).item()
    inner = sum((g * d * scale).sum().item() for g, d in zip(grads, directions, strict=True))
    # The scale enters once here and once more through the step itself.
    assert inner * scale * 0.3**2 == pytest.approx(1e-4, rel=1e-5)


def test_kl_clip_edges() -> None:
    assert kl_clip_scale([torch.zeros(())], clip=1e-3, lr=0.1).item() == 1.0
    assert kl_clip_scale([torch.tensor(torch.nan)], clip=1e-3, lr=0.1).isnan().item()
    with pytest.raises(ShapeError, match="got no inner product"):
        kl_clip_scale([], clip=1e-3, lr=0.1)


def test_graft_scale_gives_the_length_of_the_gradient() -> None:
    got = graft_scale(torch.tensor([5.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 4.0]))
    assert got.tolist() == [2.5, 3.0, 0.0]
