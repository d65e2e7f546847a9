"""What a maker's loss call says of its loss: its likelihood, its terms and how they are reduced.

Read from the call itself: `F.cross_entropy`, `nn.CrossEntropyLoss`, `F.mse_loss`, `nn.MSELoss` and
partials of them.  Of any other loss nothing is known but its ``reduction``.

Letters: N samples, T terms of a sample, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.errors import ShapeError
from distcurv.train.likelihoods import Categorical, CountsTerms, Gaussian, HasHessian, Likelihood
from distcurv.train.terms import Terms

_MODULES: tuple[tuple[type[nn.Module], Callable[..., Any], tuple[str, ...]], ...] = (
    (
        nn.CrossEntropyLoss,
        F.cross_entropy,
        ("weight", "ignore_index", "reduction", "label_smoothing"),
    ),
    (nn.MSELoss, F.mse_loss, ("reduction",)),
)


class LossCall(NamedTuple):
    """A loss that is known.

    Attributes:
        function: ``F.cross_entropy`` or ``F.mse_loss``.
        arguments: its arguments by name, defaults too.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def is_mean(self) -> bool:
        """Whether it averages over its terms."""
        return bool(self.arguments["reduction"] == "mean")

    def terms(self) -> Terms:
        """The number of its terms, what a mean divides by: of classes those that are not ignored,
        or with class weights the sum of theirs; of squared errors the single outputs."""
        likelihood = self.likelihood(1.0, 1)
        shown = self.arguments["input"].detach()
        if isinstance(likelihood, Categorical) and shown.dim() == 1:
            shown, targets = shown.unsqueeze(0), self.arguments["target"].unsqueeze(0)
        else:
            targets = self.arguments["target"]
        return likelihood.count(shown, targets)

    def likelihood(self, var: float, class_dim: int) -> Categorical | Gaussian:
        """The likelihood that it is the negative logarithm of; of squared errors with this
        variance, the scale of the loss aside."""
        if self.function is F.mse_loss:
            return Gaussian(var, weight=self.arguments.get("weight"))
        return Categorical(
            class_dim,
            weight=self.arguments["weight"],
            label_smoothing=self.arguments["label_smoothing"],
            ignore_index=self.arguments["ignore_index"],
        )


def read_call(
    function: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> LossCall | None:
    """The loss of a call; None where it is not known."""
    if isinstance(function, partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        return read_call(function.func, args, kwargs)
    for module_type, called, names in _MODULES:
        if isinstance(function, module_type):
            # Exactly this class: another's forward may do anything.
            if type(function) is not module_type:
                return None
            kwargs = {**kwargs, **{name: getattr(function, name) for name in names}}
            return read_call(called, args, kwargs)
        if function is called:
            bound = inspect.signature(called).bind(*args, **kwargs)
            bound.apply_defaults()
            return LossCall(called, bound.arguments)
    return None


class ForSampling(NamedTuple):
    """What `Preconditioner.sample` is given; targets None where nothing is masked or weighed."""

    likelihood: Likelihood
    targets: Tensor | None


def for_sampling(call: LossCall | None, loss_type: str, logits: Tensor, var: float) -> ForSampling:
    """The likelihood of logits [N, C], [N, ..., C] or, where the cross-entropy is called with these
    very logits, [N, C, ...]; of squared errors [N, ...].

    Raises `ShapeError` where the loss's targets do not fit the logits."""
    if loss_type == "mse":
        same = call is not None and call.function is F.mse_loss
        return ForSampling(call.likelihood(var, -1) if same and call else Gaussian(var), None)
    if call is None or call.function is not F.cross_entropy:
        return ForSampling(Categorical(), None)
    shown, targets = call.arguments["input"], call.arguments["target"]
    alike = shown.shape == logits.shape and shown.stride() == logits.stride()
    class_dim = 1 if alike and logits.dim() > 2 else -1
    likelihood = call.likelihood(var, class_dim)
    if class_dim == -1:
        targets = _like_terms(targets, shown, logits)
    return ForSampling(likelihood, targets)


def _like_terms(targets: Tensor, shown: Tensor, logits: Tensor) -> Tensor:
    """Targets of logits [N, ..., C] from those that the loss call has."""
    if targets.is_floating_point() and targets.shape == shown.shape:
        if shown.dim() > 2:
            targets = targets.movedim(1, -1)
        wanted: tuple[int, ...] = tuple(logits.shape)
    else:
        wanted = tuple(logits.shape[:-1])
    if targets.numel() != torch.Size(wanted).numel():
        raise ShapeError(
            f"the loss call has targets of shape {tuple(targets.shape)}, and the logits are "
            f"{tuple(logits.shape)}: say with setup_logits_repr which part of the output the loss "
            "is of, e.g. dummy_y.logits[:, :-1]"
        )
    return targets.reshape(wanted)


class FixedCount:
    """A likelihood of which a given number of terms counts: ``data_size``.

    Args:
        likelihood: with a count of its own or without.
        terms: that number.
    """

    def __init__(self, likelihood: Likelihood, terms: int) -> None:
        self._likelihood = likelihood
        self._terms = terms

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The likelihood's."""
        return self._likelihood.sample(logits, generator)

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The likelihood's."""
        return self._likelihood.nll(logits, targets)

    def hessian_factors(self, logits: Tensor) -> Iterator[Tensor]:
        """The likelihood's."""
        assert isinstance(self._likelihood, HasHessian)
        return self._likelihood.hessian_factors(logits)

    def count(self, logits: Tensor, targets: Tensor | None) -> int:
        """The given number."""
        return self._terms

    def weights(self, logits: Tensor, targets: Tensor | None) -> Tensor | None:
        """The likelihood's."""
        assert isinstance(self._likelihood, CountsTerms)
        return self._likelihood.weights(logits, targets)
