"""How one call shows per-sample gradients, of which those of all calls are joined before squaring.

A sample's gradient of a parameter is the sum over all calls that use it, and that of a block of
several layers is made of theirs.  So a call alone makes no statistic: it keeps its input and its
output gradient until all calls of a backward are there (`distcurv.train.sample_statistics`).

Letters: N samples, n of some of them, V ids, D features.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from distcurv.curvature.precision import at_least_float32, full_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.layers.joint import Kept, ShowsSamples
from distcurv.layers.layer import LayerIO
from distcurv.layers.sample_gradients import sample_gradients, token_gradients
from distcurv.layers.sequence_first import SequenceFirst
from distcurv.train.uses import Reading, Use, prefixed


class Shown(NamedTuple):
    """What a call has shown.

    Attributes:
        use, kept: of the call.
        grad_output: the gradient of its output, dimension 0 the samples.
        factor: what makes it that of a single term's loss.
    """

    use: SampleUse
    kept: object
    grad_output: Tensor
    factor: float | Tensor


class SampleUse(Use, Protocol):
    """A `Use` whose calls are joined.  `Use.read_output` makes what the other calls do not matter
    for: the count, and the sides' statistics where the block has two.

    Attributes:
        start: where its numbers stand among those of the block.
    """

    start: int

    def show(self, kept: object, grad_output: Tensor, factor: float | Tensor) -> Shown:
        """What of a gradient of the output has to be kept: a copy."""
        ...

    def gradients(self, kept: object, grad_output: Tensor, samples: slice) -> Tensor:
        """The gradients [n, numbers of the layer] of these samples, from `Shown.grad_output`."""
        ...

    def width(self, grad_output: Tensor) -> int:
        """About how many numbers `gradients` makes on its way for each sample, beside its
        result."""
        ...


class _KeptCall(NamedTuple):
    input: Tensor  # a copy, samples first
    counted: Tensor | None  # see `LayerIO.counted_positions`


class LayerSampleUse:
    """The use of a layer of two sides.

    Args:
        layer, how, bias, columns: as for `SidesUse`.
        dims: of the layer's sides, (A, G).
        start: where its numbers stand among those of the block.
        sides: makes the statistics of sides A and G, for a block that has them.
    """

    swapped = False
    per_sample = True

    def __init__(
        self,
        layer: LayerIO,
        how: object,
        bias: bool,
        dims: tuple[int, ...],
        columns: tuple[int, int] | None = None,
        start: int = 0,
        sides: Use | None = None,
    ) -> None:
        self._layer = layer
        self._how = how
        self._bias = bias
        self._dims = dims
        self._columns = columns
        self.start = start
        self._sides = sides

    def samples(self, input: Tensor) -> int:
        """See `Use.samples`."""
        return self._how.samples if isinstance(self._how, SequenceFirst) else len(input)

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """See `Use.read_input`; all samples are kept, whatever the sampler."""
        reading: Reading = dict
        with torch.no_grad():
            counted: object = None
            if self._sides is not None:
                reading, counted = self._sides.read_input(input, bases, sampler)
            if counted is None:
                counted = self._layer.counted_positions(self._how, input)  # type: ignore[arg-type]
            own = self._samples_first(input.detach()).clone()
        return reading, _KeptCall(own, cast("Tensor | None", counted))

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """See `SampleUse`."""
        assert isinstance(kept, _KeptCall)
        if self._sides is not None:
            return self._sides.read_output(grad_output, kept.counted, bases, squared_scale, sampler)
        return partial(_count, grad_output, len(kept.input))

    def show(self, kept: object, grad_output: Tensor, factor: float | Tensor) -> Shown:
        """See `SampleUse.show`."""
        assert isinstance(kept, _KeptCall)
        if self._columns is not None:
            grad_output = grad_output[..., slice(*self._columns)]
        own = self._samples_first(grad_output.detach())
        own = own.clone() if kept.counted is None else own * kept.counted.unsqueeze(-1)
        return Shown(self, kept, own, factor)

    def gradients(self, kept: object, grad_output: Tensor, samples: slice) -> Tensor:
        """See `SampleUse.gradients`."""
        assert isinstance(kept, _KeptCall)
        # Samples come first by now, whatever the call had.
        how = nn.Identity() if isinstance(self._how, SequenceFirst) else self._how
        x, g = kept.input[samples], grad_output[samples]
        return sample_gradients(self._layer, how, x, g, bias=self._bias).flatten(1)

    def width(self, grad_output: Tensor) -> int:
        """See `SampleUse.width`: rows of the input."""
        positions = grad_output[:1].numel() // self._dims[1]
        return positions * self._dims[0] * int(getattr(self._how, "groups", 1))

    def _samples_first(self, tensor: Tensor) -> Tensor:
        return self._how.samples_first(tensor) if isinstance(self._how, SequenceFirst) else tensor


class TokenSampleUse:
    """The use of a block of V outputs and D inputs as an embedding, see `EmbeddingUse`.

    Args:
        ids: V.
        padding_idx: the id whose row gets no gradient, or None.
        sides: makes the statistics of sides A and G, for a block that has them.
    """

    per_sample = True

    def __init__(
        self, ids: int, padding_idx: int | None, start: int = 0, sides: Use | None = None
    ) -> None:
        self._ids = ids
        self._padding_idx = padding_idx
        self.start = start
        self._sides = sides
        self.swapped = sides is not None and sides.swapped

    def samples(self, input: Tensor) -> int:
        """See `Use.samples`."""
        return len(input)

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """See `Use.read_input`."""
        ids = input.detach().clone()
        if self._sides is None:
            return dict, ids
        return self._sides.read_input(ids, bases, sampler)[0], ids

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """See `SampleUse`."""
        if self._sides is not None:
            return self._sides.read_output(grad_output, kept, bases, squared_scale, sampler)
        return partial(_count, grad_output, len(cast(Tensor, kept)))

    def show(self, kept: object, grad_output: Tensor, factor: float | Tensor) -> Shown:
        """See `SampleUse.show`."""
        own = grad_output.detach()
        if self._padding_idx is not None:
            own = own * (cast(Tensor, kept) != self._padding_idx).unsqueeze(-1)
        return Shown(self, kept, own.clone(), factor)

    def gradients(self, kept: object, grad_output: Tensor, samples: slice) -> Tensor:
        """See `SampleUse.gradients`."""
        ids = cast(Tensor, kept)[samples]
        return token_gradients(ids, grad_output[samples], self._ids).flatten(1)

    def width(self, grad_output: Tensor) -> int:
        """See `SampleUse.width`: unit vectors."""
        return self._ids * grad_output[:1, ..., 0].numel()


class UnitSampleUse:
    """The use of a layer that acts unit by unit, in a block of several layers."""

    swapped = False
    per_sample = True

    def __init__(self, layer: ShowsSamples, how: object, bias: bool, start: int) -> None:
        self._layer = layer
        self._how = how
        self._bias = bias
        self.start = start

    def samples(self, input: Tensor) -> int:
        """See `Use.samples`."""
        return len(input)

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """See `Use.read_input`; all samples are kept, whatever the sampler."""
        with torch.no_grad(), full_float32(input.device):
            return dict, self._layer.keep(self._how, input, None)  # type: ignore[arg-type]

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """See `SampleUse`."""
        return partial(_count, grad_output, cast(Kept, kept).count)

    def show(self, kept: object, grad_output: Tensor, factor: float | Tensor) -> Shown:
        """See `SampleUse.show`: the per-sample gradients themselves, which are small and, under a
        normalisation over the batch, need all samples."""
        with torch.no_grad(), full_float32(grad_output.device):
            grads_nUk = self._layer.sample_gradients(
                self._how,  # type: ignore[arg-type]
                cast(Kept, kept),
                grad_output,
                bias=self._bias,
            )
        return Shown(self, None, grads_nUk.flatten(1), factor)

    def gradients(self, kept: object, grad_output: Tensor, samples: slice) -> Tensor:
        """See `SampleUse.gradients`."""
        return grad_output[samples]

    def width(self, grad_output: Tensor) -> int:
        """See `SampleUse.width`: nothing."""
        return 1


def _count(grad_output: Tensor, samples: int) -> Tensors:
    return prefixed("F", {"count": at_least_float32(grad_output).new_full((), samples)})
