"""Some rows instead of all of them: which ones, and the weight that keeps their sums unbiased.

A factor is an average over rows that the EMA averages again over steps, so a few rows a step are
enough where a step has many (tokens, positions).  Draws are systematic (Cochran 1977, "Sampling
Techniques", chapter 8): every k-th row, from a random first one below k.  Each row is drawn with
probability 1/k, so sums over the drawn rows times k are unbiased, whatever the order of the rows.
Such a draw spreads evenly over what there is, and is a view of it: nothing is looked up.

Letters: N rows, k = ``every``.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from functools import lru_cache

from distcurv.errors import ShapeError

# So many positions of an image are looked at before fewer images are: more say little new, and
# every image costs.
POSITIONS_OF_AN_IMAGE = 8


@dataclass(frozen=True)
class RowDraw:
    """``first``, ``first + every``, ``first + 2 every``, ...

    Attributes:
        first: 0 <= first < every.
        every: k >= 1; also the weight of sums over what is drawn.
    """

    first: int
    every: int

    @property
    def slice(self) -> slice:
        """Of the dimension that is drawn from."""
        return slice(self.first, None, self.every)


@dataclass(frozen=True)
class GridDraw:
    """Rows of images: independent draws of images and along each of their axes."""

    samples: RowDraw
    axes: tuple[RowDraw, ...]

    @property
    def weight(self) -> int:
        """Of sums over the drawn positions of the drawn images."""
        return self.samples.every * math.prod(axis.every for axis in self.axes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of the axes."""
        return tuple(axis.slice for axis in self.axes)


@dataclass(frozen=True)
class Sampler:
    """Draws the rows of one call.

    Attributes:
        max_rows: at most so many are drawn, and at least one.
        number: a random integer >= 0, uniform over a range much larger than any number of rows.

    Raises `ShapeError` for ``max_rows`` < 1.
    """

    max_rows: int
    number: int

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ShapeError(f"max_rows is {self.max_rows}: at least one row must be drawn")

    def rows(self, samples: int, positions: int = 1) -> RowDraw:
        """Of samples times positions rows, counted position by position."""
        every = _coprime_step(samples * positions, positions, self.max_rows)
        return RowDraw(self.number % every, every)

    def grid(self, samples: int, *sizes: int) -> GridDraw:
        """Of samples times sizes[0] times sizes[1] ... rows.

        Where there are two axes or more the steps divide the sizes, so that every draw has the
        same number of positions.  A single axis has few divisors to choose from, maybe none, and
        is drawn with any step: the numbers of positions differ by one at most."""
        draws = []
        number = self.number
        for every in _grid_steps(samples, sizes, self.max_rows):
            number, first = divmod(number, every)
            draws.append(RowDraw(first, every))
        return GridDraw(draws[0], tuple(draws[1:]))


@lru_cache(maxsize=256)
def _coprime_step(total: int, positions: int, max_rows: int) -> int:
    """The smallest step that draws few enough rows and shares no factor with the positions, else
    every sample would be seen at the same few of them."""
    if total <= max_rows:
        return 1
    least = math.ceil(total / max_rows)
    coprime = (k for k in range(least, total + 1) if math.gcd(k, positions) == 1)
    return next(coprime, least)


@lru_cache(maxsize=256)
def _grid_steps(samples: int, sizes: tuple[int, ...], max_rows: int) -> tuple[int, ...]:
    """Steps over samples and along each axis."""
    if samples * math.prod(sizes) <= max_rows:
        return (1,) * (1 + len(sizes))
    most = max(min(POSITIONS_OF_AN_IMAGE, max_rows), max_rows // samples)
    if len(sizes) == 1:
        steps = (math.ceil(sizes[0] / most),)
        positions = math.ceil(sizes[0] / steps[0])
    else:
        # As many positions as may be, spread as evenly as can be.
        positions, _, *divided = max(
            (math.prod(counts), min(counts) - max(counts), *map(operator.floordiv, sizes, counts))
            for counts in itertools.product(*map(_divisors, sizes))
            if math.prod(counts) <= most
        )
        steps = tuple(divided)
    images = max_rows // positions
    return math.ceil(samples / images), *steps


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
