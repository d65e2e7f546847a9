"""The summary: every parameter once per block, with a reason where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from distcurv.config import KfacConfig
from distcurv.curvature.kinds import KINDS
from distcurv.optim import LowRankSOAP
from distcurv.train.coverage import block_rows, kfac_summary
from distcurv.train.planning import plan_blocks
from distcurv.train.preconditioner import Preconditioner
from distcurv.train.summary import BlockRow, Row, Side, Summary, bytes_text, plain_lines
from distcurv.train.table import BlockTable


class Zoo(nn.Module):
    """Attention (three blocks in one parameter), a tied head, a norm, a scale, something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 8)
        self.wide.bias.requires_grad_(False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.out(self.wide(self.norm(h)) * self.scale + self.frozen(h))


def planned(model: nn.Module, **settings: Any) -> Summary:
    blocks, uncovered = plan_blocks(model, KfacConfig(rank=3, **settings))
    table = BlockTable.make([b.spec for b in blocks], [0], 8)
    return kfac_summary(model, blocks, uncovered, block_rows(table))


def numbers_of(summary: Summary) -> dict[str, int]:
    total: dict[str, int] = {}
    for row in summary.rows:
        total[row.parameter] = total.get(row.parameter, 0) + row.numbers
    return total


def test_every_parameter_is_told_once_and_whole() -> None:
    model = Zoo()
    summary = planned(model)
    assert numbers_of(summary) == {name: p.numel() for name, p in model.named_parameters()}
    for row in summary.rows:
        assert (row.block is None) == (row.reason is not None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.trainable == trained
    assert summary.covered == sum(r.numbers for r in summary.rows if r.block is not None)
    assert summary.coverage == pytest.approx(summary.covered / trained)
    assert [r.reason for r in summary.rows if r.parameter.startswith("frozen")] == ["frozen"] * 2
    assert [r.reason for r in summary.rows if r.parameter == "wide.bias"] == ["frozen"]


def test_a_parameter_of_several_blocks_has_a_row_for_each() -> None:
    rows = [r for r in planned(Zoo()).rows if r.parameter == "attention.in_proj_weight"]
    assert [r.rows for r in rows] == [(0, 8), (8, 16), (16, 24)]
    assert [r.shape for r in rows] == [(8, 8)] * 3
    assert len({r.block.name for r in rows if r.block is not None}) == 3


def test_tied_parameters_appear_once_under_their_first_name() -> None:
    names = [row.parameter for row in planned(Zoo()).rows]
    assert names.count("embed.weight") == 1
    assert "out.weight" not in names


def test_what_is_said_of_a_block_is_what_its_spec_says() -> None:
    model = nn.Linear(9, 5)
    blocks, _ = plan_blocks(model, KfacConfig(rank=3))
    (row, bias) = planned(model).rows
    spec = blocks[0].spec
    kind = KINDS[spec.kind]
    assert (
        row.block
        == bias.block
        == BlockRow(
            name=spec.name,
            kind="lowrank",
            sides=tuple(
                Side(name, side.dim, side.rank, side.encoding) for name, side in spec.named_sides()
            ),
            bytes_per_refresh=4
            * (kind.statistic_layout(spec).size + kind.published_layout(spec).size),
            owner=0,
            worker=None,
        )
    )
    assert [side.dim for side in row.block.sides] == [10, 5]  # type: ignore[union-attr]


def test_what_is_left_out_says_why() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3), nn.ReLU())})
    model["c"] = nn.Linear(3, 3)
    summary = planned(model, ignore_modules=("b",), overrides=[("^c$", {"precondition": False})])
    reasons = {row.parameter: row.reason for row in summary.rows}
    assert reasons == {
        "a.weight": None,
        "a.bias": None,
        "b.0.weight": "ignored by ignore_modules",
        "b.0.bias": "ignored by ignore_modules",
        "c.weight": "left out by KfacConfig.overrides",
        "c.bias": "left out by KfacConfig.overrides",
    }
    assert (summary.covered, summary.trainable, summary.blocks) == (12, 36, 1)


def test_names_are_those_of_the_bare_model() -> None:
    assert [r.parameter for r in planned(DataParallel(nn.Linear(3, 3))).rows] == ["weight", "bias"]


def test_a_preconditioner_and_an_optimizer_tell_owner_and_worker() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    with Preconditioner(model, KfacConfig(rank=2), workers="inline") as precond:
        rows = precond.summary().rows
    assert {(r.block.owner, r.block.worker) for r in rows if r.block is not None} == {(0, "inline")}
    with LowRankSOAP(model, rank=2, workers="inline") as optimizer:
        summary = optimizer.summary()
    covered = {r.parameter for r in summary.rows if r.block is not None}
    assert covered == {"0.weight", "2.weight"}
    assert {r.reason for r in summary.rows if r.block is None} == {"no matrix: gets AdamW's rule"}
    assert {r.block.worker for r in summary.rows if r.block is not None} == {"inline"}


def test_a_worker_is_told_by_its_endpoint() -> None:
    endpoint = "tcp://127.0.0.1:9"  # nobody listens
    config = KfacConfig(rank=2, early_steps=0)
    with Preconditioner(nn.Linear(4, 3), config, workers=[endpoint]) as precond:
        assert [r.block.worker for r in precond.summary().rows if r.block] == [endpoint] * 2


def test_the_text_is_a_table_with_a_total() -> None:
    block = BlockRow("body", "lowrank", (Side("A", 9, 3, "sketch"),), 1500, 1, None)
    norm = BlockRow("norm", "unitwise", (Side("F", 4, 0, "unit"),), 96, 0, None)
    summary = Summary(
        (
            Row("body.weight", None, (4, 8), 32, True, block, None),
            Row("body.bias", None, (4,), 4, True, block, None),
            Row("norm.weight", (0, 4), (4,), 4, True, norm, None),
            Row("odd", None, (), 1, True, None, "no reason"),
            Row("ice", None, (7,), 7, False, None, "frozen"),
        )
    )
    assert str(summary).splitlines() == [
        "parameter         shape   block  kind      dims  rank  encoding  per refresh  owner"
        "  why not covered",
        "----------------  ------  -----  --------  ----  ----  --------  -----------  -----"
        "  ---------------",
        "body.weight       4x8     body   lowrank   9     3     sketch         1.5 kB      1",
        "body.bias         4       body",
        "norm.weight[0:4]  4       norm   unitwise  4           unit             96 B      0",
        "odd               scalar                                                           "
        "  no reason",
        "ice               7                                                                "
        "  frozen",
        "",
        "40 of 41 trainable parameters covered (97.6%) by 2 blocks, 1.6 kB per refresh of all",
    ]
    fields = summary.as_fields()
    assert fields["covered"] == 40 and fields["bytes_per_refresh"] == 1596
    assert fields["rows"][2]["rows"] == [0, 4]  # type: ignore[index]
    assert fields["rows"][0]["sides"] == [  # type: ignore[index]
        {"name": "A", "dim": 9, "rank": 3, "encoding": "sketch"}
    ]


def test_an_empty_summary_has_no_coverage() -> None:
    assert Summary(()).coverage == 0.0
    assert plain_lines(["a"], [], frozenset()) == ["a", "-"]
    assert bytes_text(2_500_000) == "2.5 MB"
