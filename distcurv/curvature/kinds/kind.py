"""What every kind promises: how a block's statistics become a preconditioner.

Kinds are pure and batched: every tensor has one leading dimension B for blocks with equal
`BlockSpec.shape_key()`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from distcurv.curvature.inverse import Inverse
from distcurv.curvature.one_sided import OneSidedInverse, WholeInverse
from distcurv.curvature.spec import BlockSpec, Layout, Tensors


class Refreshed(NamedTuple):
    """What a refresh yields.

    ``state`` is what the worker keeps, ``published`` what the ranks install (both [B, ...] by
    name); they may share memory with each other and with what the refresh was given, so none of
    it is to be changed in place.  ``uncaptured`` [B] is the largest 1 - sum(lambda)/trace over the
    sides (0 where nothing is approximated); ``innovation`` [B] is ||Y - A_old Q|| / ||Y|| (for
    statistics taken against no basis ||mean - old|| / ||mean||), largest over the sides, or -1
    where there was no estimate before.
    """

    state: Tensors
    published: Tensors
    uncaptured: Tensor
    innovation: Tensor


class Kind(Protocol):
    """How one kind of block is counted, refreshed and seeded."""

    name: str

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        """Names and shapes of a statistic, summed over samples, steps and ranks.

        Per side ``s`` (A and G, or F where there is one), encoding sketch: ``s.Y`` (d, r),
        ``s.diag`` (d, only where the tail is diagonal), ``s.trace`` (), ``s.count`` (); encoding
        dense: ``s.packed`` (d(d+1)/2, upper triangle by rows; of several units one after the
        other), ``s.count`` (); encoding diagonal:
        ``s.diag`` (d), ``s.count`` (); encoding unit: ``s.ww``, ``s.wb``, ``s.bb`` (d each),
        ``s.count`` ().  Per block: ``steps`` (), and for kfe ``S.squares`` (d of G, d of A), of as
        many samples as G counts.  Of a tensor's sides ``s`` is M0, M1, ...

        Of kind ``lowrank`` it names ``s.Y`` as what may travel as float16, the published one
        ``s.U`` (`BlockSpec.wire_dtype`); those bases arrive with orthonormal columns again.

        Raises `ShapeError` for sides that the kind does not take; so does `published_layout`."""
        ...

    def published_layout(self, spec: BlockSpec) -> Layout:
        """Names and shapes of a preconditioner.

        Low rank, per side: ``s.U`` (d, r), ``s.lam`` (r), ``s.tail`` ((1,) isotropic, (d,)
        diagonal, absent for none), ``s.trace`` (), ``s.weight`` (); no U and lam where the
        encoding is diagonal.  Dense, per side: ``s.inverse`` (packed, or (d) where the encoding is
        diagonal), ``s.trace`` (), ``s.damping`` (), ``s.weight`` ().  Diagonal: ``F.diag`` (d),
        ``F.weight`` ().  Unitwise: ``F.ww``, ``F.wb``, ``F.bb`` (d each), ``F.weight`` ().
        Shampoo, per side: ``s.packed`` and ``s.root`` (packed), ``s.weight`` ().  layer_wise,
        unit_rows and full: ``F.packed`` and ``F.inverse`` (packed), ``F.weight`` ().  kfe: as low
        rank, and per side ``s.basis`` (d, d), and ``S.mean`` (d of G, d of A), ``S.weight`` ()."""
        ...

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        """Version 0 (no batch dimension): weight 0 and, for low-rank kinds, a random
        orthonormal basis that depends on ``seed`` and ``spec.name`` alone."""
        ...

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        """The worker's state [B, ...] from published tensors [B, ...]."""
        ...

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        """Fold a statistic into the state and finish a new version, all [B, ...].

        ``basis`` are the published tensors of the version that the statistic was taken
        against.  Where the statistic is empty (``steps`` or a count is 0) nothing changes.
        Raises `NumericsError` when float32 and float64 both fail; one bad block fails the
        whole batch, so whoever batches tries the blocks one by one then."""
        ...

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[Inverse | OneSidedInverse | WholeInverse, ...]:
        """One inverse per side of the damped factors (shampoo: its root; kfe: one for the whole
        block), [...] batch, to be applied with `distcurv.curvature.apply`.

        ``damping`` and ``relative`` as in `split_damping`.  A kind whose damping is part of what
        is published (dense, layer_wise, ...) goes by that and does not read them."""
        ...
