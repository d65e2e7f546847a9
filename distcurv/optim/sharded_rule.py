"""The four-block rule over matrices of which every rank holds some rows (FSDP2, HSDP).

What the ranks of a shard group add up, each in one all-reduce for all blocks: at every step the
products of `distcurv.curvature.four_block_shards`, and at an install those of a turn.  On steps
with statistics the same products serve the statistics.

State of a block, float32: momentum [o, Di], right part and its moment [o, a] (0 rows where the
basis is full) for the o rows of this rank; core, left part and their moments, v₃ and the rotations
whole, equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from distcurv.curvature.four_block_shards import (
    ShardProducts,
    SummedProducts,
    advance_shards,
    encode_shard,
    multiply,
)
from distcurv.curvature.four_block_state import FourBlockState
from distcurv.curvature.four_block_turn import begin_turn, complete_turn
from distcurv.errors import StateError
from distcurv.layers.local_part import parameter_cut
from distcurv.optim.matrices import ShardedMatrix
from distcurv.optim.matrix_rule import FIELDS, FOUR_BLOCK, Bases, MatrixRule
from distcurv.train.pipeline import Pipeline
from distcurv.train.shard_sums import ShardSums
from distcurv.train.switch import Install


class ShardedRule:
    """The rule of one optimizer's sharded matrices.

    Args:
        matrices: by block.
        rule: of all matrices of the optimizer; keeps the bases in use.
        state: the optimizer's state by parameter.
    """

    def __init__(
        self,
        matrices: Mapping[int, ShardedMatrix],
        rule: MatrixRule,
        state: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        self._matrices = matrices
        self._rule = rule
        self._state = state

    # -- statistics and products ----------------------------------------------------------

    def statistics(
        self, pipeline: Pipeline, watched: Container[int]
    ) -> tuple[dict[int, SummedProducts], list[Tensor]]:
        """Add the statistics of the gradients to the window, but for ``watched`` blocks.

        Returns the products with the bases in use, by block, where they were made on the way; and
        of each block the share of this rank in the count of finite gradients that was missed."""
        blocks = [block for block in self._with_gradient() if block not in watched]
        bases = {block: self._statistic_bases(pipeline, block) for block in blocks}
        summed = self._multiply(bases)
        kept: dict[int, SummedProducts] = {}
        missed: list[Tensor] = []
        for block, products in summed.items():
            installed, basis = pipeline.installed[block], pipeline.basis(block)
            against = products
            if basis is installed:
                kept[block] = products
                against = self._unrotated(block, products)
            cut = self._matrices[block].cut
            # One of the equal replicas of HSDP contributes, so that the sum over ranks is the sum
            # over rows; and one rank of it the counts.
            if cut.replica == 0:
                counts = cut.place == 0
                statistic = encode_shard(
                    pipeline.table.specs[block],
                    self._rule.gradient(block),
                    cut.own,
                    basis.tensors,
                    against,
                    counts=counts,
                )
                missed.append(float(counts) - statistic["steps"])
                pipeline.add(block, statistic)
        return kept, missed

    def _statistic_bases(self, pipeline: Pipeline, block: int) -> Bases:
        basis, installed = pipeline.basis(block), pipeline.installed[block]
        if basis is installed:
            return self._rule.used(block, installed)
        return Bases(basis.tensors["G.U"], basis.tensors["A.U"])

    def _unrotated(self, block: int, products: SummedProducts) -> SummedProducts:
        """The products with the installed bases, from those with the rotated ones."""
        matrix = self._matrices[block]
        state = self._state[matrix.param]
        if not state:
            return products
        in_oa, over_rows, numbers_2 = products
        rotation_out, rotation_in = state["rotation_out"], state["rotation_in"]
        over_rows = rotation_out @ over_rows
        if len(rotation_in) == matrix.shape[1]:
            over_rows = over_rows @ rotation_in.mT
        return SummedProducts(
            None if in_oa is None else in_oa @ rotation_in.mT, over_rows, numbers_2
        )

    def _with_gradient(self) -> list[int]:
        return [b for b, matrix in self._matrices.items() if matrix.param.grad is not None]

    def products(
        self, installed: Sequence[Install], made: Mapping[int, SummedProducts]
    ) -> dict[int, SummedProducts]:
        """Of each block's gradient with the bases in use; ``made`` are there already."""
        missing = {
            block: self._rule.used(block, installed[block])
            for block in self._with_gradient()
            if block not in made
        }
        return {**made, **self._multiply(missing)}

    def _multiply(self, bases: Mapping[int, Bases]) -> dict[int, SummedProducts]:
        own: dict[int, ShardProducts] = {}
        for block, (out_Og, in_Ia) in bases.items():
            matrix = self._matrices[block]
            start, stop = matrix.rows
            own[block] = multiply(
                self._rule.gradient(block), out_Og[start:stop], in_Ia, matrix.shape[0]
            )
        sums = self._sum(list(own), [products.addends for products in own.values()])
        return {
            block: SummedProducts(products.in_oa, over_rows, numbers_2)
            for (block, products), (over_rows, numbers_2) in zip(own.items(), sums, strict=True)
        }

    def _sum(
        self, blocks: Sequence[int], addends: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        return ShardSums([self._matrices[block].cut.group for block in blocks], addends).finish()

    # -- the step -------------------------------------------------------------------------

    def turn(self, installs: Sequence[tuple[Install, Install]], *, early: bool) -> None:
        """Carry the blocks' states over from old versions to new ones, see `MatrixRule.turn`."""
        turnings = {}
        for old, new in installs:
            matrix = self._matrices[new.block]
            if not self._state[matrix.param]:
                self._rule.forget(new.block)
                continue
            before, after = self._rule.rebase(old, new, early=early)
            turnings[new.block] = begin_turn(
                self._four_block(new.block), *before, *after, matrix.rows
            )
        sums = self._sum(list(turnings), [turning.addends for turning in turnings.values()])
        for (block, turning), summed in zip(turnings.items(), sums, strict=True):
            turned = complete_turn(self._four_block(block), turning, summed)
            state = self._state[self._matrices[block].param]
            state.update(zip(FOUR_BLOCK, turned, strict=True))

    def update(
        self,
        group: Mapping[str, Any],
        block_of: Mapping[int, int],
        installed: Sequence[Install],
        products: Mapping[int, SummedProducts],
    ) -> None:
        """One step of a param group's sharded matrices, with the `products` of their gradients."""
        blocks = [
            block_of[id(param)]
            for param in group["params"]
            if param.grad is not None and block_of.get(id(param)) in self._matrices
        ]
        matrices = [self._matrices[block] for block in blocks]
        states = [self._rule.counted(block, installed[block]) for block in blocks]
        for matrix, state in zip(matrices, states, strict=True):
            state.setdefault("rows", matrix.rows)
        bases = [self._rule.used(block, installed[block]) for block in blocks]
        directions = advance_shards(
            [FourBlockState(*(state[name] for name in FOUR_BLOCK)) for state in states],
            [self._rule.gradient(block) for block in blocks],
            [products[block] for block in blocks],
            [used.out_Og[slice(*m.rows)] for m, used in zip(matrices, bases, strict=True)],
            [used.in_Ia for used in bases],
            [matrix.shape[0] for matrix in matrices],
            steps=[state["step"] for state in states],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
        )
        targets = [matrix.view(matrix.param) for matrix in matrices]
        self._rule.follow(group, targets, matrices, states, directions)

    def _four_block(self, block: int) -> FourBlockState:
        state = self._state[self._matrices[block].param]
        return FourBlockState(*(state[name] for name in FOUR_BLOCK))


def check_saved(name: str, param: Tensor, saved: Mapping[str, Any], is_matrix: bool) -> None:
    """Raise `StateError` where a saved state, if any, has not all that a matrix goes on from, or
    not the rows that this rank has of a parameter."""
    missing = [field for field in FIELDS if is_matrix and saved and field not in saved]
    if missing:
        raise StateError(
            f"the state of {name} has no {', '.join(missing)}: it was saved by another version of "
            "distcurv or is not of this model; load it with what saved it"
        )
    cut = parameter_cut(param)
    if cut is None or not saved:
        return
    rows = saved.get("rows")
    if rows is None and "exp_avg" in saved:
        rows = cut.own if len(saved["exp_avg"]) == cut.own[1] - cut.own[0] else None
    if rows is None or tuple(rows) != cut.own:
        whose = "other rows or the whole of it" if rows is None else f"rows {tuple(rows)}"
        raise StateError(
            f"the state of {name} is of {whose}, this rank has rows {cut.own}: a sharded "
            "state_dict is loaded by the rank that saved it, in a world of the same shape"
        )
