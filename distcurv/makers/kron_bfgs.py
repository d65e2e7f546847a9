"""KronBfgsGradientMaker: a Kronecker product of two BFGS inverses for each layer.

Goldfarb, Ren and Bahamou 2020, "Practical quasi-Newton methods for training deep neural networks";
for convolutions Ren, Bahamou and Goldfarb 2021, "Kronecker-factored quasi-Newton methods for deep
learning".

Letters: N samples, S positions of each, I inputs (with the bias coordinate), O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.bfgs import Secant, bfgs_inverse, damped_inverse, double_damped
from distcurv.curvature.precision import full_float32
from distcurv.errors import ConfigError, NumericsError
from distcurv.makers.input_moments import InputMoments, at_least_1
from distcurv.makers.output_changes import PARTS, Change, OutputChanges
from distcurv.makers.pre_activations import Layer, LayerCalls
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.saved_tensors import fitting_tensors
from distcurv.train.discover import FoundLayer, Ignored, bare_model, find_layer_blocks

# Changes of sums below so many units in their last place are rounding.  (In front of a BatchNorm
# the gradients of all rows add up to zero: what is left of them must not be taken for curvature.)
_ROUNDING = 64
_PAIR = "pair."  # begins the names of what a state_dict has of the last step


class KronBfgsGradientMaker(PreconditionedGradientMaker):
    r"""K-BFGS: P = H_g ∇W H_a, with H_a for the inverse of the inputs' second moment A and H_g for
    that of the Hessian G of the loss by the layer's outputs, both symmetric and positive definite.

    Side A: at an update s = H_a ā and y = (A + λ_A I) s with the mean input ā ("Hessian action");
    H_a begins as (A + λ_A I)⁻¹.  Side G: s is how much the mean output changed by the optimizer's
    step, y how much its gradient did, on one batch; both are damped (Powell, then Levenberg and
    Marquardt); H_g begins as I.  For that, the batch of a step with an update is run once more,
    forward and backward to the outputs, when the next `forward_and_backward` begins (see
    `Replay`); buffers and ``.grad`` stay as they are.  The batch's tensors must not be overwritten
    in between.  Where parameters did not move there is no update.

    Positions of a sample (tokens, pixels) are rows of their own: A sums over them and G is the
    mean, and λ_A = √(λ S), λ_G = √(λ / S) with λ the ``damping``.

    Linear layers and convolutions whose weight is theirs alone are preconditioned (`covered`); all
    other parameters keep their gradient.

    Of the config, ``curvature_*`` say when A is taken and ``preconditioner_*`` when H_a and H_g
    are updated; ``ema_decay`` is for A and for the pairs (s, y) of side G; ``data_size`` is what
    A is divided by instead of the number of samples.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: when and how.
        minibatch_hessian_action: y = A s with the A of the batch, which is never formed but for
            the first time; then there is no average of A.
        mu1: of Powell's damping, 0 < it < 1.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        minibatch_hessian_action: bool = False,
        mu1: float = 0.2,
    ) -> None:
        super().__init__(model, config)
        if not 0 < mu1 < 1:
            raise ConfigError(f"mu1 is {mu1}: give a number between 0 and 1")
        self.minibatch_hessian_action = minibatch_hessian_action
        self.mu1 = mu1
        ignore = cast("Sequence[Ignored]", config.ignore_modules or ())
        found, _ = find_layer_blocks(bare_model(model), ignore)
        self._layers = [Layer.of(one) for one in found if _fits(one)]
        if not self._layers:
            raise ConfigError(
                "KronBfgsGradientMaker: the model has no Linear or convolution to use"
            )
        self._device = self.trained[0].device
        self._watch = LayerCalls(self._layers)
        self._stack = ExitStack()
        self._moments = InputMoments(self._layers, self.average_over_ranks, config.data_size)
        self._changes = OutputChanges(self._layers)
        for layer in self._layers:
            self.state[f"{layer.name}.H_g"] = layer.zeros(layer.outputs).add(1).diag()

    @property
    def covered(self) -> list[str]:
        """The names of the preconditioned layers."""
        return [layer.name for layer in self._layers]

    # -- the step -------------------------------------------------------------------------

    def forward_and_backward(self) -> tuple[Any, Tensor]:
        """See `PreconditionedGradientMaker.forward_and_backward`."""
        with ExitStack() as self._stack:
            return super().forward_and_backward()

    def startup(self) -> None:
        """Update H_g with what the optimizer's step has changed, and begin to watch."""
        changes = self._changes.measure()
        self._changes.forget()
        if changes:
            self._update_outputs(changes)
        step = self.state["step"]
        updates = self.do_update_preconditioner(step)
        if updates or self.do_update_curvature(step):
            self._stack.callback(self._forget)
            self._stack.enter_context(self._watch)
        if updates:
            self._changes.begin(self)

    def update_curvature(self) -> None:
        """Take A; with ``minibatch_hessian_action`` there is nothing to take."""
        if self.minibatch_hessian_action:
            return
        with torch.no_grad(), full_float32(self._device):
            means, matrices = self._moments.means(), self._moments.matrices()
        decay = self.config.ema_decay
        for name, new in matrices.items():
            ran, old = means[name].ran, self.state.get(f"{name}.A")
            if old is not None:
                mixed = new if decay is None else torch.lerp(old, new, decay)
                self.state[f"{name}.A"] = torch.where(ran & torch.isfinite(new).all(), mixed, old)
            elif ran:
                self.state[f"{name}.A"] = new

    def update_preconditioner(self) -> None:
        """Update H_a, and keep what the update of H_g will need."""
        with torch.no_grad(), full_float32(self._device):
            self._begin()
            self._update_inputs()
        self._changes.end()

    def precondition(self) -> None:
        """``.grad`` becomes H_g ∇W H_a, from the first update on."""
        with torch.no_grad(), full_float32(self._device):
            for layer in self._layers:
                h_a = self.state.get(f"{layer.name}.H_a")
                grad = layer.io.gradient(layer.module, layer.bias)
                if h_a is None or grad is None:
                    continue
                new = self.state[f"{layer.name}.H_g"] @ grad.whole().to(h_a) @ h_a
                parts = (new[:, :-1], new[:, -1]) if layer.bias else (new, None)
                layer.io.write_gradient(layer.module, layer.bias, AffineGradient(*parts))

    def _forget(self) -> None:
        self._watch.forget()
        self._moments.forget()

    # -- side A ---------------------------------------------------------------------------

    def _begin(self) -> None:
        """H_a where there is none yet, and the layer ran."""
        inputs = self._moments.means()
        new = [la.name for la in self._layers if f"{la.name}.H_a" not in self.state]
        new = [name for name in new if inputs[name].ran]
        if not new:
            return
        if self.minibatch_hessian_action:
            matrices = self._moments.matrices()
        else:
            if any(f"{name}.A" not in self.state for name in new):
                self.update_curvature()
            matrices = {name: self.state[f"{name}.A"] for name in new}
        for name in new:
            try:
                h_a = damped_inverse(matrices[name], self._damping_in(name))
            except NumericsError as error:
                raise NumericsError(
                    f"layer {name!r}, second moment of its first inputs, damping "
                    f"{self.config.damping}: {error}"
                ) from error
            self.state[f"{name}.H_a"] = h_a

    def _update_inputs(self) -> None:
        """H_a's secant condition along s = H_a ā."""
        means = self._moments.means()
        names = [name for name in self.covered if f"{name}.H_a" in self.state]
        old = {name: self.state[f"{name}.H_a"] for name in names}
        steps = {name: h @ means[name].mean_I for name, h in old.items()}
        if self.minibatch_hessian_action:
            products = self._moments.actions(steps)
        else:
            products = {name: self.state[f"{name}.A"] @ s for name, s in steps.items()}
        for name, s in steps.items():
            secant = Secant(s, products[name] + self._damping_in(name) * s)
            self.state[f"{name}.H_a"] = bfgs_inverse(old[name], secant, means[name].ran)

    def _damping_in(self, name: str) -> Tensor:
        return (self.config.damping * self._moments.means()[name].positions).sqrt()

    # -- side G ---------------------------------------------------------------------------

    @torch.no_grad()
    def _update_outputs(self, changes: Mapping[str, Change]) -> None:
        """H_g's secant condition along the optimizer's step."""
        changes = {name: Change(*(t.clone() for t in own)) for name, own in changes.items()}
        self.average_over_ranks([tensor for own in changes.values() for tensor in own])
        with full_float32(self._device):
            for name, (s, y, scales, (rows, samples)) in changes.items():
                s_noise, y_noise = _ROUNDING * torch.finfo(s.dtype).eps * scales
                moved = (rows > 0) & (s.norm() > s_noise) & torch.isfinite(s + y).all()
                y = torch.where(y.norm() > y_noise, y, 0.0)
                positions = at_least_1(rows / at_least_1(samples))
                # y is the change of the gradient per position, for a loss that counts samples.
                secant = self._averaged(name, Secant(s / at_least_1(rows), y / positions), moved)
                h = self.state[f"{name}.H_g"]
                damping = (self.config.damping / positions).sqrt()
                damped = double_damped(h, secant, self.mu1, damping)
                self.state[f"{name}.H_g"] = bfgs_inverse(h, damped, moved)

    def _averaged(self, name: str, new: Secant, moved: Tensor) -> Secant:
        decay = self.config.ema_decay
        if decay is None:
            return new
        for part, value in zip(("s", "y"), new, strict=True):
            # Both begin at zero: a common factor changes nothing.
            old = self.state.get(f"{name}.{part}", torch.zeros_like(value))
            self.state[f"{name}.{part}"] = torch.where(moved, torch.lerp(old, value, decay), old)
        return Secant(self.state[f"{name}.s"], self.state[f"{name}.y"])

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step and all that the next one depends on; local.  After a step with an update it
        runs that step's batch once more, as the next `forward_and_backward` would: so take it
        after the optimizer's step, and with DistributedDataParallel on every rank its own."""
        pairs = {
            f"{_PAIR}{name}.{part}": tensor
            for name, change in self._changes.measure().items()
            for part, tensor in zip(PARTS, change, strict=True)
        }
        return {**super().state_dict(), **pairs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker for the same model; raises `StateError`
        for another one."""
        required = [f"{name}.H_g" for name in self.covered]
        who = type(self).__name__
        tensors = fitting_tensors(state_dict, self._shapes(), required, self._device, who)
        changes = {}
        for name in self.covered:
            own = [tensors.pop(f"{_PAIR}{name}.{part}", None) for part in PARTS]
            if all(tensor is not None for tensor in own):
                changes[name] = Change(*cast("list[Tensor]", own))
        super().load_state_dict({"step": state_dict.get("step"), **tensors})
        self._changes.load(changes)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors that a state may have."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self._layers:
            i, o = layer.inputs, layer.outputs
            shapes |= {f"{layer.name}.{key}": (i, i) for key in ("A", "H_a")}
            shapes |= {f"{layer.name}.{key}": (o,) for key in ("s", "y")}
            shapes |= {f"{_PAIR}{layer.name}.{key}": (o,) for key in ("s", "y")}
            shapes |= {f"{_PAIR}{layer.name}.{key}": (2,) for key in ("scales", "sizes")}
            shapes[f"{layer.name}.H_g"] = (o, o)
        return shapes


def _fits(found: FoundLayer) -> bool:
    """A layer of inputs and outputs that its module alone uses, and uses whole."""
    layer = found.layer
    return (
        layer.one_sided is None
        and not layer.diagonal_sides
        and layer.rows is None
        and found.source == "module"
        and not found.tied
    )
