"""The kind ``kfe``: eigenbases of both sides, and second moments of per-sample gradients in them.

Source: George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis" (EKFAC), section 4. With A = U_A Λ_A U_Aᵀ, G = U_G Λ_G U_Gᵀ and per-sample gradients
X_n,

    S = E[(U_Gᵀ X_n U_A)²] (elementwise),   P = U_G [(U_Gᵀ ∇W U_A) / (S + damping)] U_Aᵀ.

The sides are those of ``lowrank`` at full rank; what is published is the whole state, and damping,
the whole of it and no root, is read at apply time.

S is measured: ranks sum ``S.squares`` in the newest eigenbasis that they have, ``s.U``, and the
version that is made of the sums applies that basis, ``s.basis``, with them. So a version's basis
is one refresh older than its S, as in the paper's Algorithm 1 (a basis for many steps, scalings at
each), and S is exactly that of the statistic's samples. The average of S before is turned from one
basis to the next by the squares of the rotation: with R = U_newᵀ U_old on each side,
S ← (R_G∘R_G) S (R_A∘R_A)ᵀ. That is exact where the coordinates in the old basis are uncorrelated,
as this approximation takes them to be, and it keeps the sum of S.
Squares in the random basis of version 0 say nothing of another basis: they are dropped, and until
there are others S = λ_G λ_Aᵀ, which makes the first version K-FAC with its damping not factored.
Eigenvectors of equal eigenvalues (a transposed convolution has many) may be any basis of their
space: they are taken as near to the old ones as can be, so that nothing is turned for nothing.

Shape suffixes: B blocks of one shape, O output features, I input features (with the bias).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import ema_weights
from distcurv.curvature.kinds.average import require_not_negative
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.kinds.lowrank import LowRank
from distcurv.curvature.kinds.sides import require_sides
from distcurv.curvature.one_sided import EigenbasisInverse
from distcurv.curvature.sample_gradients import SQUARES
from distcurv.curvature.spec import SIDE_NAMES, BlockSpec, Layout, Tensors
from distcurv.errors import ShapeError

_MEAN, _WEIGHT = "S.mean", "S.weight"  # of what is published
_BASIS = "basis"  # of a side: the one that S is in
_FACTORS = LowRank()
TIE = 1e-6  # eigenvalues this close, as a share of the largest, are equal but for rounding


class Kfe:
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs sides of encoding ``dense``, the full rank
    and no tail."""

    name = "kfe"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        shapes = _require(spec, _FACTORS.statistic_layout(spec))
        steps = shapes.pop("steps")
        return Layout(shapes | {SQUARES: _matrix_shape(spec), "steps": steps})

    def published_layout(self, spec: BlockSpec) -> Layout:
        shapes = _require(spec, _FACTORS.published_layout(spec))
        bases = {f"{name}.{_BASIS}": (side.dim, side.dim) for name, side in spec.named_sides()}
        return Layout(shapes | bases | {_MEAN: _matrix_shape(spec), _WEIGHT: ()})

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        start = _FACTORS.start(spec, seed)
        bases = {f"{name}.{_BASIS}": start[f"{name}.U"].clone() for name in SIDE_NAMES}
        return start | bases | {_MEAN: torch.zeros(_matrix_shape(spec)), _WEIGHT: torch.zeros(())}

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        return {name: published[name].clone() for name in self.published_layout(spec)}

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        return block_by_block(partial(self._refresh, spec), state, statistic, basis)

    def _refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        require_not_negative(statistic[SQUARES], "the second moments of kind 'kfe'")
        factors = _FACTORS.refresh(spec, state, statistic, basis)
        new = dict(factors.state)
        for side in SIDE_NAMES:
            U, old_U, lam = new[f"{side}.U"], state[f"{side}.U"], new[f"{side}.lam"]
            new[f"{side}.U"] = torch.stack(
                [continued(*parts) for parts in zip(U, lam, old_U, strict=True)]
            )
        weight_B = state[_WEIGHT]
        steps_B = counted_steps(spec, statistic)
        # Those in the basis of version 0 do not count.
        counted_B = torch.where(basis["A.weight"] > 0, steps_B, 0.0)
        shares = ema_weights(spec.decay, counted_B, weight_B)
        count_B = statistic["G.count"].double()
        count_B = torch.where(count_B > 0, count_B, 1.0)
        mean_BOI = statistic[SQUARES].double() / count_B[:, None, None]
        turned_BOI = _turned(state, basis)
        S_BOI = (
            shares.old_share[:, None, None] * turned_BOI
            + shares.new_share[:, None, None] * mean_BOI
        )
        products_BOI = new["G.lam"].double().unsqueeze(-1) * new["A.lam"].double().unsqueeze(-2)
        measured = (counted_B > 0)[:, None, None]
        known = (weight_B > 0)[:, None, None]  # and so it stays where nothing was measured
        kept_BOI = torch.where(known, state[_MEAN].double(), products_BOI)
        new[_MEAN] = torch.where(measured, S_BOI, kept_BOI).to(state[_MEAN].dtype)
        for side in SIDE_NAMES:
            own = f"{side}.{_BASIS}"
            kept_Bdd = torch.where(known, state[own], new[f"{side}.U"])
            new[own] = torch.where(measured, basis[f"{side}.U"], kept_Bdd)
        new[_WEIGHT] = shares.weight.to(weight_B.dtype)
        new = keep_where_empty(steps_B, new, state)
        check_finite(new, self.name)
        return Refreshed(new, dict(new), factors.uncaptured, factors.innovation)

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[EigenbasisInverse]:
        S_OI = published[_MEAN].double()
        numbers = S_OI.shape[-2] * S_OI.shape[-1]
        (own,) = split_damping(damping, [S_OI.sum((-2, -1))], [numbers], relative)
        damped_OI = S_OI + own[..., None, None]
        inverse_OI = 1.0 / torch.where(damped_OI > 0, damped_OI, 1.0)
        seen = (published["A.weight"] > 0)[..., None, None]
        inverse_OI = torch.where(seen, inverse_OI, 1.0).to(published[_MEAN].dtype)
        U_II, U_OO = (published[f"{side}.{_BASIS}"] for side in SIDE_NAMES)
        return (EigenbasisInverse(U_OO, U_II, inverse_OI),)


