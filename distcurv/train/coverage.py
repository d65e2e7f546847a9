"""Tells of every parameter which blocks it is in, and of every other one why it is in none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from distcurv.layers.column import layers_of
from distcurv.layers.weight_bias import WeightBias
from distcurv.train.discover import Uncovered, bare_model, named_parameters
from distcurv.train.group import RankGroup
from distcurv.train.lanes import Lanes
from distcurv.train.placement import INLINE, exchanged_bytes
from distcurv.train.planning import PlannedBlock
from distcurv.train.summary import BlockRow, Row, Side, Summary
from distcurv.train.table import BlockTable

Rows = tuple[int, int] | None
# Index of a block in the table, and the rows of the parameter that it has; by the parameter's id.
Claims = dict[int, list[tuple[int, Rows]]]

FROZEN = "frozen"


def block_rows(table: BlockTable, workers: Sequence[str | None] | None = None) -> list[BlockRow]:
    """What is said of each block of a table.

    Args:
        workers: the endpoint of each block, see `told_workers`; None where none are known.
    """
    return [
        BlockRow(
            spec.name,
            spec.kind,
            tuple(
                Side(name, side.dim, side.rank, side.encoding) for name, side in spec.named_sides()
            ),
            exchanged_bytes(spec),
            owner,
            None if workers is None else workers[block],
        )
        for block, (spec, owner) in enumerate(zip(table.specs, table.owners, strict=True))
    ]


def told_workers(group: RankGroup, table: BlockTable, lanes: Lanes) -> list[str | None]:
    """The endpoint that serves each block; a collective, as a rank knows its own workers alone."""
    mine = {
        str(block): INLINE if lane.remote is None else lane.remote.name
        for lane in lanes.lanes
        for block in lane.blocks
    }
    text = json.dumps(mine).encode()
    size = int(group.gather(torch.tensor([len(text)])).max())
    note = torch.zeros(max(1, size), dtype=torch.uint8)
    note[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    workers: list[str | None] = [None] * len(table)
    for told in group.gather(note):
        for block, endpoint in json.loads(bytes(told.tolist()).rstrip(b"\0")).items():
            workers[int(block)] = endpoint
    return workers


def kfac_summary(
    model: nn.Module,
    blocks: Sequence[PlannedBlock],
    uncovered: Iterable[Uncovered],
    rows: Sequence[BlockRow],
) -> Summary:
    """The summary of a `Preconditioner`, or of one that might be made."""
    claims: Claims = {}
    for index, planned in enumerate(blocks):
        for module, layer in layers_of(planned.found.module, planned.found.layer):
            names = layer.parameter_names(module)
            bias_rows = layer.bias_rows if isinstance(layer, WeightBias) else layer.rows
            for name, own in zip(names, (layer.rows, bias_rows), strict=False):
                claims.setdefault(id(module.get_parameter(name)), []).append((index, own))
    bare = bare_model(model)
    reasons = {one.name: one.reason for one in uncovered}
    # A model that is one layer goes by the name of its type.
    reasons = {"" if name == type(bare).__name__ else name: r for name, r in reasons.items()}

    def why(name: str) -> str:
        # Of the parameter itself, else of the modules that it is in, the innermost first.
        path = name
        while path not in reasons and path:
            path = path.rpartition(".")[0]
        return reasons.get(path, "it is in no block")

    named = {name: why(name) for name, _ in named_parameters(bare)}
    return _summary(named_parameters(bare), claims, named, rows)


def matrices_summary(
    named: Iterable[tuple[str, Tensor]], block_of: Mapping[int, int], rows: Sequence[BlockRow]
) -> Summary:
    """The summary of an optimizer whose matrices are blocks.

    Args:
        block_of: index of the block by the id of the parameter.
    """
    params = list(named)
    claims: Claims = {key: [(block, None)] for key, block in block_of.items()}
    reasons = {name: "no matrix: gets AdamW's rule" for name, _ in params}
    return _summary(params, claims, reasons, rows)


def _summary(
    named: Iterable[tuple[str, Tensor]],
    claims: Claims,
    reasons: Mapping[str, str],
    blocks: Sequence[BlockRow],
) -> Summary:
    rows: list[Row] = []
    for name, parameter in named:
        lazy = isinstance(parameter, UninitializedParameter)
        shape = () if lazy else tuple(parameter.shape)
        mine = claims.get(id(parameter), [])
        rows += [_row(name, shape, own, blocks[block]) for block, own in mine]
        for own in _left(shape, [own for _, own in mine]):
            trainable = parameter.requires_grad
            reason = reasons[name] if trainable else FROZEN
            rows.append(_row(name, shape, own, None, trainable, 0 if lazy else None, reason))
    return Summary(tuple(rows))


def _left(shape: tuple[int, ...], claimed: Sequence[Rows]) -> list[Rows]:
    """The rows of a parameter that no block has."""
    if not claimed:
        return [None]
    if None in claimed:
        return []
    left: list[Rows] = []
    position = 0
    for start, stop in sorted(rows for rows in claimed if rows is not None):
        if start > position:
            left.append((position, start))
        position = max(position, stop)
    return [*left, (position, shape[0])] if position < shape[0] else left


def _row(
    name: str,
    shape: tuple[int, ...],
    rows: Rows,
    block: BlockRow | None,
    trainable: bool = True,
    numbers: int | None = None,
    reason: str | None = None,
) -> Row:
    part = shape if rows is None else (rows[1] - rows[0], *shape[1:])
    if numbers is None:
        numbers = torch.Size(part).numel()
    return Row(name, rows, part, numbers, trainable, block, reason)
