"""The pipeline's state through torch.save, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from train_rig import DEADLINE, block_spec

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.curvature.statistics import encode_gradient
from distcurv.errors import StateError
from distcurv.train import checkpoint
from distcurv.train.pipeline import Pipeline

SPECS = [block_spec("a"), block_spec("b", (5, 7))]
DETERMINISTIC = {"install_delay": 0, "early_steps": 2, "early_interval": 2}
FREE: dict[str, Any] = {"early_steps": 2}


@contextmanager
def pipeline(specs: list[BlockSpec] = SPECS, **config: Any) -> Iterator[Pipeline]:
    made = Pipeline(
        specs,
        ServiceConfig(preconditioner_upd_interval=4, rank=2, wait_timeout=DEADLINE, **config),
        device=torch.device("cpu"),
        replicated=True,
        workers="inline",
        inline_fallback=True,
    )
    try:
        yield made
    finally:
        made.close(DEADLINE)


def run(made: Pipeline, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(made.step_count)
        shapes = [tuple(side.dim for side in spec.sides[::-1]) for spec in made.table.specs]
        grads = [torch.randn(*shape, generator=generator) for shape in shapes]
        if made.capture_due:
            for block, grad in enumerate(grads):
                spec, basis = made.table.specs[block], made.basis(block).tensors
                made.add(block, encode_gradient(spec, grad, basis))
        made.step(grads)


def saved(steps: int = 9, **config: Any) -> dict[str, Any]:
    with pipeline(**(config or DETERMINISTIC)) as made:
        run(made, steps)
        return checkpoint.save(made)


def balanced(made: Pipeline) -> bool:
    counts = made.depot.counts
    return counts.observed == counts.folded + counts.dropped


def same_flats(left: Pipeline, right: Pipeline) -> bool:
    pairs = zip(left.installed, right.installed, strict=True)
    return all(torch.equal(a.flat, b.flat) for a, b in pairs)


def test_a_state_survives_torch_save_without_pickled_objects(tmp_path: Path) -> None:
    state = saved()
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read.keys() == state.keys()
    assert list(read["blocks"]) == ["a", "b"]
    for name, block in state["blocks"].items():
        assert torch.equal(read["blocks"][name].pop("flat"), block.pop("flat"))
    assert torch.equal(read.pop("install_log"), state.pop("install_log"))
    assert read == state


def test_restored_versions_are_installed_and_told() -> None:
    with pipeline(**DETERMINISTIC) as first, pipeline(**DETERMINISTIC) as second:
        run(first, 9)
        restored = checkpoint.load(second, checkpoint.save(first))
        assert [(i.block, i.version, i.through) for i in restored] == [(0, 3, 8), (1, 3, 8)]
        assert second.step_count == 9
        assert second.install_log.digest() == first.install_log.digest()
        assert second.install_log.installs == first.install_log.installs
        assert [i.step for i in second.installed] == [i.step for i in first.installed]
        assert same_flats(first, second)


def test_at_a_window_boundary_a_resumed_run_continues_bit_for_bit() -> None:
    state = saved(9)
    with pipeline(**DETERMINISTIC) as whole, pipeline(**DETERMINISTIC) as resumed:
        run(whole, 25)
        checkpoint.load(resumed, state)
        run(resumed, 16)
        assert resumed.install_log.digest() == whole.install_log.digest()
        assert same_flats(whole, resumed)


def test_a_state_is_a_copy_in_both_directions() -> None:
    with pipeline(**DETERMINISTIC) as first, pipeline(**DETERMINISTIC) as second:
        run(first, 9)
        state = checkpoint.save(first)
        kept = copy.deepcopy(state)
        checkpoint.load(second, state)
        run(first, 8)
        run(second, 8)
        for name in ("a", "b"):
            assert torch.equal(state["blocks"][name]["flat"], kept["blocks"][name]["flat"])
        state["blocks"]["a"]["flat"].fill_(9.0)
        assert not (second.installed[0].flat == 9.0).all()


def test_a_run_may_be_resumed_over_itself() -> None:
    """Loading back in time: versions and log are those of the state again."""
    with pipeline(**DETERMINISTIC) as made, pipeline(**DETERMINISTIC) as whole:
        run(whole, 21)
        run(made, 9)
        state = checkpoint.save(made)
        run(made, 8)
        checkpoint.load(made, state)
        run(made, 12)
        assert made.install_log.digest() == whole.install_log.digest()
        assert same_flats(made, whole)


@pytest.mark.parametrize("steps", range(8, 17))
def test_loading_at_any_step_of_the_cycle_loses_nothing_silently(steps: int) -> None:
    """Also between CLOSE and POST, and between POLL and INSTALL."""
    state = saved(6, **FREE)
    with pipeline(**FREE) as made:
        run(made, steps)
        due = sum(made.timetable.capture_due(step) for step in range(steps))
        checkpoint.load(made, state)
        assert balanced(made)
        assert made.depot.counts.observed == 2 * due
        assert made.lanes.backlog.steps() == made.depot.in_flight_steps() == 0
        run(made, 20)
        assert min(i.version for i in made.installed) > state["blocks"]["a"]["version"]
        numbers = [r.version for r in made.install_log.records() if r.block == 0]
        assert numbers == list(range(1, len(numbers) + 1))
        made.close(DEADLINE)
        assert balanced(made)


def test_a_state_before_the_first_install() -> None:
    state = saved(0)
    assert [block["version"] for block in state["blocks"].values()] == [0, 0]
    with pipeline(**DETERMINISTIC) as made, pipeline(**DETERMINISTIC) as whole:
        checkpoint.load(made, state)
        run(made, 9)
        run(whole, 9)
        assert same_flats(made, whole)


# -- what is refused ----------------------------------------------------------------------


def refused(state: dict[str, Any], match: str, specs: list[BlockSpec] = SPECS) -> None:
    """The state is refused, and the pipeline goes on as if nothing had been asked of it."""
    with pipeline(specs, **DETERMINISTIC) as made, pipeline(specs, **DETERMINISTIC) as other:
        run(made, 5)
        with pytest.raises(StateError, match=match):
            checkpoint.load(made, state)
        run(made, 8)
        run(other, 13)
        assert made.install_log.digest() == other.install_log.digest()
        assert same_flats(made, other)


@pytest.mark.parametrize("wrong", [0, 2, None, "1"])
def test_another_format(wrong: object) -> None:
    refused(saved() | {"format": wrong}, rf"has format {wrong!r}, this version reads 1")


def test_no_state_at_all() -> None:
    refused({}, "has format None")


def test_other_blocks_are_named() -> None:
    others = [block_spec("a"), block_spec("c", (5, 7))]
    refused(saved(), r"of other blocks \(differing: \['b', 'c'\]\)", others)
    refused(saved(), r"of other blocks \(differing: \['b'\]\)", SPECS[:1])


def test_blocks_in_another_order() -> None:
    refused(saved(), "of other blocks", SPECS[::-1])


def test_another_rank_names_block_and_sizes() -> None:
    others = [block_spec("a"), block_spec("b", (5, 7), rank=3)]
    refused(
        saved(), r"state of block b has \d+ numbers .* needs \d+ .*: use the kind, rank", others
    )


def test_tails_on_the_other_sides_although_sizes_are_equal() -> None:
    def tails(*names: str) -> list[BlockSpec]:
        sides = tuple(SideSpec(5, 2, tail) for tail in names)
        return [BlockSpec("a", "lowrank", sides, 0.9)]

    with pipeline(tails("isotropic", "diagonal"), **DETERMINISTIC) as made:
        state = checkpoint.save(made)
        size = made.table.published_layouts[0].size
    others = tails("diagonal", "isotropic")
    with pipeline(others, **DETERMINISTIC) as made:
        assert made.table.published_layouts[0].size == size
        with pytest.raises(StateError, match="use the kind, rank and tails"):
            checkpoint.load(made, state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(poison: float) -> None:
    state = saved()
    state["blocks"]["b"]["flat"][3] = poison
    refused(state, "state of block b is not finite")


def test_a_truncated_block() -> None:
    state = saved()
    state["blocks"]["b"]["flat"] = state["blocks"]["b"]["flat"][:-1]
    refused(state, "state of block b has")
