"""SKFAC on the ranks: K-FAC whose sides are inverted by the rows of the batch.

The rows are of no use to a worker: they are the batch itself, and the inverse is cheap.  So it is
taken within the step, on every rank alike, from the rows of all ranks.  A step that takes
statistics waits for the device: the number of rows decides what is computed.

Letters: n rows, d dimensions of a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcurv.curvature.apply import AffineGradient, apply, finish, prepare_block
from distcurv.curvature.batch_side import averaged, invert_side, side_of_rows, trace_of_side
from distcurv.curvature.damping import split_damping
from distcurv.curvature.precision import full_float32
from distcurv.curvature.spec import SIDE_NAMES, BlockSpec, SideSpec, Tensors
from distcurv.errors import CaptureError, ConfigError, StateError
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.rows_layer import RowsLayer, rows_of
from distcurv.train.capture import Capture
from distcurv.train.captured_block import Watched
from distcurv.train.discover import FoundLayer


class SwiftKron:
    """The blocks of shape ``swift_kron``.

    Args:
        blocks: with two sides, of modules, whose parameters are not shared.
        config: damping, average and weight sharing.
        fisher_type: ``empirical | mc | exact``.
        damping: of F without the maker's scale.
        outputs_add: several draws or factors a step, see `RowsLayer`.

    Attributes:
        capture: to be told of the loss like a `Preconditioner`.
        state: by block and side the average ``held`` with its ``weight``, and what was
            ``installed`` at the last update, as rows or as a matrix.

    Raises `ConfigError` for what it does not do: norm rules.
    """

    def __init__(
        self,
        blocks: Sequence[FoundLayer],
        config: PreconditioningConfig,
        *,
        fisher_type: str,
        damping: float,
        outputs_add: bool,
    ) -> None:
        if config.kl_clip is not None or config.graft:
            raise ConfigError("swift_kron has no kl_clip and no graft: leave them unset")
        if config.accumulation > 1:
            raise ConfigError(
                f"PreconditioningConfig.accumulation is {config.accumulation}: swift_kron takes "
                "one batch, give the shape 'kron'"
            )
        watched = {}
        self._blocks = {block.name: block for block in blocks}
        self._bias: dict[str, bool] = {}
        for block in blocks:
            layer: Any = block.layer
            bias = self._bias[block.name] = layer.trains_bias(block.module)
            sides = [SideSpec(d, d, "none", "dense") for d in layer.dims(block.module, bias)]
            spec = BlockSpec(block.name, "dense", tuple(sides), 0.0)
            watched[block.name] = Watched(block.module, RowsLayer(layer, outputs_add), spec)
        self.capture = Capture(
            watched,
            accumulation=config.accumulation,
            fisher_type=fisher_type,
            weight_sharing=config.weight_sharing,  # type: ignore[arg-type]
            seed=config.seed,
        )
        self._decay = None if config.ema_decay is None else 1.0 - config.ema_decay
        self._damping = damping
        self._relative = config.damping_form == "relative"
        self._seen: dict[str, Tensors] = {}
        self._prepared: dict[str, Any] = {}
        self.state: dict[str, Any] = {"weight": {}, "held": {}, "installed": {}}

    # -- the step -------------------------------------------------------------------------

    def arm(self) -> None:
        """Watch the coming forward."""
        self.capture.disarm()
        self._seen = {}
        self.capture.arm({name: {} for name in self._blocks}, self._sink)

    def _sink(self, name: str, statistic: Tensors) -> None:
        if name in self._seen:
            raise CaptureError(f"swift_kron takes one backward a step: {name} had several")
        self._seen[name] = statistic

    @torch.no_grad()
    def update_curvature(self, group: dist.ProcessGroup | None) -> None:
        """Fold the step's rows, those of all ranks of the group, into the average.

        A block of which no rank has finite rows keeps its average.  Raises `CaptureError` for a
        module that has run several times."""
        self.capture.finish()
        decay = self._decay or 0.0
        held, weights = self.state["held"], self.state["weight"]
        for key, new in self._means(group).items():
            weight = weights.get(key, 0.0)
            total = decay * weight + 1.0 - decay
            old_share, new_share = decay * weight / total, (1.0 - decay) / total
            held[key] = averaged(held.get(key, new), old_share, new, new_share)
            weights[key] = total
        self._seen = {}

    def update_preconditioner(self) -> None:
        """Invert what is held."""
        self.state["installed"] = dict(self.state["held"])
        self._prepare()

    @torch.no_grad()
    def precondition(self, factor: float) -> None:
        """Rewrite ``.grad``, times a factor; before the first update leave it as it is."""
        for name, prepared in self._prepared.items():
            block, bias = self._blocks[name], self._bias[name]
            grad = block.layer.gradient(block.module, bias)
            if grad is None:
                continue
            work = AffineGradient(
                grad.weight_OD.float().clone(),
                None if grad.bias_O is None else grad.bias_O.float().clone(),
            )
            with full_float32(work.weight_OD.device):
                applied = apply(prepared, work)
                finish(work, applied.row_O1, torch.tensor(factor, device=work.weight_OD.device))
            like = grad.weight_OD.dtype
            made = AffineGradient(*(None if part is None else part.to(like) for part in work))  # type: ignore[arg-type]
            block.layer.write_gradient(block.module, bias, made)

    # -- the maths ------------------------------------------------------------------------

    def _means(self, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Each side's mean over the rows of all ranks, by ``block/side``; only of blocks that have
        any."""
        keys = [(name, side) for name in self._blocks for side in SIDE_NAMES]
        seen = [self._seen.get(name) or self._nothing(name) for name, _ in keys]
        local = [rows_of(own, side) for own, (_, side) in zip(seen, keys, strict=True)]
        counts = torch.stack(
            [own[f"{side}.count"].double() for own, (_, side) in zip(seen, keys, strict=True)]
        )
        rows = [0 if part.shape[0] == part.shape[1] else len(part) for part in local]
        positions = counts[::2].tolist()
        for (name, _), n, run in zip(
            keys, rows, [p for p in positions for _ in SIDE_NAMES], strict=True
        ):
            # Rows of several calls have been added up.  (A matrix may be a sum.)
            if n and run not in (n, 0):
                raise CaptureError(
                    f"swift_kron takes modules that run once in a forward: {name} has run "
                    f"{run / n:g} times; give it the shape 'kron'"
                )
        if group is not None and dist.get_world_size(group) > 1:
            local, counts = _of_all_ranks(local, counts, group)
        found = counts.tolist()
        empty = {name for (name, _), count in zip(keys, found, strict=True) if count == 0}
        return {
            f"{name}/{side}": part / (count if part.shape[0] == part.shape[1] else count**0.5)
            for (name, side), part, count in zip(keys, local, found, strict=True)
            if name not in empty
        }

    def _nothing(self, name: str) -> Tensors:
        """What a block that has not run shows."""
        made: Tensors = {}
        like = self._parameter(name)
        for side, spec in self.capture.blocks[name].sides.items():
            made[f"{side}.Y"] = like.new_zeros(0, spec.dim, dtype=torch.float32)
            for entry in ("trace", "count"):
                made[f"{side}.{entry}"] = like.new_zeros((), dtype=torch.float32)
        return made

    def _parameter(self, name: str) -> Tensor:
        block = self._blocks[name]
        return block.module.get_parameter(block.layer.parameter_names(block.module)[0]).detach()

    def _prepare(self) -> None:
        self._prepared = {}
        installed = self.state["installed"]
        for name in self._blocks:
            if f"{name}/{SIDE_NAMES[0]}" not in installed:
                continue
            sides = [installed[f"{name}/{side}"] for side in SIDE_NAMES]
            dampings = split_damping(
                self._damping,
                [trace_of_side(side) for side in sides],
                [side.shape[1] for side in sides],
                self._relative,
            )
            inverses = [
                invert_side(side, own, torch.float32)
                for side, own in zip(sides, dampings, strict=True)
            ]
            self._prepared[name] = prepare_block(inverses, bias=self._bias[name])

    # -- state ----------------------------------------------------------------------------

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state``.  Raises `StateError` for one of other blocks."""
        self._check(state)
        device = self._parameter(next(iter(self._blocks))).device
        self.state = {"weight": dict(state["weight"])}
        for key in ("held", "installed"):
            self.state[key] = {
                name: t.detach().clone().to(device) for name, t in state[key].items()
            }
        self._prepare()

    def _check(self, state: Mapping[str, Any]) -> None:
        """A side is some rows of its dimension, and known by both sides or not at all."""
        dims = {
            f"{name}/{side}": spec.dim
            for name in self._blocks
            for side, spec in self.capture.blocks[name].sides.items()
        }
        for part in ("held", "installed"):
            for key, side in state[part].items():
                shape = tuple(side.shape)
                if key not in dims or len(shape) != 2 or shape[1] != dims[key]:
                    raise StateError(
                        f"this state_dict has {key!r} of shape {shape}: here it has "
                        f"{dims.get(key)} dimensions; was it made for another model?"
                    )
        pairs = {frozenset(f"{name}/{side}" for side in SIDE_NAMES) for name in self._blocks}
        known = set(state["held"])
        if set(state["weight"]) != known or any(0 < len(pair & known) < 2 for pair in pairs):
            raise StateError(f"this state_dict has only {sorted(known)} of swift_kron's sides")

    def describe(self) -> list[str]:
        """A line for each block."""
        return [
            f"{name} ({type(block.module).__name__}): swift_kron, on the ranks, within the step"
            for name, block in self._blocks.items()
        ]

    def close(self) -> None:
        """Watch nothing any more."""
        self.capture.disarm()


def _of_all_ranks(
    local: Sequence[Tensor], counts: Tensor, group: dist.ProcessGroup
) -> tuple[list[Tensor], Tensor]:
    """The rows of all ranks together, or where these are not fewer than d the sum of matrices."""
    world = dist.get_world_size(group)
    counts = counts.clone()
    dist.all_reduce(counts, group=group)
    own = torch.tensor([len(part) for part in local], device=counts.device)
    sizes = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(sizes, own, group=group)
    by_side = torch.stack(sizes).T.tolist()
    joined = []
    for part, lengths in zip(local, by_side, strict=True):
        d = part.shape[1]
        if max(lengths) == d or sum(lengths) >= d:
            matrix = part.clone() if len(part) == d else part.mT @ part
            dist.all_reduce(matrix, group=group)
            joined.append(matrix)
            continue
        longest = max(lengths)
        if longest == 0:
            joined.append(part)
            continue
        padded = part.new_zeros(longest, d)
        padded[: len(part)] = part
        every = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(every, padded, group=group)
        rows = [one[:length] for one, length in zip(every, lengths, strict=True)]
        joined.append(side_of_rows(torch.cat(rows)))
    return joined, counts
