"""The sketched empirical Fisher of one layer (Yang, Xu, Wen, Chen and Xu 2021, "Sketch-Based
Empirical Natural Gradient Methods for Deep Learning").

A sample's gradient of a layer is M_n = sum_s g_ns a_nsᵀ, so inner products of such gradients, and
those with the layer's gradient, need only inner products of the a and of the g.  These are
sketched: only drawn coordinates are read, scaled so that the expectation is right.  Over many
positions, g is first replaced by its best approximation of low rank.

Shapes: N samples, S positions, I inputs (with the bias coordinate), O outputs, k drawn coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST_PRODUCTS = 1 << 24  # float64, held at once


class Samples(NamedTuple):
    """Samples' gradients M_n = sum_s g_ns a_nsᵀ, as their factors."""

    a_NSI: Tensor
    g_NSO: Tensor


class Draw(NamedTuple):
    """Which coordinates are read: [k] indices, or None for all; the bias coordinate always is."""

    inputs: Tensor | None
    outputs: Tensor | None


def truncated(samples: Samples, rank: int) -> Samples:
    """At most ``rank`` positions: with g_n = U Σ Vᵀ, the rank-r part's Σ Vᵀ as g and Uᵀ a as a.

    The same M_n where g_n has no more than that rank; NaN where a g_n is not finite."""
    if samples.g_NSO.shape[1] <= rank:
        return samples
    # The decomposition would raise, and on one rank alone.
    finite = samples.g_NSO.isfinite().all()
    U, sizes, Vh = torch.linalg.svd(torch.where(finite, samples.g_NSO, 0.0), full_matrices=False)
    sizes = torch.where(finite, sizes, torch.nan)
    r = min(rank, sizes.shape[-1])
    return Samples(U[..., :r].mT @ samples.a_NSI, sizes[:, :r, None] * Vh[:, :r])


def draw(size: int, inputs: int, outputs: int, generator: torch.Generator) -> Draw:
    """``size`` coordinates of each side, uniformly without replacement; all where there are no
    more.  ``inputs`` is without the bias coordinate."""
    first, second = (
        torch.randperm(d, generator=generator)[:size] if size < d else None
        for d in (inputs, outputs)
    )
    return Draw(first, second)


def sketched(x: Tensor, indices: Tensor | None, dim: int, d: int) -> Tensor:
    """The drawn ones of the first d coordinates of a dimension, times √(d/k), and those behind
    them as they are: x̃·ỹ has x·y for its expectation."""
    if indices is None:
        return x
    head, rest = x.narrow(dim, 0, d), x.narrow(dim, d, x.shape[dim] - d)
    indices = indices.to(x.device)
    return torch.cat([head.index_select(dim, indices) * (d / len(indices)) ** 0.5, rest], dim)


def sketched_samples(samples: Samples, chosen: Draw, inputs: int) -> Samples:
    """Both factors sketched."""
    a = sketched(samples.a_NSI, chosen.inputs, 2, inputs)
    return Samples(a, sketched(samples.g_NSO, chosen.outputs, 2, samples.g_NSO.shape[2]))


def sketched_gradient(grad_OI: Tensor, chosen: Draw, inputs: int) -> Tensor:
    """The layer's gradient in the same coordinates."""
    rows = sketched(grad_OI, chosen.outputs, 0, grad_OI.shape[0])
    return sketched(rows, chosen.inputs, 1, inputs)


def kernel(samples: Samples) -> Tensor:
    """The inner products ⟨M_n, M_m⟩ = sum_st (a_ns·a_mt)(g_ns·g_mt), float64 [N, N]."""
    N, S = samples.a_NSI.shape[:2]
    a, g = (part.double().flatten(0, 1) for part in samples)
    # Between all positions there are (NS)² products: a strip of them at a time.
    strip = max(1, _MOST_PRODUCTS // max(1, N * S * S))
    rows = []
    for first in range(0, max(N, 1), strip):
        part = slice(first * S, (first + strip) * S)
        both = (a[part] @ a.mT) * (g[part] @ g.mT)
        rows.append(both.view(min(strip, N - first), S, N, S).sum((1, 3)))
    return torch.cat(rows)


def products(samples: Samples, grad_OI: Tensor) -> Tensor:
    """⟨M_n, grad⟩, [N]."""
    return ((samples.g_NSO @ grad_OI) * samples.a_NSI).sum((1, 2))


def combination(samples: Samples, weights_N: Tensor) -> Tensor:
    """sum_n c_n M_n, [O, I]."""
    g = samples.g_NSO * weights_N.to(samples.g_NSO.dtype)[:, None, None]
    return g.flatten(0, 1).mT @ samples.a_NSI.flatten(0, 1)
