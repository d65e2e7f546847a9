"""Calls: which model is called with what, which loss of its output, and running both.

What a maker is told before a step; `GradientMaker` adds the derivatives and the step itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from distcurv.errors import ConfigError, StateError
from distcurv.makers.dummy_object import DummyObject, default_logits, evaluate
from distcurv.makers.vmap_info import VmapInfo

_NOTHING: Any = object()  # None may be an output


class Calls:
    """Base class of `GradientMaker`.

    Args:
        model: whose parameters are meant; bare or wrapped in DistributedDataParallel.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{type(self).__name__} got {model!r} as model: give an nn.Module")
        self.model = model
        self._model_fn: Callable[..., Any] | None = None
        self._model_args: tuple[Any, ...] = ()
        self._model_kwargs: dict[str, Any] = {}
        self._model_vmap_info: VmapInfo | None = None
        self._model_output: Any = None
        self._dummy_logits = default_logits()
        self._logits: Any = _NOTHING
        self._loss_fn: Callable[..., Any] | None = None
        self._loss_fn_args: tuple[Any, ...] = ()
        self._loss_fn_kwargs: dict[str, Any] = {}
        self._loss_vmap_info: VmapInfo | None = None
        self._dummy_loss: DummyObject | None = None
        self._loss: Any = None

    # -- what is to be run ----------------------------------------------------------------

    def setup_model_call(
        self, model_fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> DummyObject:
        """What `call_model` runs: ``model_fn(*args, **kwargs)``; the model, a method of it, or
        anything else that calls it.  Returns what stands for its output in `setup_loss_call`,
        `setup_loss_repr` and `setup_logits_repr`."""
        if not callable(model_fn):
            raise ConfigError(f"setup_model_call got {model_fn!r}: give a callable, e.g. the model")
        self._model_fn, self._model_args, self._model_kwargs = model_fn, args, kwargs
        return DummyObject()

    def setup_loss_call(self, loss_fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """What `call_loss` runs: ``loss_fn(*args, **kwargs)``, where a `DummyObject` stands for
        (part of) the model's output.  Replaces `setup_loss_repr`."""
        if not callable(loss_fn):
            raise ConfigError(
                f"setup_loss_call got {loss_fn!r}: give a callable, e.g. F.cross_entropy"
            )
        self._loss_fn, self._loss_fn_args, self._loss_fn_kwargs = loss_fn, args, kwargs
        self._dummy_loss = None

    def setup_loss_repr(self, dummy_loss: DummyObject) -> None:
        """The loss as something done to the model's output, e.g. ``dummy_y.loss``.  Replaces
        `setup_loss_call`."""
        self._dummy_loss = _dummy("setup_loss_repr", dummy_loss)
        self._loss_fn, self._loss_fn_args, self._loss_fn_kwargs = None, (), {}

    def setup_logits_repr(self, dummy_logits: DummyObject) -> None:
        """Where the logits are in the model's output; by default its ``logits``, or its first
        item, or the output itself.  Stays until it is called again."""
        self._dummy_logits = _dummy("setup_logits_repr", dummy_logits)
        self._logits = _NOTHING

    def setup_model_vmap_info(self, *args: int | None, **kwargs: int | None) -> None:
        """The batch dimension of each argument of the model call, None for those without; by
        default 0 for tensors, also those in containers.  Only `per_example_loss_grads` asks."""
        self._model_vmap_info = VmapInfo(*args, **kwargs)

    def setup_loss_vmap_info(self, *args: int | None, **kwargs: int | None) -> None:
        """The same for the loss call; what is given for a `DummyObject` is not read.  Needed
        where an argument has no batch dimension, e.g. the weights of the classes."""
        self._loss_vmap_info = VmapInfo(*args, **kwargs)

    # -- running it -----------------------------------------------------------------------

    @property
    def model_output(self) -> Any:
        """What the last `call_model` returned."""
        return self._model_output

    @property
    def loss(self) -> Any:
        """What the last `call_loss` returned."""
        return self._loss

    @property
    def logits(self) -> Any:
        """The logits of the last `call_model`."""
        if self._logits is _NOTHING:
            self._logits = self._dummy_logits.eval(self._model_output)
        return self._logits

    def call_model(self) -> Any:
        """Run the model call; raises `StateError` where there is none."""
        model_fn = self._model_call()
        self._model_output = model_fn(*self._model_args, **self._model_kwargs)
        self._logits = _NOTHING
        return self._model_output

    def call_loss(self) -> Tensor:
        """Run the loss call, or evaluate the loss's representation, on the last output; raises
        `StateError` where neither is set up."""
        self._loss = self._loss_of(self._model_output)
        return self._loss

    @property
    def loss_is_mean(self) -> bool:
        """Whether the loss call averages over samples, as far as its ``reduction`` says; a loss
        without one is taken for a mean."""
        if isinstance(self._loss_fn, nn.Module):
            return getattr(self._loss_fn, "reduction", "mean") == "mean"
        reduction = self._loss_fn_kwargs.get("reduction")
        if reduction is None and self._loss_fn is not None:
            # Also that of a functools.partial.
            named = inspect.signature(self._loss_fn).parameters.get("reduction")
            reduction = named.default if named is not None else None
        return reduction in (None, "mean", inspect.Parameter.empty)

    def _model_call(self) -> Callable[..., Any]:
        if self._model_fn is None:
            raise StateError("no model call is set up: call setup_model_call(model, x) first")
        return self._model_fn

    def _check_loss(self) -> None:
        if self._dummy_loss is None and self._loss_fn is None:
            raise StateError(
                "no loss is set up: call setup_loss_call(loss_fn, dummy_y, t) or "
                "setup_loss_repr(dummy_loss) first"
            )

    def _loss_of(self, output: Any) -> Any:
        return self._loss_with(output, self._loss_fn_args, self._loss_fn_kwargs)

    def _loss_with(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The loss of an output, its call with these arguments instead."""
        self._check_loss()
        if self._dummy_loss is not None:
            return self._dummy_loss.eval(output)
        assert self._loss_fn is not None
        args, kwargs = evaluate((args, kwargs), output)
        return self._loss_fn(*args, **kwargs)


def _dummy(method: str, value: object) -> DummyObject:
    if not isinstance(value, DummyObject):
        raise ConfigError(
            f"{method} got {type(value).__name__}: give what setup_model_call returned, or "
            "something done to it"
        )
    return value
