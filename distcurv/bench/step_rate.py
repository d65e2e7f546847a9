"""What the apply would cost if it were nothing but its thin matrix products.

Applying a low-rank preconditioner to a gradient X [O, I] takes, on each side, a product down to
the rank and one back up: X U_A and (X U_A) U_Aᵀ, U_Gᵀ X and U_G (U_Gᵀ X), 8·r·O·I flops in all.
Here the same products run plainly, one after the other into memory that is there already; their
time over the apply's is the share of the plain products' rate that the apply reaches.

Shape suffixes: O output features, I input features, g and a ranks of their sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import torch

from distcurv.bench.clock import synchronise
from distcurv.curvature.spec import BlockSpec

_PASSES = 5


class PlainProducts:
    """The products of some blocks; a dense side takes one, by its d×d inverse.

    Args:
        specs: the blocks; where a side is a diagonal, or the block has but one, nothing but
            elementwise work is done, and no product counts.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, specs: Iterable[BlockSpec], device: str) -> None:
        self._device = device
        # left, right, out
        self._products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.flops = 0
        for spec in specs:
            if len(spec.sides) != 2:
                continue
            side_A, side_G = spec.sides
            O, I = side_G.dim, side_A.dim  # noqa: E741 (the legend's letters)
            X_OI, out_OI = torch.randn(O, I, device=device), torch.empty(O, I, device=device)
            U_Ia = torch.randn(I, side_A.rank, device=device)
            U_Og = torch.randn(O, side_G.rank, device=device)
            if side_A.rank:
                if spec.kind == "dense":
                    self._add(X_OI, U_Ia, out_OI)
                else:
                    right_Oa = X_OI @ U_Ia
                    self._add(X_OI, U_Ia, right_Oa)
                    self._add(right_Oa, U_Ia.mT, out_OI)
            if side_G.rank:
                if spec.kind == "dense":
                    self._add(U_Og, X_OI, out_OI)
                else:
                    left_gI = U_Og.mT @ X_OI
                    self._add(U_Og.mT, X_OI, left_gI)
                    self._add(U_Og, left_gI, out_OI)

    def _add(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        self._products.append((left, right, out))
        self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]

    def seconds(self) -> float:
        """Wall time of all products once, median of a few passes after one to warm up."""
        taken = []
        for _ in range(_PASSES + 1):
            synchronise(self._device)
            start = time.perf_counter()
            for left, right, out in self._products:
                torch.mm(left, right, out=out)
            synchronise(self._device)
            taken.append(time.perf_counter() - start)
        return median(taken[1:])
