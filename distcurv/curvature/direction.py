"""A four-block direction kept in factors, so that it can be applied without being formed.

P = c·M + U_G inner + right U_Aᵀ, where inner and right are thin.  Subtracting it from a parameter
takes two passes over the parameter; forming P first would take three more and memory of its size.

Shape suffixes: those of four_block (O, I, g, a); k = a + g.
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
        """P [O, I], newly allocated."""
        left_Ok, right_kI = self._thin()
        if self.per_rest is None:
            return left_Ok @ right_kI
        return (self.momentum_OI * self.per_rest).addmm_(left_Ok, right_kI)

    def subtract_from(self, target_OI: Tensor, lr: float) -> None:
        """target −= lr · P, in place.  ``target_OI`` [O, I] has the dtype of the state."""
        left_Ok, right_kI = self._thin()
        if self.per_rest is not None:
            if self.per_rest.is_cuda:
                target_OI.addcmul_(self.momentum_OI, self.per_rest, value=-lr)
            else:
                # A number is read for free on the CPU, and spares a broadcast in the inner loop.
                target_OI.add_(self.momentum_OI, alpha=-lr * float(self.per_rest))
        target_OI.addmm_(left_Ok, right_kI, alpha=-lr)

    def _thin(self) -> tuple[Tensor, Tensor]:
        """Both thin products as one, so that the target is read and written once."""
        if self.right_Oa is None:
            return self.basis_out_Og, self.inner_gI
        left_Ok = torch.cat([self.basis_out_Og, self.right_Oa], 1)
        return left_Ok, torch.cat([self.inner_gI, self.basis_in_Ia.mT])