def continued(U_dd: Tensor, lam_d: Tensor, old_dd: Tensor) -> Tensor:
    """The eigenvectors with those of equal eigenvalues rotated towards the old ones in their
    places (the polar factor of the product of both).

    Args:
        U_dd: orthonormal columns, float32.
        lam_d: eigenvalues, descending.
        old_dd: the basis in use.
    """
    apart = -lam_d.diff() > TIE * lam_d[0]
    ends = [*(torch.nonzero(apart).flatten() + 1).tolist(), len(lam_d)]
    U_dd, start = U_dd.double(), 0
    columns = []
    for end in ends:
        own_dk = U_dd[:, start:end]
        if end - start > 1:
            left, _, right = torch.linalg.svd(own_dk.mT @ old_dd[:, start:end].double())
            own_dk = own_dk @ (left @ right)
        columns.append(own_dk)
        start = end
    return torch.cat(columns, -1).to(old_dd.dtype)


def _turned(state: Tensors, measured_in: Tensors) -> Tensor:
    """The state's second moments as they are in the basis of new ones, were the coordinates
    uncorrelated; float64."""
    A_II, G_OO = (
        (measured_in[f"{side}.U"].double().mT @ state[f"{side}.{_BASIS}"].double()).square()
        for side in SIDE_NAMES
    )
    return G_OO @ state[_MEAN].double() @ A_II.mT


def _matrix_shape(spec: BlockSpec) -> tuple[int, int]:
    side_A, side_G = spec.sides
    return side_G.dim, side_A.dim


def _require(spec: BlockSpec, layout: Layout) -> dict[str, tuple[int, ...]]:
    require_sides(spec, 2, ("dense",))
    if len(spec.sides) != 2 or any(s.rank != s.dim or s.tail != "none" for s in spec.sides):
        raise ShapeError(
            f"block {spec.name!r} of kind 'kfe' needs two sides, A and G, of the full rank and "
            f"with the tail 'none'; got {spec.sides}"
        )
    return dict(layout.shapes)
