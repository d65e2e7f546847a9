"""Gradients of sharded blocks rewritten where they lie, a part of each on every rank.

All blocks go through the first half, then one all-reduce carries what rows (or columns) have to do
with one another (see `distcurv.curvature.apply_shards`), then all go through the second half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distcurv.config import KfacConfig
from distcurv.curvature.apply import AffineGradient, Applied, DenseSides, prepare_block
from distcurv.curvature.apply_shards import Half, PreparedShard, begin, complete, cut_prepared
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.one_sided import WholeInverse
from distcurv.curvature.spec import BlockSpec
from distcurv.errors import ConfigError
from distcurv.layers.shards import BlockShard
from distcurv.train.shard_sums import ShardSums
from distcurv.train.switch import Install


class _Kept(NamedTuple):
    install: Install
    damping: float
    prepared: PreparedShard


class _Begun(NamedTuple):
    block: int
    prepared: PreparedShard
    grad: AffineGradient
    half: Half


class ShardRewriter:
    """Applies installed versions to the local parts of gradients.

    Args:
        specs: the blocks in table order.
        config: norm rule.
        grafts: by block, whether it is grafted.
        shards: the sharded blocks, by index.

    Raises `ConfigError` for a sharded block of kind ``dense``.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        config: KfacConfig,
        grafts: Sequence[bool],
        shards: Mapping[int, BlockShard],
    ) -> None:
        for block in shards:
            if specs[block].kind == "dense":
                raise ConfigError(
                    f"block {specs[block].name!r} is of kind 'dense' and its parameters are "
                    "sharded: a dense inverse needs the whole gradient; use kind='lowrank'"
                )
        self._specs = specs
        self._clips = config.kl_clip is not None
        self._grafts = grafts
        self._shards = shards
        self._kept: dict[int, _Kept] = {}
        self._begun: list[_Begun] = []
        self._sums: ShardSums | None = None

    def begin(
        self,
        grads: Mapping[int, AffineGradient],
        installed: Sequence[Install],
        dampings: Sequence[float],
    ) -> None:
        """First half of all sharded blocks in ``grads``, and begin the sum over ranks."""
        self._begun = []
        for block, shard in self._shards.items():
            if block not in grads:
                continue
            weight_OD, bias_O = grads[block]
            # Memory of its own for other dtypes and orders; then `complete`'s caller writes back.
            grad = AffineGradient(
                weight_OD.float().contiguous(), None if bias_O is None else bias_O.float()
            )
            prepared = self._prepare(
                block, shard, installed[block], dampings[block], bias_O is not None
            )
            half = begin(prepared, grad, measure=self._clips or self._grafts[block])
            self._begun.append(_Begun(block, prepared, grad, half))
        groups = [self._shards[begun.block].group for begun in self._begun]
        self._sums = ShardSums(groups, [begun.half.addends for begun in self._begun])

    def complete(self) -> list[tuple[int, AffineGradient, Applied]]:
        """Second half: by block the float32 gradient to be finished and what was measured."""
        assert self._sums is not None
        begun, self._begun = self._begun, []
        done = [
            complete(item.prepared, item.grad, item.half, sums, square=self._grafts[item.block])
            for item, sums in zip(begun, self._sums.finish(), strict=True)
        ]
        self._sums = None
        squares = [() if one.square is None else (one.square,) for one in done]
        groups = [self._shards[item.block].group for item in begun]
        norms = [
            total[0].sqrt() if total else None for total in ShardSums(groups, squares).finish()
        ]
        return [
            (
                item.block,
                item.grad,
                Applied(
                    one.row_o1,
                    one.grad_norm if norm is not None else None,
                    norm,
                    one.inner if self._clips else None,
                ),
            )
            for item, one, norm in zip(begun, done, norms, strict=True)
        ]

    def _prepare(
        self, block: int, shard: BlockShard, install: Install, damping: float, bias: bool
    ) -> PreparedShard:
        kept = self._kept.get(block)
        if kept is not None and kept.install is install and kept.damping == damping:
            return kept.prepared
        spec = self._specs[block]
        inverses = KINDS[spec.kind].inverses(spec, install.tensors, damping, spec.relative_damping)
        whole = prepare_block(inverses, bias=bias)
        # (Kinds that need the whole gradient are refused where blocks are planned.)
        assert not isinstance(whole, DenseSides | WholeInverse)
        prepared = cut_prepared(whole, shard.side, shard.span, shard.bias_rows)
        self._kept[block] = _Kept(install, damping, prepared)
        return prepared
