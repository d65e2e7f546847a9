"""Which sides a kind takes: checked wherever its layouts are made, on ranks and workers alike."""

from __future__ import annotations

from distcurv.curvature.spec import BlockSpec
from distcurv.errors import ShapeError


def require_sides(
    spec: BlockSpec, count: int, encodings: tuple[str, ...], *, powers: bool = False
) -> None:
    """Raise `ShapeError` unless the block has at most ``count`` sides, exactly one where ``count``
    is 1, each has one of these encodings, and the power is 1 or ``powers`` are taken."""
    if spec.power != 1.0 and not powers:
        raise ShapeError(
            f"block {spec.name!r} has power {spec.power}: the kind {spec.kind!r} takes 1 alone"
        )
    if len(spec.sides) > count:
        raise ShapeError(
            f"block {spec.name!r} has {len(spec.sides)} sides: the kind {spec.kind!r} takes {count}"
        )
    for name, side in spec.named_sides():
        if side.encoding not in encodings:
            raise ShapeError(
                f"side {name} of block {spec.name!r} has encoding {side.encoding!r}: the kind "
                f"{spec.kind!r} needs {' or '.join(map(repr, encodings))} there"
            )
