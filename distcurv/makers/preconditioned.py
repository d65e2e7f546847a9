"""PreconditionedGradientMaker: what all makers share that do more than a gradient.

A step is: forward and backward, then, where they are due, an update of the curvature and one of
the preconditioner, then the preconditioning of ``.grad``.  Makers that are *served* hand curvature
to the service (`distcurv.train`), whose workers may update the preconditioner; the others do all of
it within the step, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from distcurv.errors import ConfigError, StateError
from distcurv.layers.local_part import parameter_cut
from distcurv.makers.grad_maker import GradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.train.discover import bare_model, ignored_ids, named_parameters


class PreconditionedGradientMaker(GradientMaker):
    """Base class; a subclass says what an update and the preconditioning are.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: when and how.

    Attributes:
        served: whether the expensive part runs through the service.
        state: what `state_dict` holds: ``step`` and what the subclass adds, tensors by name.

    Raises `ConfigError` for a config of another class, unusable ``ignore_modules``, and for
    ``accumulation`` or sharded parameters where curvature is of one batch.
    """

    served = False

    def __init__(self, model: nn.Module, config: PreconditioningConfig) -> None:
        super().__init__(model)
        if not isinstance(config, PreconditioningConfig):
            raise ConfigError(
                f"{type(self).__name__} got a {type(config).__name__} as config: give a "
                "PreconditioningConfig"
            )
        self.config = config
        self.state: dict[str, Any] = {"step": 0}
        self._preconditioner_times = config.preconditioner_times()
        self._curvature_times = config.curvature_times()
        self._micro_batches = 0  # of this step so far
        ignored_ids(bare_model(model), config.ignore_modules or ())
        if config.accumulation > 1 and not self.served:
            raise ConfigError(
                f"PreconditioningConfig.accumulation is {config.accumulation}: the curvature of "
                f"{type(self).__name__} is of one batch, leave it out"
            )
        if not self.served:
            self.refuse_sharded()

    # -- the step -------------------------------------------------------------------------

    def forward_and_backward(self) -> tuple[Any, Tensor]:
        """One training step's gradient, preconditioned, in ``.grad``: (output, loss).

        With ``config.accumulation`` k a step takes k calls: all but the last add the plain gradient
        to ``.grad``."""
        step = self.state["step"]
        if self._micro_batches == 0:
            self.startup()
        self.forward()
        self.backward()
        self._micro_batches = (self._micro_batches + 1) % self.config.accumulation
        if self._micro_batches:
            return self._model_output, self._loss
        if self.do_update_curvature(step):
            self.update_curvature()
        if self.do_update_preconditioner(step):
            self.update_preconditioner()
        self.precondition()
        self.state["step"] = step + 1
        return self._model_output, self._loss

    def do_update_curvature(self, step: int) -> bool:
        """Whether statistics are taken at this step."""
        return self._curvature_times.due(step)

    def do_update_preconditioner(self, step: int) -> bool:
        """Whether the preconditioner is updated at this step."""
        return self._preconditioner_times.due(step)

    def startup(self) -> None:
        """Before the forward."""

    def update_curvature(self) -> None:
        """Take statistics of this step."""

    def update_preconditioner(self) -> None:
        """Make a new preconditioner of the statistics."""

    def precondition(self) -> None:
        """Rewrite ``.grad``."""
        raise NotImplementedError

    # -- parameters -------------------------------------------------------------------------

    def chosen_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, without those of ``ignore_modules``."""
        bare = bare_model(self.model)
        ignored = ignored_ids(bare, self.config.ignore_modules or ())
        alone = {
            id(parameter)
            for module in bare.modules()
            if id(module) in ignored
            for parameter in module.parameters(recurse=False)
        }
        return {
            name: parameter
            for name, parameter in named_parameters(bare)
            if parameter.requires_grad and id(parameter) not in alone
        }

    def require_parameters(self) -> None:
        """Raise `ConfigError` where there is nothing to precondition."""
        if not self.chosen_parameters():
            raise ConfigError(
                f"{type(self).__name__} finds no trained parameter that ignore_modules leaves it: "
                "call requires_grad_() on the model, or ignore less"
            )

    def refuse_sharded(self) -> None:
        """Raise `ConfigError` where `fully_shard` has cut a parameter."""
        for name, parameter in named_parameters(bare_model(self.model)):
            if parameter_cut(parameter) is not None:
                raise ConfigError(
                    f"{type(self).__name__}: the parameter {name} is sharded; use "
                    "DistributedDataParallel, or distcurv.Preconditioner or SoapGradientMaker, "
                    "which take shards"
                )

    # -- ranks ----------------------------------------------------------------------------

    @property
    def wrapper(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel that the model is trained in: the maker's model, or what
        `setup_model_call` was given (it, or a method of it)."""
        for module in (self.model, self._model_fn, getattr(self._model_fn, "__self__", None)):
            if isinstance(module, DistributedDataParallel):
                return module
        return None

    @property
    def world_size(self) -> int:
        """Ranks that the model is trained on: those of its DistributedDataParallel."""
        wrapper = self.wrapper
        return 1 if wrapper is None else dist.get_world_size(wrapper.process_group)

    @property
    def own_rank(self) -> int:
        """This rank among them."""
        wrapper = self.wrapper
        return 0 if wrapper is None else dist.get_rank(wrapper.process_group)

    def numbers_of_ranks(self, numbers: Sequence[int]) -> list[list[int]]:
        """These integers, as many on every rank, of each rank, in a collective."""
        wrapper = self.wrapper
        if wrapper is None or self.world_size == 1:
            return [list(numbers)]
        device = next(self.model.parameters()).device
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own, group=wrapper.process_group)
        return [found.tolist() for found in every]

    def rows_of_ranks(self, rows: int) -> list[int]:
        """How many rows each rank has, in a collective."""
        return [count for (count,) in self.numbers_of_ranks([rows])]

    def gather_rows(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows (dimension 0) of all ranks, rank after rank, in a collective; ``counts`` is what
        `rows_of_ranks` said."""
        wrapper = self.wrapper
        if wrapper is None or self.world_size == 1:
            return tensor
        # Collectives want equal shapes.
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded, group=wrapper.process_group)
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

    def average_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        """Average in place over the ranks of the model's DistributedDataParallel, in one
        collective: for what is made past its backward.  Gradients of the backward itself are
        averaged already."""
        wrapper = self.wrapper
        if wrapper is None or self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=wrapper.process_group)
        flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of the step and of all that the next one depends on; local."""
        copied: dict[str, Any] = _copy(self.state)
        return copied

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker, of which copies are kept.

        Raises `StateError` for something else."""
        step = state_dict.get("step")
        if not isinstance(step, int) or step < 0:
            raise StateError(
                f"this state_dict has the entries {sorted(state_dict)}: one of a "
                f"{type(self).__name__} has 'step', a number of steps"
            )
        self.state = _copy(dict(state_dict))
        self._micro_batches = 0  # the gradient of a begun step is not in a state

    def summary(self) -> str:
        """What is computed where."""
        return (
            f"{type(self).__name__}: computed on the ranks, within the step"
            if not self.served
            else f"{type(self).__name__}: served, workers={self.config.workers!r}"
        )

    def metrics(self) -> dict[str, float | int]:
        """Counters of the service, see `distcurv.train.metrics.collect`; empty where nothing is
        served."""
        return {}

    def close(self) -> None:
        """End what the maker has started; local and idempotent."""


def _copy(state: Any) -> Any:
    return tree_map(
        lambda value: value.detach().clone() if isinstance(value, Tensor) else value, state
    )
