"""How one call uses a block's parameters: which side gets what, and when.

A use is read in two parts, at the forward and when the gradient of the output arrives, of which
each makes a `Reading`: the statistic of what was read, made later.  Where all rows count a part
does everything at once; where some are drawn it only copies them: between the layers of a model
the caches are cold, and an operation takes several times as long as among its likes.

Letters: N samples (dimension 0 of the input), V ids, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from distcurv.curvature.precision import full_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.curvature.statistics import weighted
from distcurv.layers.affine_rows import encode_affine_rows
from distcurv.layers.embedding_head import encode_counts, encode_token_gradients, id_counts
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import LayerIO, Rows, WeightSharing
from distcurv.layers.sequence_first import SequenceFirst

Reading = Callable[[], Tensors]  # the prefixed statistic of what one call showed of one side


class Use(Protocol):
    """One way to use a block.

    Attributes:
        swapped: the sides have changed places, see `distcurv.layers.embedding_head`.
        per_sample: calls are joined sample by sample, see `distcurv.train.sample_uses`.
    """

    swapped: bool
    per_sample: bool

    def samples(self, input: Tensor) -> int:
        """N of a call on this input."""
        ...

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """What the forward shows, and what `read_output` is to be given of it."""
        ...

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """What the gradient of the output shows; the sums, not the count, are multiplied by
        ``squared_scale``."""
        ...


class SidesUse:
    """Inputs make side A and output gradients side G.

    Args:
        how: the module, or what stands in for it, see `LayerIO`.
        columns: the output features that are the block's, (start, stop); None for all.
    """

    swapped = False
    per_sample = False

    def __init__(
        self,
        layer: LayerIO,
        how: object,
        sides: dict[str, SideSpec],
        bias: bool,
        weight_sharing: WeightSharing,
        columns: tuple[int, int] | None = None,
    ) -> None:
        self._layer = layer
        self._how = how
        self._sides = sides
        self._bias = bias
        self._weight_sharing = weight_sharing
        self._columns = columns

    def samples(self, input: Tensor) -> int:
        """See `Use.samples`."""
        return self._how.samples if isinstance(self._how, SequenceFirst) else len(input)

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """See `Use.read_input`."""
        with torch.no_grad():
            if sampler is not None and "A" not in self._layer.diagonal_sides:
                rows = self._layer.input_rows(
                    self._how,  # type: ignore[arg-type]
                    input,
                    sampler,
                    weight_sharing=self._weight_sharing,
                )
                return partial(self._encode, "A", rows, bases, 1.0), None
            with full_float32(input.device):
                statistic = self._layer.input_statistic(
                    self._how,  # type: ignore[arg-type]
                    input,
                    self._sides["A"],
                    bases.get("A.U"),
                    bias=self._bias,
                    weight_sharing=self._weight_sharing,
                )
            counted = self._layer.counted_positions(self._how, input)  # type: ignore[arg-type]
        return partial(prefixed, "A", statistic), counted

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """See `Use.read_output`."""
        if self._columns is not None:
            grad_output = grad_output[..., slice(*self._columns)]
        with torch.no_grad():
            if isinstance(kept, Tensor):
                grad_output = grad_output * kept.unsqueeze(-1)
            if sampler is not None and "G" not in self._layer.diagonal_sides:
                rows = self._layer.output_rows(
                    self._how,  # type: ignore[arg-type]
                    grad_output,
                    sampler,
                    weight_sharing=self._weight_sharing,
                )
                return partial(self._encode, "G", rows, bases, squared_scale)
            with full_float32(grad_output.device):
                statistic = self._layer.output_statistic(
                    self._how,  # type: ignore[arg-type]
                    grad_output,
                    self._sides["G"],
                    bases.get("G.U"),
                    weight_sharing=self._weight_sharing,
                )
            count = statistic.pop("count")
            statistic = {**weighted(statistic, squared_scale), "count": count}
        return partial(prefixed, "G", statistic)

    def _encode(
        self, prefix: str, rows: Rows, bases: Tensors, squared_scale: float | Tensor
    ) -> Tensors:
        with torch.no_grad(), full_float32(rows.rows_nd.device):
            statistic = encode_affine_rows(
                self._sides[prefix],
                rows.rows_nd,
                bases.get(f"{prefix}.U"),
                self._bias and prefix == "A",
                squared_scale * rows.weight,
            )
            some = next(iter(statistic.values()))
            statistic["count"] = some.new_full((), rows.count)
        return prefixed(prefix, statistic)


class EmbeddingUse:
    """An embedding with a block of Linear layout: ids make side G, output gradients side A.

    Args:
        padding_idx: the id whose row gets no gradient, or None.
    """

    swapped = True
    per_sample = False

    def __init__(
        self,
        sides: dict[str, SideSpec],
        padding_idx: int | None,
        weight_sharing: WeightSharing,
    ) -> None:
        self._sides = sides
        self._padding_idx = padding_idx
        self._weight_sharing = weight_sharing

    def samples(self, input: Tensor) -> int:
        """See `Use.samples`."""
        return len(input)

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """See `Use.read_input`; all ids count, a draw would cost as much."""
        ids = input.detach().clone()
        return partial(self._counts, ids, bases), ids

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """See `Use.read_output`."""
        assert isinstance(kept, Tensor)
        with torch.no_grad(), full_float32(grad_output.device):
            statistic = encode_token_gradients(
                self._sides["A"],
                grad_output,
                kept,
                bases.get("A.U"),
                self._padding_idx,
                self._weight_sharing,
            )
            some = next(iter(statistic.values()))
            statistic = {
                **weighted(statistic, squared_scale),
                "count": some.new_full((), len(kept)),
            }
        return partial(prefixed, "A", statistic)

    def _counts(self, ids: Tensor, bases: Tensors) -> Tensors:
        with torch.no_grad():
            counts_V = id_counts(ids, self._sides["G"].dim, self._padding_idx)
            statistic = encode_counts(self._sides["G"], counts_V, bases.get("G.U"))
            statistic["count"] = counts_V.new_full((), ids.numel())
        return prefixed("G", statistic)


class JointUse:
    """Input and output gradient together make the one side F."""

    swapped = False
    per_sample = False

    def __init__(self, layer: JointIO, how: object, bias: bool) -> None:
        self._layer = layer
        self._how = how
        self._bias = bias

    def samples(self, input: Tensor) -> int:
        """See `Use.samples`."""
        return len(input)

    def read_input(
        self, input: Tensor, bases: Tensors, sampler: Sampler | None
    ) -> tuple[Reading, object]:
        """See `Use.read_input`."""
        with torch.no_grad(), full_float32(input.device):
            kept = self._layer.keep(self._how, input, sampler)  # type: ignore[arg-type]
        return dict, kept

    def read_output(
        self,
        grad_output: Tensor,
        kept: object,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """See `Use.read_output`."""
        with torch.no_grad(), full_float32(grad_output.device):
            statistic = self._layer.statistic(
                self._how,  # type: ignore[arg-type]
                kept,  # type: ignore[arg-type]
                grad_output,
                bias=self._bias,
            )
            count = statistic.pop("count")
            scale = squared_scale * kept.weight  # type: ignore[attr-defined]
            statistic = {**weighted(statistic, scale), "count": count}
        return partial(prefixed, "F", statistic)


def prefixed(prefix: str, statistic: Tensors) -> Tensors:
    """The statistic under the names that it has in its block."""
    return {f"{prefix}.{key}": value for key, value in statistic.items()}
