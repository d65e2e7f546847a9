"""Derivatives of what a maker has set up, as methods.

Nothing here touches ``.grad`` unless it says so, and the model's buffers stay as they are.  All
results follow the trained parameters of the model in their order.  What random numbers the model
draws is drawn once per call.

Letters: N samples, C outputs of a sample, P numbers of all trained parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from distcurv.errors import ConfigError, ShapeError, StateError
from distcurv.makers.apart import run_apart
from distcurv.makers.calls import Calls
from distcurv.makers.derivatives import Tensors, dense, gradient, pulled, pushed, shaped
from distcurv.makers.vmap_info import BatchedCall
from distcurv.train.discover import bare_model


class Functional(Calls):
    """The part of `GradientMaker` that differentiates."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of the model, each once, in its order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss_grad(self, return_output: bool = False) -> Any:
        """The loss's gradient, a tuple; with ``return_output`` (gradient, output)."""
        output, loss = self.run_loss()
        grads = gradient(loss, self.trained)
        return (grads, output) if return_output else grads

    def per_example_loss_grads(self, chunk_size: int | None = None) -> Tensors:
        """The gradient of each sample's loss, each [N, *parameter.shape].

        A sample's loss is what model and loss give for a batch of that sample alone; with a loss
        that averages over samples, the mean of the result is the loss's gradient.  Samples run
        under `torch.func.vmap`; see ``setup_model_vmap_info`` for what has a batch dimension.
        Tensors of the loss call with k times as many rows as there are samples (targets of
        flattened tokens) are cut into k rows for each.

        Args:
            chunk_size: as many samples at once; None: all.

        Recurrent layers, which vmap cannot run, have their samples one after the other.

        Raises `ConfigError` and `ShapeError` for arguments that cannot be cut, and `StateError`
        for a model that mixes samples: BatchNorm with the batch's statistics."""
        model_fn = self._model_call()
        self._check_loss()
        self._require_trained()
        self._require_single_samples()
        model_call = BatchedCall(
            self._model_vmap_info, self._model_args, self._model_kwargs, "model"
        )
        loss_call = BatchedCall(
            self._loss_vmap_info, self._loss_fn_args, self._loss_fn_kwargs, "loss"
        )
        samples = model_call.samples
        if samples is None:
            raise ConfigError(
                "per_example_loss_grads finds no tensor with a batch dimension among the arguments "
                "of the model call: pass the inputs as arguments, or see setup_model_vmap_info"
            )
        trained = [(n, p) for n, p in bare_model(self.model).named_parameters() if p.requires_grad]
        if samples == 0:  # which vmap refuses
            return tuple(p.new_zeros(0, *p.shape) for _, p in trained)
        names = [name for name, _ in trained]

        def loss_of_one(params: Tensors, inputs: list[Tensor], targets: list[Tensor]) -> Tensor:
            replaced = dict(zip(names, params, strict=True))
            output = run_apart(self.model, model_fn, *model_call.of_one(inputs), replaced)
            loss: Tensor = self._loss_with(output, *loss_call.of_one(targets))
            return loss

        start = tuple(p.detach() for _, p in trained)
        inputs, targets = model_call.tensors(samples), loss_call.tensors(samples)
        dims = (model_call.in_dims, loss_call.in_dims)
        if any(isinstance(m, nn.RNNBase) for m in bare_model(self.model).modules()):
            of_one = grad(loss_of_one)
            rows = [
                of_one(start, _picked(inputs, dims[0], n), _picked(targets, dims[1], n))
                for n in range(samples)
            ]
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        # vmap wants a dimension for each argument that has a tensor, and none for an empty list.
        result: Tensors = vmap(
            grad(loss_of_one),
            in_dims=(None, *(dim if dim != [] else None for dim in dims)),
            randomness="different",
            chunk_size=chunk_size,
        )(start, inputs, targets)
        return result

    def loss_hessian(self) -> tuple[Tensors, ...]:
        """The loss's Hessian: a tuple (by parameter) of tuples (by parameter) of tensors
        [*first.shape, *second.shape].  P² numbers."""
        params = self.trained
        _, loss = self.run_loss()
        matrix = dense(gradient(loss, params, create_graph=True), params)
        blocks = zip(params, matrix.split([p.numel() for p in params]), strict=True)
        return tuple(
            tuple(
                part.reshape(p.shape + q.shape)
                for q, part in zip(params, shaped(rows, params), strict=True)
            )
            for p, rows in blocks
        )

    def loss_hvp(
        self, tangents: Sequence[Tensor] | None = None, accumulate_grad: bool = True
    ) -> Tensors:
        """The Hessian times ``tangents`` (by default random normal ones).  With
        ``accumulate_grad`` the loss's gradient, which falls out on the way, is added to
        ``.grad``; with DistributedDataParallel it is this rank's own."""
        params = self.trained
        vector = self._tangents(tangents)
        _, loss = self.run_loss()
        grads = gradient(loss, params, create_graph=True)
        products = pulled(grads, params, vector)
        if accumulate_grad:
            with torch.no_grad():
                for parameter, own in zip(params, grads, strict=True):
                    before = parameter.grad
                    parameter.grad = own.detach().clone() if before is None else before + own
        return products

    def logit_jacobian(self) -> Tensors:
        """The Jacobian of the logits, for each parameter [*logits.shape, *parameter.shape]."""
        params = self.trained
        logits = self.run_logits()
        matrix = dense([logits], params)
        return tuple(
            part.reshape(logits.shape + p.shape)
            for p, part in zip(params, shaped(matrix, params), strict=True)
        )

    def logit_jvp(
        self, tangents: Sequence[Tensor] | None = None, return_model_output: bool = False
    ) -> Any:
        """The logits' Jacobian times ``tangents`` (by default random normal), of the shape of the
        logits; with ``return_model_output`` (product, logits)."""
        vector = self._tangents(tangents)
        logits = self.run_logits()
        (product,) = pushed([logits], self.trained, vector)
        return (product, logits.detach()) if return_model_output else product

    def fvp(
        self,
        loss_type: str,
        data_size: int | None = None,
        tangents: Sequence[Tensor] | None = None,
        return_model_output: bool = False,
    ) -> Any:
        """The Fisher matrix (Gauss-Newton, exact) times ``tangents`` (by default random normal),
        averaged over ``data_size`` samples (by default the logits' N); with
        ``return_model_output`` (product, logits).

        Args:
            loss_type: ``cross_entropy`` or ``mse`` (½ squared error), for logits [N, C].

        Raises `ConfigError` for another loss type and `ShapeError` for other logits."""
        if loss_type not in ("cross_entropy", "mse"):
            raise ConfigError(f"loss_type is {loss_type!r}: use 'cross_entropy' or 'mse'")
        vector = self._tangents(tangents)
        params = self.trained
        logits = self.run_logits()
        if logits.dim() != 2:
            raise ShapeError(
                f"fvp got logits of shape {tuple(logits.shape)}: it needs [N, C]; flatten them "
                "with setup_logits_repr"
            )
        (product,) = pushed([logits], params, vector)
        if loss_type == "cross_entropy":
            probabilities = F.softmax(logits.detach(), dim=1)
            product = probabilities * product
            product = product - probabilities * product.sum(1, keepdim=True)
        size = len(logits) if data_size in (None, -1) else data_size
        products = pulled([logits], params, [product / size])
        return (products, logits.detach()) if return_model_output else products

    def nvp(
        self,
        cotangents: Tensor | Sequence[Tensor] | None = None,
        return_model_output: bool = False,
    ) -> Any:
        """The neural tangent kernel J Jᵀ times ``cotangents`` (by default random normal), of the
        shape of the logits, alone or, as in ASDL, as a sequence of one; with
        ``return_model_output`` (product, logits)."""
        logits = self.run_logits()
        params = self.trained
        if cotangents is None:
            cotangents = torch.randn_like(logits)
        elif not isinstance(cotangents, Tensor):
            if len(cotangents) != 1:
                raise ShapeError(f"nvp got {len(cotangents)} cotangents: give one, of the logits")
            (cotangents,) = cotangents
        if cotangents.shape != logits.shape:
            raise ShapeError(
                f"cotangents have the shape {tuple(cotangents.shape)}: the logits "
                f"{tuple(logits.shape)}"
            )
        (product,) = pushed([logits], params, pulled([logits], params, [cotangents]))
        return (product, logits.detach()) if return_model_output else product

    # -- runs apart from training -----------------------------------------------------------

    def run_model(self) -> Any:
        """The output, with its graph; neither `model_output` nor buffers change.

        Raises `StateError` where there is no parameter to differentiate by."""
        self._require_trained()
        return run_apart(self.model, self._model_call(), self._model_args, self._model_kwargs)

    def run_loss(self) -> tuple[Any, Tensor]:
        """(output, loss), likewise."""
        self._model_call()
        self._check_loss()
        output = self.run_model()
        with torch.enable_grad():
            return output, self._loss_of(output)

    def run_logits(self) -> Tensor:
        """The logits, likewise; raises `ShapeError` where they are no tensor."""
        output = self.run_model()
        with torch.enable_grad():
            logits = self._dummy_logits.eval(output)
        if not isinstance(logits, Tensor):
            raise ShapeError(
                f"the logits are a {type(logits).__name__}: say with setup_logits_repr where they "
                "are in the model's output"
            )
        return logits

    def _require_trained(self) -> None:
        if not self.trained:
            raise StateError(
                f"{type(self).__name__}: the model has no trained parameter; call requires_grad_()"
            )

    def _require_single_samples(self) -> None:
        for name, module in bare_model(self.model).named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise StateError(
                    f"{type(self).__name__}: the {type(module).__name__} "
                    f"{name or '(the model)'} takes its statistics from the batch, so samples have "
                    "no gradients of their own: call eval() on it, with running statistics"
                )

    def _tangents(self, tangents: Sequence[Tensor] | None) -> Tensors:
        params = self.trained
        if tangents is None:
            return tuple(torch.randn_like(p) for p in params)
        shapes = [tuple(t.shape) for t in tangents]
        wanted = [tuple(p.shape) for p in params]
        if shapes != wanted:
            raise ShapeError(f"tangents have the shapes {shapes}: the trained parameters {wanted}")
        return tuple(tangents)


def _picked(tensors: Sequence[Tensor], dims: Sequence[int], sample: int) -> list[Tensor]:
    return [tensor.select(dim, sample) for tensor, dim in zip(tensors, dims, strict=True)]
