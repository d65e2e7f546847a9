"""Draws of rows: every row equally likely, whatever the numbers, and never too many.

Unbiasedness is exact: over all values of the random number each row is drawn equally often.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distcurv.curvature.row_draw import POSITIONS_OF_AN_IMAGE, GridDraw, RowDraw, Sampler
from distcurv.errors import ShapeError

SIZES = st.integers(1, 40)


def drawn(draw: RowDraw, total: int) -> list[int]:
    return list(range(total))[draw.slice]


def drawn_from_grid(draw: GridDraw, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    axes = zip((draw.samples, *draw.axes), sizes, strict=True)
    return list(itertools.product(*(drawn(axis, size) for axis, size in axes)))


@given(samples=SIZES, positions=SIZES, max_rows=st.integers(1, 60))
def test_each_row_is_drawn_equally_often(samples: int, positions: int, max_rows: int) -> None:
    total = samples * positions
    every = Sampler(max_rows, 0).rows(samples, positions).every
    seen: Counter[int] = Counter()
    for number in range(every):
        draw = Sampler(max_rows, number).rows(samples, positions)
        assert draw.every == every
        rows = drawn(draw, total)
        assert 1 <= len(rows) <= max_rows
        seen.update(rows)
    assert seen == dict.fromkeys(range(total), 1)
    # The weight makes up for the rows that are not drawn, exactly.
    assert sum(seen.values()) * every / every == total


@given(
    sizes=st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 30)),
        st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    ),
    max_rows=st.integers(1, 60),
)
def test_each_position_of_a_grid_is_drawn_equally_often(
    sizes: tuple[int, ...], max_rows: int
) -> None:
    weight = Sampler(max_rows, 0).grid(*sizes).weight
    seen: Counter[tuple[int, ...]] = Counter()
    counts = set()
    for number in range(weight):
        rows = drawn_from_grid(Sampler(max_rows, number).grid(*sizes), sizes)
        assert 1 <= len(rows) <= max_rows
        counts.add(len(rows))
        seen.update(rows)
    assert len(seen) == math.prod(sizes)
    assert set(seen.values()) == {1}
    images = Sampler(max_rows, 0).grid(*sizes).samples.every
    if sizes[0] % images == 0 and len(sizes) > 2:
        assert len(counts) == 1  # positions alone never change the number of rows


@given(samples=SIZES, positions=SIZES, max_rows=st.integers(1, 2000))
def test_all_rows_where_they_are_no_more_than_wanted(
    samples: int, positions: int, max_rows: int
) -> None:
    assume(samples * positions <= max_rows)
    sampler = Sampler(max_rows, 987654321)
    assert sampler.rows(samples, positions) == RowDraw(0, 1)
    assert sampler.grid(samples, positions, 1).weight == 1


def test_a_sequence_is_not_always_seen_at_the_same_positions() -> None:
    draw = Sampler(256, 5).rows(16, 64)  # 1,024 rows: every 4th would be 16 positions of the 64
    assert draw.every == 5
    assert {row % 64 for row in drawn(draw, 1024)} == set(range(64))


def test_a_grid_spreads_over_images_and_positions() -> None:
    draw = Sampler(128, 12345).grid(64, 32, 32)
    rows = drawn_from_grid(draw, (64, 32, 32))
    assert len(rows) == 128
    assert len({n for n, _, _ in rows}) == 128 // POSITIONS_OF_AN_IMAGE
    assert len({(p, q) for _, p, q in rows}) == POSITIONS_OF_AN_IMAGE
    # Few images give more positions each.
    assert len({(p, q) for _, p, q in drawn_from_grid(Sampler(128, 7).grid(2, 32, 32), (2, 32, 32))}) == 64  # fmt: skip  # noqa: E501


def test_a_single_axis_of_prime_length_is_drawn_from_as_much_as_any_other() -> None:
    draw = Sampler(256, 99).grid(16, 1499)
    assert 240 <= len(drawn_from_grid(draw, (16, 1499))) <= 256


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(ShapeError, match="max_rows is 0"):
        Sampler(0, 1)
