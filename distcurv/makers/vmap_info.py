"""A call's arguments cut into samples, for `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from distcurv.errors import ConfigError, ShapeError


class VmapInfo:
    """Batch dimensions by argument: an integer, or None for what all samples share.

    Raises `ConfigError` for anything else."""

    def __init__(self, *args: int | None, **kwargs: int | None) -> None:
        for value in (*args, *kwargs.values()):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"a batch dimension is {value!r}: give an integer or None")
        self.args = args
        self.kwargs = kwargs


class BatchedCall:
    """The arguments of a call, of which some tensors have a batch dimension.

    Args:
        info: batch dimensions by argument, for all tensors in it; None: 0 for every tensor that
            has a dimension.
        call: ``model`` or ``loss``, for errors.

    Attributes:
        in_dims: the batch dimension of each batched tensor, for ``vmap``.

    Raises `ConfigError` where the info is for other arguments than the call has.
    """

    def __init__(
        self, info: VmapInfo | None, args: Sequence[Any], kwargs: Mapping[str, Any], call: str
    ) -> None:
        if info is not None and (len(info.args) != len(args) or set(info.kwargs) != set(kwargs)):
            raise ConfigError(
                f"setup_{call}_vmap_info was given {len(info.args)} arguments and the keywords "
                f"{sorted(info.kwargs)}: the {call} call has {len(args)} and {sorted(kwargs)}"
            )
        self._call = call
        self._leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        self._dims: list[int | None] = []
        if info is None:
            given: list[int | None] = [0] * (len(args) + len(kwargs))
        else:
            given = [*info.args, *(info.kwargs[key] for key in kwargs)]
        for value, dim in zip((*args, *kwargs.values()), given, strict=True):
            for leaf in tree_flatten(value)[0]:
                batched = isinstance(leaf, Tensor) and (info is not None or leaf.dim() > 0)
                self._dims.append(self._checked(leaf, dim) if batched else None)
        self.in_dims = [dim for dim in self._dims if dim is not None]

    @property
    def samples(self) -> int | None:
        """How many, by the first batched tensor; None where there is none."""
        for leaf, dim in zip(self._leaves, self._dims, strict=True):
            if dim is not None:
                return int(leaf.shape[dim])
        return None

    def tensors(self, samples: int) -> list[Tensor]:
        """The batched tensors, for ``vmap`` over ``in_dims``: for each sample a batch of one, or,
        of a tensor that has k times as many rows (flattened tokens), a batch of its k rows.

        Raises `ShapeError` for a tensor that cannot be cut so."""
        return [
            self._cut(leaf, dim, samples)
            for leaf, dim in zip(self._leaves, self._dims, strict=True)
            if dim is not None
        ]

    def _checked(self, tensor: Tensor, dim: int | None) -> int | None:
        if dim is None or 0 <= dim < tensor.dim():
            return dim
        if -tensor.dim() <= dim < 0:
            return dim + tensor.dim()
        raise ShapeError(
            f"setup_{self._call}_vmap_info was given the batch dimension {dim} for a tensor of "
            f"shape {tuple(tensor.shape)}"
        )

    def _cut(self, tensor: Tensor, dim: int, samples: int) -> Tensor:
        if tensor.shape[dim] % samples:
            raise ShapeError(
                f"the {self._call} call has an argument of shape {tuple(tensor.shape)} with the "
                f"batch dimension {dim}, and {samples} samples: say with "
                f"setup_{self._call}_vmap_info which arguments have one (None for those without)"
            )
        return tensor.unflatten(dim, (samples, tensor.shape[dim] // samples))

    def of_one(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with these in place of the batched tensors."""
        rest = iter(tensors)
        leaves = [
            leaf if dim is None else next(rest)
            for leaf, dim in zip(self._leaves, self._dims, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs
