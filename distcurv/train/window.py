"""The window: statistics since the last sync point, one flat bucket per owner.

A bucket's layout depends on shapes alone, so a rank without a statistic contributes zeros and
count 0, and a reduce never has to be skipped.  Closing hands the buckets away: whoever holds a
closed bucket may keep it without copying.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distcurv.curvature.spec import Tensors
from distcurv.errors import ShapeError
from distcurv.train.table import BlockTable


class Closed:
    """A closed window.

    Attributes:
        since, through: first and last training step of the window.
        captures: due statistic steps that it holds (counted on the host).
        buckets: flat float32 tensor by owner rank.
    """

    def __init__(self, since: int, through: int, captures: int, buckets: dict[int, Tensor]) -> None:
        self.since = since
        self.through = through
        self.captures = captures
        self.buckets = buckets


class Window:
    """Sums statistics of the blocks that this rank contributes to.

    Args:
        table: the block table.
        owners: owner ranks whose blocks this rank contributes to (all of them, or only itself
            where gradients are replicated and no reduction is needed).
        device: where the statistics are.
    """

    def __init__(self, table: BlockTable, owners: list[int], device: torch.device) -> None:
        self._table = table
        self._owners = owners
        self._device = device
        self._slices: dict[int, tuple[int, int, int]] = {}  # block -> owner, start, end
        self._sizes: dict[int, int] = {}
        for owner in owners:
            position = 0
            for block in table.owned_by(owner):
                size = table.statistic_layouts[block].size
                self._slices[block] = (owner, position, position + size)
                position += size
            self._sizes[owner] = position
        self._since = 0
        self._captures = 0
        self._open()

    def _open(self) -> None:
        # Made when the first statistic comes: until then the closed ones are on their way.
        self._buckets: dict[int, Tensor] = {}
        self._views: dict[int, Tensors] = {}

    def _bucket(self, owner: int) -> Tensor:
        if owner not in self._buckets:
            self._buckets[owner] = torch.zeros(
                self._sizes[owner], dtype=torch.float32, device=self._device
            )
        return self._buckets[owner]

    def contributes(self, block: int) -> bool:
        """Whether this rank adds statistics of the block."""
        return block in self._slices

    def add(self, block: int, statistic: Mapping[str, Tensor]) -> None:
        """Add named tensors of a block's statistic layout (any subset of the names)."""
        views = self._views.get(block)
        if views is None:
            owner, start, end = self._slices[block]
            layout = self._table.statistic_layouts[block]
            views = self._views[block] = layout.views(self._bucket(owner)[start:end])
        unknown = [name for name in statistic if name not in views]
        if unknown:
            raise ShapeError(
                f"statistic of block {self._table.specs[block].name} has unknown fields {unknown}:"
                f" its layout is {list(views)}"
            )
        with torch.no_grad():
            torch._foreach_add_([views[name] for name in statistic], list(statistic.values()))

    def count_capture(self) -> None:
        """Note that one due statistic step has passed."""
        self._captures += 1

    @property
    def captures(self) -> int:
        """Due statistic steps since the window was opened."""
        return self._captures

    def close(self, through: int) -> Closed:
        """Hand the buckets away and open the next window at step ``through`` + 1."""
        buckets = {owner: self._bucket(owner) for owner in self._sizes}
        closed = Closed(self._since, through, self._captures, buckets)
        self._since = through + 1
        self._captures = 0
        self._open()
        return closed

    def restart(self, step: int) -> int:
        """Throw the open window away and begin anew at ``step``; returns its captures."""
        lost = self._captures
        self._since = step
        self._captures = 0
        self._open()
        return lost
