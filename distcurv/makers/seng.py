"""SengGradientMaker: sketch-based empirical natural gradient (Yang, Xu, Wen, Chen and Xu 2021).

Layer by layer (F_l + λI)⁻¹ g_l with F_l = (1/N) sum_n g_n g_nᵀ of the samples' gradients of that
layer, which are never formed, see `distcurv.curvature.seng`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.seng import (
    Draw,
    Samples,
    combination,
    draw,
    kernel,
    products,
    sketched_gradient,
    sketched_samples,
    truncated,
)
from distcurv.curvature.woodbury import beyond_span, damped_factor
from distcurv.errors import ConfigError
from distcurv.makers.every_step import check_no_average
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.sample_factors import Catch, factored_layer
from distcurv.makers.saved_tensors import fitting_tensors
from distcurv.train.discover import bare_model, ignored_ids, named_modules

_STEPS_PER_SEED = 1_000_003  # a prime: draws of other seeds come at other steps


class SengGradientMaker(PreconditionedGradientMaker):
    """Rewrites the gradients of Linear and (ungrouped) convolution layers.  All others stay as they
    are, and so do layers that share a parameter with another module.

    Without sketch and truncation the result is exact.  With them (F_l + λI)⁻¹ is not, and its error
    is divided by λ: the method wants a damping of the size of F_l's larger eigenvalues.

    At steps without an update the last update's samples precondition the new gradient.  Under
    DistributedDataParallel an update gathers the samples' (truncated) factors of all ranks, so that
    every rank does the same.  With a loss that sums over samples F_l is a sum as well.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: without ``ema_decay``; ``data_size`` is what the sum of F_l is divided by (not set:
            the samples of the batch), ``seed`` that of the drawn coordinates.
        sketching_size: so many coordinates of a layer's inputs, and of its outputs, are drawn at
            each update; layers with fewer are not sketched.
        truncated_rank: rank of a sample's output gradients over positions (pixels, tokens).

    Raises `ConfigError` for a model without such a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        sketching_size: int = 256,
        truncated_rank: int = 16,
    ) -> None:
        super().__init__(model, config)
        check_no_average(config, type(self).__name__)
        for name, value in (("sketching_size", sketching_size), ("truncated_rank", truncated_rank)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}: give an integer >= 1")
        self.sketching_size = sketching_size
        self.truncated_rank = truncated_rank
        bare = bare_model(model)
        ignored = ignored_ids(bare, config.ignore_modules or ())
        owners = Counter(
            id(p) for module in bare.modules() for p in module.parameters(recurse=False)
        )
        self._modules = {
            name: module
            for name, module in named_modules(bare)
            if id(module) not in ignored
            and factored_layer(module) is not None
            and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))
        }
        if not self._modules:
            raise ConfigError(
                f"{type(self).__name__} finds no Linear or ungrouped convolution layer with a "
                "trained weight of its own that ignore_modules leaves it"
            )
        self._catch = Catch({})

    def forward_and_backward(self) -> tuple[Any, Tensor]:
        """One training step, see `PreconditionedGradientMaker`."""
        self._catch = Catch(self._modules)
        due = self.do_update_curvature(self.state["step"])
        with self._catch.armed() if due else nullcontext():
            return super().forward_and_backward()

    @torch.no_grad()
    def update_curvature(self) -> None:
        """The samples' factors of all ranks: ``NAME.a`` [N, S, I] and ``NAME.g`` [N, S, O], scaled
        so that F_l is the sum over them."""
        caught = {name: self._scaled(name) for name in self._modules}
        self._catch = Catch({})  # what was caught is large
        own = [size for samples in caught.values() for size in samples.a_NSI.shape[:2]]
        # A layer may have other positions on another rank, and no part at all on some.
        of_ranks = self.numbers_of_ranks(own)
        for i, (name, samples) in enumerate(caught.items()):
            counts = [numbers[2 * i] for numbers in of_ranks]
            positions = max(numbers[2 * i + 1] for numbers in of_ranks)
            if not any(counts):
                continue
            for part, tensor in zip("ag", samples, strict=True):
                padded = pad(tensor, (0, 0, 0, positions - tensor.shape[1]))
                self.state[f"{name}.{part}"] = self.gather_rows(padded, counts)

    @torch.no_grad()
    def update_preconditioner(self) -> None:
        """``NAME.factor`` [N, N] of the damped kernel, and the drawn coordinates ``NAME.inputs``
        and ``NAME.outputs`` (None: all)."""
        generator = torch.Generator()
        generator.manual_seed(self.config.seed * _STEPS_PER_SEED + self.state["step"])
        for name, module in self._modules.items():
            samples = self._samples(name)
            if samples is None:
                continue
            inputs = _inputs(module)
            chosen = draw(self.sketching_size, inputs, samples.g_NSO.shape[2], generator)
            found = kernel(sketched_samples(samples, chosen, inputs))
            self.state[f"{name}.factor"] = damped_factor(found, self.config.damping)
            self.state[f"{name}.inputs"], self.state[f"{name}.outputs"] = chosen

    @torch.no_grad()
    def precondition(self) -> None:
        """(g − sum_n c_n g_n)/λ for each layer."""
        for name, module in self._modules.items():
            samples, factor = self._samples(name), self.state.get(f"{name}.factor")
            layer = factored_layer(module)
            if samples is None or factor is None or layer is None:
                continue
            bias = layer.trains_bias(module)
            gradient = layer.gradient(module, bias)
            if gradient is None:
                continue
            whole = gradient.whole().to(samples.a_NSI.dtype)
            inputs = _inputs(module)
            chosen = Draw(self.state[f"{name}.inputs"], self.state[f"{name}.outputs"])
            known = products(
                sketched_samples(samples, chosen, inputs), sketched_gradient(whole, chosen, inputs)
            )
            within = combination(samples, beyond_span(factor, known))
            found = (whole - within) / self.config.damping
            parts = AffineGradient(found[:, :inputs], found[:, inputs] if bias else None)
            layer.write_gradient(module, bias, parts)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker for the same model; raises `StateError`
        for another one."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in self._modules.items():
            layer = factored_layer(module)
            assert layer is not None
            dims = layer.dims(module, bias=layer.trains_bias(module))
            a = state_dict.get(f"{name}.a")
            held = tuple(a.shape[:2]) if isinstance(a, Tensor) else (0, 0)
            shapes |= {f"{name}.{part}": (*held, d) for part, d in zip("ag", dims, strict=True)}
            shapes[f"{name}.factor"] = (held[0], held[0])
            for part in ("inputs", "outputs"):
                drawn = state_dict.get(f"{name}.{part}")
                shapes[f"{name}.{part}"] = (drawn.numel() if isinstance(drawn, Tensor) else 0,)
        # Where all coordinates are read there is None in place of the drawn ones.
        whole = {key: None for key, value in state_dict.items() if value is None and key in shapes}
        given = {key: value for key, value in state_dict.items() if key not in whole}
        device = next(iter(self._modules.values())).get_parameter("weight").device
        tensors = fitting_tensors(given, shapes, (), device, type(self).__name__)
        super().load_state_dict({"step": state_dict.get("step"), **tensors, **whole})

    def summary(self) -> str:
        """What is computed where, and for which modules."""
        return f"{super().summary()}; {len(self._modules)} layers: {', '.join(self._modules)}"

    def _scaled(self, name: str) -> Samples:
        """This rank's truncated factors, scaled; no samples where the layer had no part."""
        samples = self._catch.samples(name)
        if samples is None:
            module = self._modules[name]
            layer = factored_layer(module)
            assert layer is not None
            dims = layer.dims(module, bias=layer.trains_bias(module))
            weight = module.get_parameter("weight")
            empty = weight.new_zeros(0, dtype=torch.promote_types(weight.dtype, torch.float32))
            return Samples(*(empty.view(0, 0, d) for d in dims))
        count = len(samples.a_NSI)
        size, undo = (self.config.data_size or count, count) if self.loss_is_mean else (1, 1)
        a, g = truncated(samples, self.truncated_rank)
        return Samples(a, g * (undo * (max(size, 1) * self.world_size) ** -0.5))

    def _samples(self, name: str) -> Samples | None:
        a, g = self.state.get(f"{name}.a"), self.state.get(f"{name}.g")
        return None if a is None or g is None else Samples(a, g)


def _inputs(module: nn.Module) -> int:
    """Without the bias coordinate."""
    layer = factored_layer(module)
    assert layer is not None
    return layer.dims(module, bias=False)[0]
