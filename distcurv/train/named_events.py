"""Events name blocks as workers do: by name, not by number in this job's table."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class NamedEvents:
    """An event sink that turns the table numbers of a field ``blocks`` into names."""

    def __init__(self, sink: Callable[..., None], names: Sequence[str]) -> None:
        self._sink = sink
        self._names = names

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Pass an event on."""
        blocks = fields.get("blocks")
        if isinstance(blocks, list):
            fields["blocks"] = [self._names[block] for block in blocks]
        self._sink(kind, **fields)
