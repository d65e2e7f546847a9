"""The pipeline with blocks that have one side, or a diagonal one: early phase, workers, installs.

Oracle: the bias-corrected average of the statistics in float64; what is published is float32: 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from oracles import averaged, generator, relative_error
from train_rig import DEADLINE, Events

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.train import provider
from distcurv.train.group import RankGroup
from distcurv.train.lanes import OwnerLinks
from distcurv.train.pipeline import Pipeline
from distcurv.train.placement import Load
from distcurv.wiring import InlineService

CPU = torch.device("cpu")
DECAY = 0.9


def rankless(dim: int, encoding: str) -> SideSpec:
    return SideSpec(dim, 0, "diagonal", encoding)


SPECS = [
    BlockSpec("norm", "unitwise", (rankless(6, "unit"),), DECAY),
    BlockSpec("embedding", "lowrank", (rankless(9, "diagonal"), SideSpec(5, 2)), DECAY),
    BlockSpec("scale", "diagonal", (rankless(4, "diagonal"),), DECAY),
]
# Block, name in its statistic, name in what is published: averaged, nothing more.
EXACT = [
    (0, "F.ww", "F.ww"),
    (0, "F.wb", "F.wb"),
    (0, "F.bb", "F.bb"),
    (1, "A.diag", "A.tail"),
    (2, "F.diag", "F.diag"),
]
Make = Callable[..., Pipeline]


@pytest.fixture
def make(connect_with: Callable[[provider.Connector], None]) -> Iterator[Make]:
    services: list[InlineService] = []
    pipelines: list[Pipeline] = []

    def links(remote: bool) -> provider.Connector:
        def connect(workers: provider.Workers, group: RankGroup, load: Load) -> OwnerLinks:
            inline, worker = InlineService(CPU, Events()), InlineService(CPU, Events())
            services.extend((inline, worker))
            remotes = (("memory worker", worker.connect),) if remote else ()
            return OwnerLinks(inline.connect, remotes, lambda: None)

        return connect

    def build(*, remote: bool, early_steps: int) -> Pipeline:
        connect_with(links(remote))
        config = ServiceConfig(
            preconditioner_upd_interval=4,
            early_steps=early_steps,
            early_interval=2,
            install_delay=3,
            rank=2,
            wait_timeout=DEADLINE,
        )
        pipeline = Pipeline(
            SPECS, config, device=CPU, replicated=True, workers="inline", inline_fallback=False
        )
        pipelines.append(pipeline)
        return pipeline

    yield build
    for pipeline in pipelines:
        pipeline.close(DEADLINE)
    for service in services:
        service.close()


def statistic(spec: BlockSpec, step: int, basis: Tensors) -> Tensors:
    """Of 8 samples, of numbers that depend on the step alone."""
    made: Tensors = {"steps": torch.ones(())}
    for name, side in spec.named_sides():
        draw = generator(step)
        rows, biases = (torch.randn(8, side.dim, generator=draw) for _ in range(2))
        if side.encoding == "unit":
            pairs = {"ww": (rows, rows), "wb": (rows, biases), "bb": (biases, biases)}
            own = {key: (one * other).sum(0) for key, (one, other) in pairs.items()}
        elif side.encoding == "diagonal":
            own = {"diag": rows.square().sum(0)}
        else:
            own = {"Y": rows.mT @ (rows @ basis[f"{name}.U"]), "trace": rows.square().sum()}
        made |= {f"{name}.{key}": value for key, value in own.items()}
        made[f"{name}.count"] = torch.tensor(8.0)
    return made


def run(pipeline: Pipeline, steps: int) -> list[int]:
    """Training steps; returns those whose statistics were taken."""
    taken = []
    for _ in range(steps):
        step = pipeline.step_count
        if pipeline.capture_due:
            taken.append(step)
            for block, spec in enumerate(SPECS):
                pipeline.add(block, statistic(spec, step, pipeline.basis(block).tensors))
        pipeline.step([torch.zeros(1)])
    return taken


@pytest.mark.parametrize("early_steps", [0, 8])
def test_over_a_link_and_in_process_they_are_averaged_alike(make: Make, early_steps: int) -> None:
    inline, remote = (make(remote=remote, early_steps=early_steps) for remote in (False, True))
    steps = 24
    taken = run(inline, steps)
    assert run(remote, steps) == taken
    assert remote.depot.counts.from_workers > 0
    for one, other in zip(inline.installed, remote.installed, strict=True):
        assert one.version == other.version >= 4
        assert torch.equal(one.flat, other.flat)
    # One window's steps count alike, whatever their order in it.
    spans = {(r.folded_from, r.folded_through) for r in remote.install_log.records()}
    for block, of_statistic, of_version in EXACT:
        install, spec = remote.installed[block], SPECS[block]
        means = []
        for first, last in sorted(spans):
            own = [
                statistic(spec, step, install.tensors)[of_statistic] / 8
                for step in taken
                if first <= step <= last
            ]
            means.append((len(own), torch.stack(own).mean(0)))
        assert relative_error(install.tensors[of_version], averaged(DECAY, means)) < 1e-5
