"""The four-block rule over an optimizer's matrices: the bases in use, the state, the update.

The bases in use are those of the installed version, rotated within their span so that they
continue the bases before them (see `distcurv.curvature.steady_basis`).  The rotation is part of a
matrix's state; statistics go to the service against the installed basis itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.direction import Direction
from distcurv.curvature.four_block import advance
from distcurv.curvature.four_block_parts import Projections, project
from distcurv.curvature.four_block_state import FourBlockState, init_state
from distcurv.curvature.four_block_turn import turn
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.curvature.statistics import encode_gradient
from distcurv.curvature.steady_basis import steady_rotation
from distcurv.optim.matrices import Matrix
from distcurv.train.switch import Install

FOUR_BLOCK = FourBlockState._fields
_ROTATIONS = ("rotation_out", "rotation_in")
# What a matrix's state holds beside its step count; all of it in float32.
FIELDS = (*FOUR_BLOCK, *_ROTATIONS)


class Bases(NamedTuple):
    """U_G [Do, g] and U_A [Di, a] as they are used."""

    out_Og: Tensor
    in_Ia: Tensor


class MatrixRule:
    """The rule of one optimizer.

    Args:
        matrices: by block.
        state: the optimizer's state by parameter.
        follow: what is done with directions; called as `descend`, which is the default.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        state: MutableMapping[Tensor, dict[str, Any]],
        follow: Callable[..., None] | None = None,
    ) -> None:
        self.follow = follow or descend
        self._matrices = matrices
        self._state = state
        self._bases: dict[int, Bases] = {}

    def project(self, block: int, installed: Install) -> Projections:
        """The projections of a block's gradient on the bases in use."""
        return project(self.gradient(block), *self.used(block, installed))

    def statistic(
        self, spec: BlockSpec, block: int, basis: Install, made: Projections | None
    ) -> Tensors:
        """A block's statistic of its gradient against ``basis``.

        ``made`` are its projections on the bases in use, where these are of that very version."""
        grad_OI = self.gradient(block)
        if made is None:
            return encode_gradient(spec, grad_OI, basis.tensors)
        state = self._state[self._matrices[block].param]
        in_Oa, out_gI = made
        if state:
            in_Oa = None if in_Oa is None else in_Oa @ state["rotation_in"].mT
            out_gI = None if out_gI is None else state["rotation_out"] @ out_gI
        return encode_gradient(spec, grad_OI, basis.tensors, grad_Ua=in_Oa, Ug_grad=out_gI)

    def gradient(self, block: int) -> Tensor:
        """What this rank has of a block's gradient, as a matrix in float32."""
        matrix = self._matrices[block]
        assert matrix.param.grad is not None
        return matrix.view(matrix.param.grad).float()

    def turn(self, old: Install, new: Install, *, early: bool) -> None:
        """Carry a block's state over to a new version.

        In the early phase the eigenvectors are taken as they are: the first factors have directions
        that no gradient has had, and a basis that continued them would keep what rounding chose.
        """
        state = self._state[self._matrices[new.block].param]
        if not state:
            self.forget(new.block)
            return
        before, after = self.rebase(old, new, early=early)
        turned = turn(FourBlockState(*(state[name] for name in FOUR_BLOCK)), *before, *after)
        state.update(zip(FOUR_BLOCK, turned, strict=True))

    def rebase(self, old: Install, new: Install, *, early: bool) -> tuple[Bases, Bases]:
        """Take up a new version's bases; those in use before and after."""
        state = self._state[self._matrices[new.block].param]
        before = self.used(new.block, old)
        for name, side, used in zip(_ROTATIONS, ("G", "A"), before, strict=True):
            U, lam = new.tensors[f"{side}.U"], new.tensors[f"{side}.lam"]
            state[name] = torch.eye(len(lam)).to(U) if early else steady_rotation(U, lam, used)
        del self._bases[new.block]
        return before, self.used(new.block, new)

    def update(
        self,
        group: dict[str, Any],
        block_of: Mapping[int, int],
        installed: Sequence[Install],
        projections: Mapping[int, Projections],
    ) -> None:
        """One step of a param group's matrices."""
        blocks = [
            block_of[id(param)]
            for param in group["params"]
            if param.grad is not None and id(param) in block_of
        ]
        matrices = [self._matrices[block] for block in blocks]
        states = [self.counted(block, installed[block]) for block in blocks]
        bases = [self.used(block, installed[block]) for block in blocks]
        directions = advance(
            [FourBlockState(*(state[name] for name in FOUR_BLOCK)) for state in states],
            [m.view(m.param.grad) for m in matrices if m.param.grad is not None],
            [used.out_Og for used in bases],
            [used.in_Ia for used in bases],
            steps=[state["step"] for state in states],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            projections=[projections.get(block) for block in blocks],
        )
        self.follow(group, [matrix.param for matrix in matrices], matrices, states, directions)

    def forget(self, block: int) -> None:
        """The bases in use of a block that has no state yet: they are those of its next version."""
        self._bases.pop(block, None)

    def used(self, block: int, install: Install) -> Bases:
        """The bases in use, on the installed version."""
        if block not in self._bases:
            out_Og, in_Ia = install.tensors["G.U"], install.tensors["A.U"]
            state = self._state[self._matrices[block].param]
            if state:
                out_Og, in_Ia = out_Og @ state["rotation_out"], in_Ia @ state["rotation_in"]
            self._bases[block] = Bases(out_Og, in_Ia)
        return self._bases[block]

    def counted(self, block: int, install: Install) -> dict[str, Any]:
        """A matrix's state with its step counted on."""
        matrix = self._matrices[block]
        state = self._state[matrix.param]
        if not state:
            rank_out, rank_in = (install.tensors[f"{side}.U"].shape[-1] for side in ("G", "A"))
            device = matrix.param.device
            here = None if matrix.rows is None else matrix.rows[1] - matrix.rows[0]
            first = init_state(matrix.shape, rank_out, rank_in, rows=here, device=device)
            state.update(zip(FOUR_BLOCK, first, strict=True))
            state["rotation_out"] = torch.eye(rank_out, dtype=torch.float32, device=device)
            state["rotation_in"] = torch.eye(rank_in, dtype=torch.float32, device=device)
            state["step"] = 0
        state["step"] += 1
        return state


def descend(
    group: Mapping[str, Any],
    targets: Sequence[Tensor],
    matrices: Sequence[Matrix],
    states: Sequence[Mapping[str, Any]],
    directions: Sequence[Direction],
) -> None:
    """Move the parameters (or what this rank has of them, ``targets``) along their directions."""
    lr = float(group["lr"])
    if targets and group["weight_decay"]:
        torch._foreach_mul_(list(targets), 1 - lr * group["weight_decay"])
    for target, matrix, state, direction in zip(targets, matrices, states, directions, strict=True):
        if state["step"] == 1:
            # The first basis diagonalises this very gradient: beside the diagonal there is
            # only rounding, which the division by its own size would make a full update.
            continue
        if target.is_contiguous() and target.dtype == torch.float32:
            direction.subtract_from(target.view(len(target), matrix.shape[1]), lr)
        else:
            target.sub_(direction.dense().view(target.shape).mul_(lr))
