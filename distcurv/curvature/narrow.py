"""What travels between owners and workers as float16: taken apart, put together and put right.

Sketches and bases are nearly all that a low-rank block exchanges, and neither needs float32: their
rounding is far below the sampling noise of a statistic. Each column is divided by its largest
number first, so that float16's range does not matter and its eleven digits are kept (bfloat16's
eight are too few for sketches: docs/decisions/0011-float16-on-the-wire.md). Everything else is
needed exactly, and is small. So a message holds two flat tensors: the float32 numbers, with the
largest of each column in place of the matrix, and the rounded ones. Where nothing is rounded the
first is the buffer itself.

A rounded basis is orthonormal to some 1e-4 only. That is too little for what the ranks do with it:
beside a floor of 1e-4 of the largest eigenvalue, a column that is longer by as much turns the
inverse of a damped factor indefinite. Owner and worker therefore both orthonormalise
what was sent, with the same operations: what is installed, what statistics are taken against and
what the worker folds into are the same orthonormal float32 numbers.

Shape suffixes: d dimension, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.precision import products_are_full
from distcurv.curvature.spec import Layout

HALF_STEP = 2.0**-11  # the most that rounding to float16 changes a number, as a share of it

# Rounding makes R differ from I by thousandths at most: what differs by more was no basis.
_MOST_CHANGE = 0.1


class Sent(NamedTuple):
    """One or several layouts, as they travel."""

    payload: Tensor  # flat, float32: what is not narrow, and scales of columns, in order
    narrow: Tensor  # flat, float16: what is, in the same order; may be empty

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.payload.nbytes + self.narrow.nbytes


def sent_sizes(layouts: Sequence[Layout]) -> tuple[int, int]:
    """How many numbers of each sort a message has for these layouts."""
    narrow = sum(layout.narrow_size for layout in layouts)
    return sum(layout.size + layout.columns for layout in layouts) - narrow, narrow


def split(layouts: Sequence[Layout], flat: Tensor) -> Sent:
    """Buffers [sum of sizes], one after the other, as they travel.

    ``payload`` is ``flat`` itself where nothing is narrow, else both are new. What is not finite
    stays so."""
    wide, narrow = sent_sizes(layouts)
    if not narrow:
        return Sent(flat, flat.new_empty(0, dtype=torch.float16))
    sent = Sent(flat.new_empty(wide), flat.new_empty(narrow, dtype=torch.float16))
    _copy_parts(layouts, flat, sent, sending=True)
    return sent


def join(layouts: Sequence[Layout], sent: Sent) -> list[Tensor]:
    """One flat float32 buffer for each layout; a view of ``payload`` where nothing is narrow.

    The sizes must be those of `sent_sizes`, which is for the caller to check."""
    if not sent.narrow.numel():
        return list(torch.split(sent.payload, [layout.size for layout in layouts]))
    flat = sent.payload.new_empty(sum(layout.size for layout in layouts))
    _copy_parts(layouts, flat, sent, sending=False)
    return list(torch.split(flat, [layout.size for layout in layouts]))


def _copy_parts(layouts: Sequence[Layout], flat: Tensor, sent: Sent, *, sending: bool) -> None:
    start, wide_start, narrow_start = 0, 0, 0
    for layout in layouts:
        for shape in _stretches(layout):
            size = math.prod(shape)
            here, start = flat[start : start + size], start + size
            wide_size = size if len(shape) == 1 else shape[1]
            wide = sent.payload[wide_start : wide_start + wide_size]
            wide_start += wide_size
            if len(shape) == 1:
                wide.copy_(here) if sending else here.copy_(wide)
                continue
            narrow_dr = sent.narrow[narrow_start : narrow_start + size].view(shape)
            narrow_start += size
            if sending:
                wide.copy_(_scales(here.view(shape)))
                narrow_dr.copy_(here.view(shape) / wide)
            else:
                torch.mul(narrow_dr.float(), wide, out=here.view(shape))


def _scales(matrix_dr: Tensor) -> Tensor:
    """The largest of each column [r]; 1 where that is nothing to divide by."""
    largest_r = matrix_dr.abs().amax(0)
    return torch.where((largest_r > 0) & torch.isfinite(largest_r), largest_r, 1.0)


def _stretches(layout: Layout) -> list[tuple[int, ...]]:
    """What lies together in a buffer and travels together: (size,), or (d, r) where narrow."""
    found: list[tuple[int, ...]] = []
    for name, shape in layout.shapes.items():
        if name in layout.narrow:
            found.append(shape)
            continue
        size = math.prod(shape)
        if found and len(found[-1]) == 1:
            size += found.pop()[0]
        found.append((size,))
    return found


def settled(layout: Layout, flat: Tensor) -> Tensor:
    """A published buffer [size] that was sent, with its narrow bases orthonormal again.

    In memory of its own. What was no basis before it was rounded, or is not finite, comes out as
    NaN."""
    out = flat.clone()
    for name, U_dr in layout.views(out).items():
        if name in layout.narrow:
            U_dr.copy_(_orthonormal(U_dr))
    return out


def as_received(layout: Layout, sent: Sent) -> Tensor:
    """The published buffer [size] that whoever is sent this has of it."""
    return settled(layout, join([layout], sent)[0])


def _orthonormal(B_dr: Tensor) -> Tensor:
    """B R⁻¹ with Rᵀ R = Bᵀ B: each column loses what it has in common with those before it.

    B is orthonormal but for rounding, so that the small R⁻¹ − I, exact in float64, leaves B + B
    (R⁻¹ − I) to float32: different machines, whose sums round differently, get the same bits but
    for a few."""
    dtype = B_dr.dtype if products_are_full(B_dr.device) else torch.float64
    wide_dr = B_dr.double()
    R_rr, info = torch.linalg.cholesky_ex(wide_dr.mT @ wide_dr, upper=True)
    eye_rr = torch.eye(B_dr.shape[-1], dtype=R_rr.dtype, device=R_rr.device)
    change_rr = torch.linalg.solve_triangular(R_rr, eye_rr, upper=True) - eye_rr
    U_dr = B_dr + B_dr.to(dtype) @ change_rr.to(dtype)
    good = (info == 0) & (change_rr.abs().amax() < _MOST_CHANGE)
    return torch.where(good, U_dr, torch.nan)
