"""GradientMaker: a forward and backward pass as an object, to be swapped with the algorithm.

The interface is ASDL's (Osawa et al. 2023, "ASDL: A Unified Interface for Gradient
Preconditioning in PyTorch"): the user says which model is called with what and what the loss is of
its output; the maker runs it, and leaves the gradient, or what it makes of it, in ``.grad``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distcurv.errors import StateError
from distcurv.makers.functional import Functional

LOSS_CROSS_ENTROPY = "cross_entropy"
LOSS_MSE = "mse"


class GradientMaker(Functional):
    """The gradient itself, and the base class of all others.

    Args:
        model: whose gradient is made; bare or wrapped in DistributedDataParallel.

    Example::

        gm = GradientMaker(model)
        for x, t in batches:
            optimizer.zero_grad()
            dummy_y = gm.setup_model_call(model, x)
            gm.setup_loss_call(F.cross_entropy, dummy_y, t)
            y, loss = gm.forward_and_backward()
            optimizer.step()
    """

    def forward(self) -> None:
        """`call_model` and `call_loss`."""
        self.call_model()
        self.call_loss()

    def backward(self) -> None:
        """The loss's backward: adds to ``.grad``."""
        if self._loss is None:
            raise StateError("there is no loss yet: call forward() before backward()")
        self._loss.backward()

    def forward_and_backward(self) -> tuple[Any, Tensor]:
        """Run model and loss and leave the gradient in ``.grad``: (output, loss)."""
        self.forward()
        self.backward()
        return self._model_output, self._loss

    def delegate_forward_and_backward(
        self, other: GradientMaker, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Have another maker run what is set up here, with ``*args`` and ``**kwargs`` for its
        `forward_and_backward`; output and loss become those of this one as well."""
        other.setup_model_call(self._model_call(), *self._model_args, **self._model_kwargs)
        self._check_loss()
        if self._dummy_loss is not None:
            other.setup_loss_repr(self._dummy_loss)
        elif self._loss_fn is not None:
            other.setup_loss_call(self._loss_fn, *self._loss_fn_args, **self._loss_fn_kwargs)
        other.setup_logits_repr(self._dummy_logits)
        other._model_vmap_info, other._loss_vmap_info = self._model_vmap_info, self._loss_vmap_info
        self._model_output, self._loss = other.forward_and_backward(*args, **kwargs)
        self._logits = other._logits
        return self._model_output, self._loss
