"""Gradients rewritten with the installed versions, at every step and as cheaply as that goes.

What can be worked out from a version alone (inverses for the damping, laid out for the apply) is
made once and kept.  On the CPU every gradient is rewritten where it lies.  On other devices, where
a small product takes less time than its launch, blocks of one shape go through it together.

Letters: n blocks of one group, O output features, I input features with the bias coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.config import KfacConfig
from distcurv.curvature.apply import (
    AffineGradient,
    Applied,
    Prepared,
    apply,
    finish,
    prepare_block,
)
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.norm_rule import graft_scale, kl_clip_scale
from distcurv.curvature.precision import full_float32
from distcurv.curvature.spec import BlockSpec
from distcurv.layers.shards import BlockShard
from distcurv.train.rewrite_shards import ShardRewriter
from distcurv.train.switch import Install

# Blocks of up to so many numbers are grouped: copying them costs less than the launches it spares.
MOST_NUMBERS_IN_BLOCK = 1 << 20
MOST_NUMBERS_IN_GROUP = 1 << 23  # what a group's copy may take


class _Kept(NamedTuple):
    installs: list[Install]
    dampings: list[float]
    bias: bool
    prepared: Prepared


class _Working(NamedTuple):
    """A group in the middle of a step; ``grad`` is float32 and may be the gradient itself."""

    blocks: list[int]
    grad: AffineGradient
    applied: Applied


class Rewriter:
    """Applies a model's installed versions to its gradients.

    Args:
        specs: the blocks in table order.
        config: norm rule.
        device: where gradients and installed tensors are.
        grouped: whether small blocks of one shape go together; None: on all devices but the CPU.
        grafts: by block, whether it is grafted; None: all of them as the config says.
        shards: the blocks of which this rank has a part, by index; `rewrite` gets their parts.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        config: KfacConfig,
        device: torch.device,
        grouped: bool | None = None,
        grafts: Sequence[bool] | None = None,
        shards: Mapping[int, BlockShard] | None = None,
    ) -> None:
        self._specs = specs
        self._config = config
        self._device = device
        self._grafts = [config.graft] * len(specs) if grafts is None else grafts
        grouped = device.type != "cpu" if grouped is None else grouped
        self._shards = ShardRewriter(specs, config, self._grafts, shards) if shards else None
        self._groups = _groups(specs, self._grafts, grouped, shards or ())
        self._kept: dict[int, _Kept] = {}  # by index of the group

    def rewrite(
        self,
        grads: Mapping[int, AffineGradient],
        installed: Sequence[Install],
        dampings: Sequence[float],
        lr: float | None,
    ) -> None:
        """Overwrite gradients with their directions after the norm rule; waits for no device.

        Args:
            grads: by block; of any float dtype and memory format.
            installed: by block, all on version 1 or later where there is a gradient.
            dampings: by block.
            lr: learning rate for ``kl_clip``.
        """
        with full_float32(self._device):
            working = []
            if self._shards is not None:
                self._shards.begin(grads, installed, dampings)
            for index, group in enumerate(self._groups):
                blocks = [block for block in group if block in grads]
                if blocks:
                    working.append(self._begin(index, blocks, grads, installed, dampings))
            if self._shards is not None:
                working += [
                    _Working([block], grad, applied)
                    for block, grad, applied in self._shards.complete()
                ]
            clip = self._config.kl_clip
            common: Tensor | None = None
            if clip is not None and lr is not None and working:
                inner = [w.applied.inner for w in working if w.applied.inner is not None]
                common = kl_clip_scale(inner, clip, lr)
            for blocks, grad, applied in working:
                scale = common
                if applied.grad_norm is not None and applied.norm is not None:
                    scale = graft_scale(applied.grad_norm, applied.norm)
                finish(grad, applied.row_O1, scale)
                _put_back([grads[block] for block in blocks], grad)

    def _begin(
        self,
        index: int,
        blocks: list[int],
        grads: Mapping[int, AffineGradient],
        installed: Sequence[Install],
        dampings: Sequence[float],
    ) -> _Working:
        grad = _together([grads[block] for block in blocks])
        bias = grad.bias_O is not None
        installs = [installed[block] for block in blocks]
        own = [dampings[block] for block in blocks]
        kept = self._kept.get(index)
        if (
            kept is None
            or kept.dampings != own
            or kept.bias != bias
            or len(kept.installs) != len(installs)
            or any(a is not b for a, b in zip(kept.installs, installs, strict=True))
        ):
            prepared = self._prepare(self._specs[blocks[0]], installs, own, bias)
            kept = self._kept[index] = _Kept(installs, own, bias, prepared)
        graft, clips = self._grafts[blocks[0]], self._config.kl_clip is not None
        applied = apply(kept.prepared, grad, norms=graft, inner=clips)
        return _Working(blocks, grad, applied)

    def _prepare(
        self, spec: BlockSpec, installs: list[Install], dampings: list[float], bias: bool
    ) -> Prepared:
        tensors = installs[0].tensors
        if len(installs) > 1:
            tensors = {
                name: torch.stack([install.tensors[name] for install in installs])
                for name in tensors
            }
        damping: float | Tensor = dampings[0]
        if any(other != damping for other in dampings):
            damping = torch.tensor(dampings, dtype=torch.float64, device=self._device)
        inverses = KINDS[spec.kind].inverses(spec, tensors, damping, spec.relative_damping)
        return prepare_block(inverses, bias=bias)


