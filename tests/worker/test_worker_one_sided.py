"""Many small blocks: refreshed together by shape, and what a batch gives each is its own."""

from __future__ import annotations

import dataclasses

import torch
from worker_fakes import A, Script
from worker_owner import DIAGONAL, LOWRANK, UNITWISE, start_flat, statistic_flat

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec
from distcurv.wire.messages import Published, Seed, Statistics

COUNT = 12


def test_blocks_of_one_shape_share_a_call(script: Script) -> None:
    """A model's normalisation layers are one job, whatever stands between them."""
    specs = [
        dataclasses.replace(spec, name=f"{spec.name}{copy}")
        for copy in range(COUNT)
        for spec in (UNITWISE, LOWRANK, DIAGONAL)
    ]
    session = script.open(A, specs)
    starts = [start_flat(spec) for spec in specs]
    blocks, zeros = list(range(len(specs))), [0] * len(specs)
    first = Seed(session, blocks, zeros, [-1] * len(specs), torch.cat(starts))
    assert script.say(A, first) == []
    sent = [statistic_flat(spec, starts[block], block) for block, spec in enumerate(specs)]
    assert script.say(A, Statistics(session, 0, 0, 0, blocks, zeros, torch.cat(sent))) == []
    answered: dict[int, torch.Tensor] = {}
    sizes: list[int] = []
    while job := script.service.next_job(script.now):
        sizes.append(len(job.items))
        for _, message in script.finish(job):
            if isinstance(message, Published):
                parts = message.payload.chunk(len(message.blocks))
                answered.update(zip(message.blocks, parts, strict=True))
    assert sizes == [COUNT] * 3
    for block, spec in enumerate(specs):
        assert torch.equal(answered[block], refreshed_alone(spec, starts[block], sent[block]))


def refreshed_alone(spec: BlockSpec, start: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
    kind = KINDS[spec.kind]
    published = kind.published_layout(spec)
    basis = published.views(start.unsqueeze(0))
    views = kind.statistic_layout(spec).views(statistic.unsqueeze(0))
    refreshed = kind.refresh(spec, kind.seed(spec, basis), views, basis)
    return published.pack(refreshed.published)[0]
