"""A four-block direction kept in factors, so that it can be applied without being formed.

P = c·M + U_G inner + right U_Aᵀ, where inner and right are thin.  Subtracting it from a parameter
takes three passes over the parameter; forming P first would take three more and memory of its size.

Shape suffixes: those of four_block (O, I, g, a) after any number of leading batch dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Direction(NamedTuple):
    """The factors; `per_rest` is c, None where there is no rest, `right_Oa` None where g = O."""

    momentum_OI: Tensor
    per_rest: Tensor | None
    basis_out_Og: Tensor
    inner_gI: Tensor
    right_Oa: Tensor | None
    basis_in_Ia: Tensor

    def dense(self) -> Tensor:
        """P [..., O, I], newly allocated."""
        if self.per_rest is None:
            direction_OI = self.basis_out_Og @ self.inner_gI
        else:
            direction_OI = self.momentum_OI * self.per_rest[..., None, None]
            _add_product(direction_OI, self.basis_out_Og, self.inner_gI, 1.0)
        if self.right_Oa is not None:
            _add_product(direction_OI, self.right_Oa, self.basis_in_Ia.mT, 1.0)
        return direction_OI

    def subtract_from(self, target_OI: Tensor, lr: float) -> None:
        """target −= lr · P, in place.  ``target_OI`` [..., O, I] has the dtype of the state."""
        if self.per_rest is not None:
            if self.per_rest.dim() == 0 and not self.per_rest.is_cuda:
                # A number is read for free on the CPU, and spares a broadcast in the inner loop.
                target_OI.add_(self.momentum_OI, alpha=-lr * float(self.per_rest))
            else:
                target_OI.addcmul_(self.momentum_OI, self.per_rest[..., None, None], value=-lr)
        _add_product(target_OI, self.basis_out_Og, self.inner_gI, -lr)
        if self.right_Oa is not None:
            _add_product(target_OI, self.right_Oa, self.basis_in_Ia.mT, -lr)


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """out += alpha · left @ right without a temporary of out's size."""
    if out.dim() == 2:
        torch.addmm(out, left, right, alpha=alpha, out=out)
    else:
        flat = out.flatten(0, -3)
        torch.baddbmm(flat, left.flatten(0, -3), right.flatten(0, -3), alpha=alpha, out=flat)
