"""What a block's spec refuses, and how its sides are called."""

from __future__ import annotations

import dataclasses

import pytest

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ShapeError

LOW_RANK = SideSpec(6, 2)
DENSE = SideSpec(6, 6, "none", "dense")
DIAGONAL = SideSpec(6, 0, "diagonal", "diagonal")
UNIT = SideSpec(6, 0, "diagonal", "unit")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 1), "at least one dimension"),
        ((6, 0), "rank from 1 to dim"),
        ((6, 7), "rank from 1 to dim"),
        ((6, 0, "none", "dense"), "rank from 1 to dim"),
        ((6, 0, "diagonal", "sketch"), "rank from 1 to dim"),
        ((6, 1, "diagonal", "diagonal"), "rank 0"),
        ((6, 1, "diagonal", "unit"), "rank 0"),
        ((6, -1, "diagonal", "unit"), "rank 0"),
        ((6, 0, "isotropic", "diagonal"), "tail 'diagonal'"),
        ((6, 0, "none", "unit"), "tail 'diagonal'"),
        ((6, 2, "curly"), "curly"),
        ((6, 2, "none", "whole"), "whole"),
    ],
)
def test_sides_that_are_refused(arguments: tuple[object, ...], told: str) -> None:
    with pytest.raises(ShapeError, match=told):
        SideSpec(*arguments)  # type: ignore[arg-type]


def test_the_names_of_sides() -> None:
    def names(*sides: SideSpec) -> list[str]:
        return [name for name, _ in BlockSpec("b", "any", sides, 0.9).named_sides()]

    assert names(LOW_RANK, DIAGONAL) == ["A", "G"]
    assert names(UNIT) == names(DIAGONAL) == names(LOW_RANK) == ["F"]
    assert names(*(LOW_RANK,) * 3) == ["M0", "M1", "M2"]
    for sides in ((), (LOW_RANK,) * 9):
        with pytest.raises(ShapeError, match="sides"):
            names(*sides)
    with pytest.raises(ShapeError, match="unit"):
        names(LOW_RANK, UNIT)


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        ("lowrank", (UNIT,)),
        ("dense", (LOW_RANK, DENSE)),
        ("dense", (DENSE,) * 3),
        ("shampoo", (LOW_RANK, DENSE)),
        ("dense", (UNIT,)),
        ("diagonal", (DIAGONAL, DIAGONAL)),
        ("diagonal", (LOW_RANK,)),
        ("diagonal", (UNIT,)),
        ("unitwise", (DIAGONAL,)),
        ("unitwise", (DENSE, LOW_RANK)),
    ],
)
def test_kinds_refuse_sides_that_are_not_theirs(kind: str, sides: tuple[SideSpec, ...]) -> None:
    spec = BlockSpec("norm.3", kind, sides, 0.9)
    for layout in (KINDS[kind].statistic_layout, KINDS[kind].published_layout):
        with pytest.raises(ShapeError, match=r"norm\.3.*takes|norm\.3.*needs"):
            layout(spec)


@pytest.mark.parametrize("sides", [(UNIT,), (DIAGONAL, LOW_RANK)])
def test_fields_say_everything(sides: tuple[SideSpec, ...]) -> None:
    fields = BlockSpec("b", "any", sides, 0.9).to_fields()
    assert fields["sides"] == [dataclasses.asdict(side) for side in sides]
    assert isinstance(fields["sides"], list)
    assert tuple(SideSpec(**side) for side in fields["sides"]) == sides
