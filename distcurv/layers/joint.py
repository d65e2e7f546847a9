"""What capture must know about a layer that acts unit by unit: the JointIO protocol.

The gradient of such a parameter (of a normalisation, a scale, a bias) is no outer product, so its
block has no input side and output side.  It has one side, F, which input and output gradient make
together: the second moments of per-sample gradients, each summed over the positions of the sample
before it is squared.

Like a LayerIO a JointIO is pure, and one instance serves all modules of its type.

Letters: N samples (dimension 0 of the module's input), n of them looked at, S positions, U units
(entries of the weight).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import RowDraw, Sampler
from distcurv.curvature.spec import Tensors
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.weight_bias import WeightBias


@dataclass(frozen=True)
class Kept:
    """What the backward needs of a forward.

    Attributes:
        tensors: of the samples that are looked at; what they are is the layer's affair.
        samples: which samples those are.
        count: N, of all samples.
        version: of ``tensors["input"]`` where that is the user's own tensor, not a copy.
    """

    tensors: Tensors
    samples: RowDraw
    count: int
    version: int | None = None

    @property
    def weight(self) -> int:
        """Of the sums over the samples that are looked at."""
        return self.samples.every

    def input(self) -> Tensor:
        """``tensors["input"]``, at least float32.  Raises `CaptureError` where it has been
        overwritten since, which autograd allows where it keeps no reference of its own."""
        tensor = self.tensors["input"]
        if self.version is not None and tensor._version != self.version:
            raise CaptureError(
                f"the input of shape {tuple(tensor.shape)} of a captured layer was changed in "
                "place before the backward: set max_rows, then what is needed of it is copied"
            )
        return at_least_float32(tensor)


class JointIO(Protocol):
    """How one family of one-sided modules is captured.

    ``bias`` says everywhere whether the block has the bias beside the weight.

    Attributes:
        one_sided: the kind of the block.  ``unitwise``: for unit i the 2 × 2 matrix
            sum_n [w_ni, b_ni][w_ni, b_ni]ᵀ of the per-sample gradients of its weight and its bias;
            ``diagonal``: the sum of the squares of those of one parameter.
        diagonal_sides: empty: the side F has its own encodings.
        weight_is_matrix: False, as the weight is no matrix.
        weight: the name of the parameter (of the weight's, where there are two) in the module.
        rows: the units that are the block's, (start, stop); None for all.
        call_kind: see `LayerIO`; no function has such layers so far.
    """

    one_sided: str
    diagonal_sides: frozenset[str]
    weight_is_matrix: bool
    weight: str
    rows: tuple[int, int] | None
    call_kind: str

    def parameter_names(self, module: nn.Module) -> list[str]:
        """See `LayerIO.parameter_names`."""
        ...

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        ...

    def trains_bias(self, module: nn.Module) -> bool:
        """See `LayerIO.trains_bias`."""
        ...

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """(U,): the dimension of the side, with or without bias."""
        ...

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """What the backward will need of one forward, and as little as can be: it runs amid the
        user's forward.  With a sampler some whole samples are copied, about ``max_rows`` rows;
        without, a reference to the input may be kept, which autograd keeps as well.

        Raises `CaptureError` where the input has no batch dimension."""
        ...

    def statistic(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensors:
        """The sums of one call: ``ww``, ``wb`` and ``bb`` [U] for ``unitwise`` (the latter two are
        zero without a bias), ``diag`` [U] for ``diagonal``; and ``count`` = N.  In float64 for a
        float64 gradient, else in float32.

        The sums are over the samples looked at and of the gradient as it is: the caller multiplies
        them (not the count) with ``kept.weight`` and the square of the scale that makes it the
        gradient of a per-sample loss.  It has entered `full_float32` and no_grad."""
        ...

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """The ``.grad`` of the parameters as [U, 1] and, with a bias, [U]; else as
        `LayerIO.gradient`."""
        ...

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        ...


@runtime_checkable
class ShowsSamples(JointIO, Protocol):
    """A `JointIO` that can be joined with other layers in one block."""

    def sample_gradients(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensor:
        """The per-sample gradients [n, U, 1], or [n, U, 2] with the bias's, of the samples looked
        at, at least float32."""
        ...


class UnitWeights(WeightBias):
    """The parts of `JointIO` that only look at a weight and a bias of the same, any, shape."""

    weight_is_matrix = False

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """See `JointIO.dims`."""
        weight = module.get_parameter(self.weight)
        if self.rows is None:
            return (weight.numel(),)
        return ((self.rows[1] - self.rows[0]) * (weight.numel() // weight.shape[0]),)

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """See `JointIO.gradient`."""
        grads = self._grads(module, bias)
        if grads is None:
            return None
        weight_grad, bias_grad = grads
        bias_U = None if bias_grad is None else bias_grad.flatten()
        return AffineGradient(weight_grad.flatten().unsqueeze(1), bias_U)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        grads = self._grads(module, bias)
        if grads is None:
            raise CaptureError(
                f"write_gradient: this {type(module).__name__} has no gradient to overwrite; "
                "call it between backward() and zero_grad()"
            )
        weight_U1, bias_U = grad
        units = grads[0].numel()
        fits = bias_U is None if not bias else bias_U is not None and bias_U.shape == (units,)
        if weight_U1.shape != (units, 1) or not fits:
            shapes = [None if part is None else tuple(part.shape) for part in grad]
            raise ShapeError(
                f"write_gradient got a weight's and a bias's gradient of shapes {shapes} for a "
                f"{type(module).__name__}: they must be ({units}, 1) and "
                f"{(units,) if bias else None}"
            )
        for target, source in zip(grads, grad, strict=True):
            # Of one place in memory there is nothing to copy.
            if target is None or source is None or target.data_ptr() == source.data_ptr():
                continue
            target.copy_(source.reshape(target.shape))


def draw_samples(samples: int, positions: int, sampler: Sampler | None) -> RowDraw:
    """Some whole samples, with about ``max_rows`` rows but at least one sample; all of them
    without a sampler."""
    if sampler is None:
        return RowDraw(0, 1)
    wanted = math.ceil(sampler.max_rows / max(positions, 1))
    return dataclasses.replace(sampler, max_rows=wanted).rows(samples)


def keep_input(input: Tensor, positions: int, sampler: Sampler | None) -> Kept:
    """The drawn samples as ``tensors["input"]``: a copy, or without a sampler the input itself."""
    draw, x = draw_samples(len(input), positions, sampler), input.detach()
    if sampler is None:
        return Kept({"input": x}, draw, len(input), x._version)
    return Kept({"input": x[draw.slice].clone()}, draw, len(input))


def drawn_gradient(kept: Kept, grad_output: Tensor) -> Tensor:
    """The output gradients of the samples that are looked at, at least float32."""
    return at_least_float32(grad_output.detach()[kept.samples.slice])


def squares_and_count(kept: Kept, grad_nU: Tensor) -> Tensors:
    """The statistic of kind ``diagonal`` of per-sample gradients [n, U]."""
    return {"diag": grad_nU.square().sum(0), "count": grad_nU.new_full((), kept.count)}
