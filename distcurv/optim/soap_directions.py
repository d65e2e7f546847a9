"""LowRankSOAP's directions for another optimizer: in ``.grad``, with the parameters left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distcurv.curvature.direction import Direction
from distcurv.layers.local_part import own_part
from distcurv.optim.lowrank_soap import LowRankSOAP
from distcurv.optim.matrices import Matrix
from distcurv.optim.vectors import write_vector_directions


def write_directions(
    group: Mapping[str, Any],
    targets: Sequence[Tensor],
    matrices: Sequence[Matrix],
    states: Sequence[Mapping[str, Any]],
    directions: Sequence[Direction],
) -> None:
    """Overwrite the gradients of matrices with their directions; called as `descend`.

    The first gradient makes the basis and has no direction, so it becomes zero."""
    for matrix, state, direction in zip(matrices, states, directions, strict=True):
        assert matrix.param.grad is not None
        part = own_part(matrix.param.grad)
        if state["step"] == 1:
            part.zero_()
        else:
            part.copy_(direction.dense().view(part.shape))


class SoapDirections(LowRankSOAP):
    """As `LowRankSOAP`, but `step` leaves the direction of each parameter in its ``.grad``: the
    step of an optimizer that subtracts lr times ``.grad`` is then SOAP's.  Its own ``lr`` and
    ``weight_decay`` are not read."""

    _follow = staticmethod(write_directions)
    _follow_vectors = staticmethod(write_vector_directions)
