"""Packed triangles against an entry-by-entry reference; exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, symmetric, triangle

from distcurv.curvature.triangle import (
    diagonal_of_triangle,
    pack_triangle,
    triangle_size,
    unpack_triangle,
)
from distcurv.errors import ShapeError


@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_pack_is_the_upper_triangle_by_rows(d: int) -> None:
    matrix = torch.randn(d, d, generator=generator(d), dtype=torch.float64)
    assert pack_triangle(matrix).tolist() == triangle(matrix)
    assert pack_triangle(matrix).numel() == triangle_size(d)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_unpack_fills_both_halves(d: int) -> None:
    packed = torch.randn(triangle_size(d), generator=generator(d), dtype=torch.float64)
    assert torch.equal(unpack_triangle(packed, d), symmetric(packed, d))
    assert torch.equal(diagonal_of_triangle(packed, d), symmetric(packed, d).diagonal())


@given(d=st.integers(1, 12), batch=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 99))
def test_round_trip_for_any_batch(d: int, batch: list[int], seed: int) -> None:
    half = torch.randn(*batch, d, d, generator=generator(seed))
    matrix = half + half.mT
    packed = pack_triangle(matrix)
    assert packed.shape == (*batch, triangle_size(d))
    assert torch.equal(unpack_triangle(packed, d), matrix)
    assert torch.equal(diagonal_of_triangle(packed, d), matrix.diagonal(dim1=-2, dim2=-1))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 4\)"):
        pack_triangle(torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="must be 6 for d = 3"):
        unpack_triangle(torch.zeros(5), 3)