def _groups(
    specs: Sequence[BlockSpec],
    grafts: Sequence[bool],
    grouped: bool,
    without: Container[int] = (),
) -> list[list[int]]:
    """Blocks that go together, in the order of their first one."""
    groups: list[list[int]] = []
    open_groups: dict[object, list[int]] = {}  # to be added to, by shape
    for block, spec in enumerate(specs):
        if block in without:
            continue
        numbers = math.prod(side.dim for side in spec.sides)
        shared = grouped and numbers <= MOST_NUMBERS_IN_BLOCK
        key = (spec.shape_key(), grafts[block]) if shared else block
        group = open_groups.get(key)
        if group is None or numbers * (len(group) + 1) > MOST_NUMBERS_IN_GROUP:
            group = open_groups[key] = []
            groups.append(group)
        group.append(block)
    return groups


def _together(grads: Sequence[AffineGradient]) -> AffineGradient:
    """One gradient to work on: float32 with contiguous rows; several as one batch [n, O, I]."""
    if len(grads) == 1:
        ((weight_OD, bias_O),) = grads
        return AffineGradient(
            weight_OD.float().contiguous(), None if bias_O is None else bias_O.float()
        )
    first = grads[0].weight_OD
    columns = first.shape[1] + (grads[0].bias_O is not None)
    batch_nOI = first.new_empty(len(grads), first.shape[0], columns, dtype=torch.float32)
    targets, sources = _parts(batch_nOI, grads)
    torch._foreach_copy_(targets, sources)
    return AffineGradient(batch_nOI, None)


def _put_back(grads: Sequence[AffineGradient], worked: AffineGradient) -> None:
    """Write what was worked on into the gradients, where it is not they themselves."""
    if len(grads) == 1:
        for target, source in zip(grads[0], worked, strict=True):
            if target is not None and source is not None and target is not source:
                target.copy_(source)
        return
    sources, targets = _parts(worked.weight_OD, grads)
    torch._foreach_copy_(targets, sources)


def _parts(batch_nOI: Tensor, grads: Sequence[AffineGradient]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the batch and the parts of the gradients that they stand for, in the same order."""
    views: list[Tensor] = []
    parts: list[Tensor] = []
    for matrix_OI, (weight_OD, bias_O) in zip(batch_nOI.unbind(), grads, strict=True):
        views.append(matrix_OI[:, : weight_OD.shape[1]])
        parts.append(weight_OD)
        if bias_O is not None:
            views.append(matrix_OI[:, -1])
            parts.append(bias_O)
    return views, parts
