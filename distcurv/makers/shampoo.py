"""ShampooGradientMaker: each dimension of a gradient times a root of its own second moment.

The roots are made by the service (`distcurv.curvature.kinds.shampoo`, or ``lowrank`` where
``rank`` is given): by workers, or in process.  Statistics come from the reduced gradient, which is
equal on all ranks, so nothing is reduced over ranks for them.

Sources: Gupta, Koren and Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization";
Anil, Gupta, Koren, Regan and Singer 2020, "Scalable Second Order Optimization for Deep Learning"
(tiles, exponent override, grafting).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcurv.config import ServiceConfig
from distcurv.curvature.modes import apply_modes, encode_modes
from distcurv.curvature.norm_rule import graft_scale
from distcurv.curvature.precision import full_float32
from distcurv.errors import ConfigError, StateError
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.service_settings import refuse_unused, service_settings
from distcurv.makers.shampoo_blocks import Roots, tile_spec
from distcurv.makers.squares import fold_squares, squares_direction
from distcurv.makers.tiles import Tile, tiles_of
from distcurv.optim.arguments import common_device
from distcurv.train import checkpoint, coverage, metrics
from distcurv.train.log import Record
from distcurv.train.pipeline import Pipeline
from distcurv.train.summary import Row, Summary

GRAFTING = ("none", "sgd", "adagrad", "rmsprop")
RMSPROP_DECAY = 0.999


class ShampooGradientMaker(PreconditionedGradientMaker):
    """Shampoo.

    A tensor of k dimensions has k factors, each raised to −1/(2k).  A vector gets diagonal
    Shampoo: its gradient over the root of its squares (AdaGrad), within the step.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: ``damping`` is added to every factor once, at the refresh; ``rank`` gives factors
            of low rank with isotropic tails (``tail_in`` and ``tail_out`` are not read).
        block_size: dimensions that are larger are cut, each tile a block of its own; -1: none is.
        sync_group: for a model that DistributedDataParallel does not wrap: all gradients are
            averaged over this group, which holds all training ranks, after the backward.
        exponent: what factors are raised to, < 0; None: −1/(2k).
        accumulate: ``sum`` of the statistics, as in the paper, or ``ema`` (bias corrected) with
            ``config.ema_decay`` as the weight of a new one, of which those of one update count
            as their mean; without ``ema_decay``: the newest alone.  None: ``ema`` where
            ``ema_decay`` is given, else ``sum``.
        grafting: whose length a parameter's direction gets: ``none`` (its own), ``sgd`` (the
            gradient's), ``adagrad`` or ``rmsprop`` (of squares taken at every step).
        vectors: ``adagrad``, or ``gradient``: left as they are.
        matricise: see tensors of more than two dimensions as matrices [d_0, rest].

    With updates at an interval give ``preconditioner_warmup_steps`` or ``grafting``: the roots of
    the first statistic alone amplify what it has not seen, by damping to the same powers.

    Until a parameter's first install (there is none to wait for without workers), and past
    ``max_staleness`` with ``staleness_policy="fallback"``, its gradient is left as it is.

    Raises `ConfigError` for a setting that cannot work.
    """

    served = True

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        block_size: int = -1,
        sync_group: dist.ProcessGroup | None = None,
        *,
        exponent: float | None = None,
        accumulate: str | None = None,
        grafting: str = "none",
        vectors: str = "adagrad",
        matricise: bool = False,
    ) -> None:
        super().__init__(model, config)
        _check(block_size, exponent, accumulate, grafting, vectors)
        refuse_unused(config, type(self).__name__, "it has the argument grafting")
        self._sync_group = sync_group
        self._grafting = grafting
        if accumulate is None:
            accumulate = "sum" if config.ema_decay is None else "ema"
        self._decay = 1.0 if accumulate == "sum" else 1.0 - (config.ema_decay or 1.0)
        params = self.chosen_parameters()
        self.refuse_sharded()
        if not params:
            raise ConfigError("ShampooGradientMaker: the model has no parameter to precondition")
        self._matrices = {n: p for n, p in params.items() if p.dim() > 1 and p.numel() > 0}
        left = {n: p for n, p in params.items() if n not in self._matrices}
        self._vectors = left if vectors == "adagrad" else {}
        self._tiles: list[Tile] = []
        self._blocks: dict[str, list[int]] = {}  # of each matrix
        for name, param in self._matrices.items():
            view = (len(param), param.numel() // len(param)) if matricise else tuple(param.shape)
            made = tiles_of(name, param, view, None if block_size == -1 else block_size)
            self._blocks[name] = list(range(len(self._tiles), len(self._tiles) + len(made)))
            self._tiles += made
        specs = [tile_spec(tile, config, self._decay, exponent) for tile in self._tiles]
        self._pipeline = Pipeline(
            specs,
            ServiceConfig(
                rank=config.rank or 1, **service_settings(config, None if config.rank else 0)
            ),
            device=common_device(list(params.values())),
            replicated=True,
            workers=config.workers,
            inline_fallback=False,
        )
        self._workers = coverage.told_workers(
            self._pipeline.group, self._pipeline.table, self._pipeline.lanes
        )
        self._roots = Roots(specs, config, exponent)
        self.state["squares"] = {}
        self.state["grafting"] = {}

    # -- the step -------------------------------------------------------------------------

    def backward(self) -> None:
        """The loss's backward, and with ``sync_group`` the average over it."""
        super().backward()
        group = self._sync_group
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if group is None or not grads:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    @torch.no_grad()
    def update_curvature(self) -> None:
        """Hand the statistics of the blocks that this rank owns to the service."""
        pipeline = self._pipeline
        for block, tile in enumerate(self._tiles):
            if tile.param.grad is None or pipeline.table.owners[block] != pipeline.group.rank:
                continue
            basis = pipeline.basis(block).tensors
            statistic = encode_modes(
                pipeline.table.specs[block], tile.of(tile.param.grad).float(), basis
            )
            pipeline.add(block, statistic)
        for name, param in self._vectors.items():
            if param.grad is not None:
                fold_squares(self.state["squares"], name, param.grad, self._decay)

    def update_preconditioner(self) -> None:
        """Nothing: the service's windows end at the same steps."""

    @torch.no_grad()
    def precondition(self) -> None:
        """Install what is due and rewrite ``.grad``."""
        pipeline = self._pipeline
        pipeline.step([p.grad for p in self._matrices.values() if p.grad is not None])
        with full_float32(pipeline.device):
            for name, param in (self._matrices | self._vectors).items():
                if param.grad is None:
                    continue
                length = self._graft_length(name, param.grad)
                if name in self._vectors:
                    direction = self._vector_direction(name, param.grad)
                else:
                    direction = self._matrix_direction(name, param.grad)
                if direction is None:
                    continue
                if length is not None:
                    direction *= graft_scale(length, torch.linalg.vector_norm(direction))
                param.grad.copy_(direction.view_as(param.grad))

    def _vector_direction(self, name: str, grad: Tensor) -> Tensor | None:
        if name not in self.state["squares"]:
            return None
        relative = self.config.damping_form == "relative"
        return squares_direction(
            self.state["squares"], name, grad, self._decay, self.config.damping, relative
        )

    def _matrix_direction(self, name: str, grad: Tensor) -> Tensor | None:
        blocks = self._blocks[name]
        if not all(self._usable(block) for block in blocks):
            return None
        tiles, installed = [self._tiles[b] for b in blocks], self._pipeline.installed
        direction = torch.empty(tiles[0].view, dtype=torch.float32, device=grad.device)
        for block, tile in zip(blocks, tiles, strict=True):
            made = apply_modes(self._roots.of(installed[block]), tile.of(grad).float())
            direction[tuple(slice(*part) for part in tile.cut)] = made
        return direction

    def _usable(self, block: int) -> bool:
        if self._pipeline.installed[block].version == 0:
            return False
        return self.config.staleness_policy == "keep" or not self._pipeline.too_stale(block)

    def _graft_length(self, name: str, grad: Tensor) -> Tensor | None:
        """The length that a parameter's direction is to have; None: its own."""
        if self._grafting == "none":
            return None
        if self._grafting == "sgd":
            return torch.linalg.vector_norm(grad.float())
        decay = 1.0 if self._grafting == "adagrad" else RMSPROP_DECAY
        squares = self.state["grafting"]
        fold_squares(squares, name, grad, decay)
        other = squares_direction(squares, name, grad, decay, self.config.damping, False)
        return torch.linalg.vector_norm(other)

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of the step, the squares and the installed versions; local."""
        return super().state_dict() | {"curvature": checkpoint.save(self._pipeline)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; call it on all ranks at the same step."""
        missing = [key for key in ("squares", "grafting", "curvature") if key not in state_dict]
        if missing:
            raise StateError(
                f"this state_dict has no {', '.join(missing)}: it is not of a ShampooGradientMaker"
            )
        checkpoint.read(self._pipeline, state_dict["curvature"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        device = self._pipeline.device
        for key in ("squares", "grafting"):
            self.state[key] = {name: t.to(device) for name, t in self.state[key].items()}
        checkpoint.load(self._pipeline, state_dict["curvature"])

    # -- what can be asked ----------------------------------------------------------------

    @property
    def install_log(self) -> list[Record]:
        """(step, block, version, folded_from, folded_through) of every install."""
        return self._pipeline.install_log.records()

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, by the index that the install log uses."""
        return [tile.name for tile in self._tiles]

    def summary(self) -> str:
        """What is computed where: each block with its kind and the worker that serves it."""
        served = coverage.block_rows(self._pipeline.table, self._workers)
        rows = [
            Row(tile.name, None, tile.shape, math.prod(tile.shape), True, row, None)
            for tile, row in zip(self._tiles, served, strict=True)
        ]
        for name, param in self.chosen_parameters().items():
            if name not in self._matrices:
                how = "diagonal AdaGrad, within the step" if name in self._vectors else "left as is"
                why = f"no matrix: {how}"
                rows.append(Row(name, None, tuple(param.shape), param.numel(), True, None, why))
        return f"{super().summary()}\n{Summary(tuple(rows))}"

    def metrics(self) -> dict[str, float | int]:
        """Counters of the service, see `distcurv.train.metrics.collect`."""
        return metrics.collect(self._pipeline)

    def close(self) -> None:
        """End threads and links; local and idempotent."""
        self._pipeline.close()


def _check(
    block_size: int, exponent: float | None, accumulate: str | None, grafting: str, vectors: str
) -> None:
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not whole or (block_size < 1 and block_size != -1):
        raise ConfigError(f"block_size is {block_size!r}: give an integer >= 1, or -1 for no tiles")
    if exponent is not None and not (-math.inf < exponent < 0):
        raise ConfigError(f"exponent is {exponent!r}: give a number < 0, or None for -1/(2k)")
    for name, value, words in (
        ("accumulate", accumulate, ("sum", "ema", None)),
        ("grafting", grafting, GRAFTING),
        ("vectors", vectors, ("adagrad", "gradient")),
    ):
        if value not in words:
            raise ConfigError(f"{name} is {value!r}: use {', '.join(map(str, words))}")
