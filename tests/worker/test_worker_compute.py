"""The compute side against the kinds themselves, bit for bit, and what happens when they fail."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import Tensor
from worker_fakes import FAILS, INFINITE, FakeKind, fake_spec, flat
from worker_owner import (
    DEADLINE_S,
    DENSE,
    EVERY_KIND,
    LOWRANK,
    refresh_directly,
    start_flat,
    statistic_flat,
)

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec
from distcurv.errors import ConfigError
from distcurv.worker.compute import Computer, ComputeThread
from distcurv.worker.jobs import Failed, Folded, Item, Job

SPECS = pytest.mark.parametrize("spec", EVERY_KIND, ids=lambda spec: spec.name)


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers as a view that starts 4 bytes into a buffer."""
    buffer = torch.empty(tensor.numel() + 1)
    buffer[1:] = tensor
    return buffer[1:]


def items(spec: BlockSpec, count: int = 3) -> list[Item]:
    """Blocks of one shape after a seed: their state is not made yet."""
    made = []
    for block in range(count):
        newest = start_flat(dataclasses.replace(spec, name=f"b{block}"))
        made.append(
            Item(block, f"b{block}", None, newest, newest, statistic_flat(spec, newest, block))
        )
    return made


def seeded_states(spec: BlockSpec, flats: list[Tensor]) -> list[dict[str, Tensor]]:
    kind = KINDS[spec.kind]
    states = []
    for tensor in flats:
        views = kind.published_layout(spec).views(tensor.unsqueeze(0))
        states.append({name: value[0] for name, value in kind.seed(spec, views).items()})
    return states


@SPECS
def test_results_equal_the_kind_called_directly_bit_for_bit(spec: BlockSpec) -> None:
    start = items(spec)
    bases = [item.basis for item in start]
    first, expected = refresh_directly(
        spec, seeded_states(spec, bases), [item.statistic for item in start], bases
    )
    views = [
        dataclasses.replace(item, statistic=unaligned(item.statistic), basis=unaligned(item.basis))
        for item in start
    ]
    outcome = Computer("cpu").run(Job(0, 0, spec, tuple(views)))
    assert outcome.t0 <= outcome.t1
    for index, result in enumerate(outcome.results):
        assert isinstance(result, Folded)
        assert torch.equal(result.published, expected[index])
        assert result.uncaptured == float(first.uncaptured[index])
        assert result.innovation == -1.0
    # And again from the state that the first refresh left.
    again = [
        dataclasses.replace(
            item,
            state=result.state,
            newest=result.published,
            basis=result.published,
            statistic=statistic_flat(spec, result.published, 50 + item.block),
        )
        for item, result in zip(start, outcome.results, strict=True)
        if isinstance(result, Folded)
    ]
    states = [{name: value[i] for name, value in first.state.items()} for i in range(3)]
    second, expected = refresh_directly(
        spec, states, [item.statistic for item in again], [item.basis for item in again]
    )
    outcome = Computer("cpu").run(Job(1, 1, spec, tuple(again)))
    for index, result in enumerate(outcome.results):
        assert isinstance(result, Folded)
        assert torch.equal(result.published, expected[index])
        assert result.innovation == float(second.innovation[index]) >= 0


def test_results_do_not_hold_on_to_the_batch() -> None:
    outcome = Computer("cpu").run(Job(0, 0, LOWRANK, tuple(items(LOWRANK))))
    for result in outcome.results:
        assert isinstance(result, Folded)
        for tensor in (result.published, *result.state.values()):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("bad", [FAILS, INFINITE])
def test_a_bad_block_does_not_take_the_others_down(fake_kind: FakeKind, bad: float) -> None:
    newest = flat(1, 1, 1, 0)
    entries = [
        Item(block, f"b{block}", None, newest, newest, flat(first, 0, 0, 1))
        for block, first in enumerate([5, bad, 7])
    ]
    results = Computer("cpu").run(Job(0, 0, fake_spec("b0"), tuple(entries))).results
    assert [type(result) for result in results] == [Folded, Failed, Folded]
    assert torch.equal(results[0].published, flat(16, 11, 11, 1))
    assert torch.equal(results[2].published, flat(18, 11, 11, 1))
    assert results[1].text


def test_a_singular_dense_factor_fails_alone() -> None:
    """No damping and a statistic of rank 1: the Cholesky factorisation must fail."""
    spec = dataclasses.replace(DENSE, damping=0.0, relative_damping=False)
    good, bad = items(spec, 2)
    kind = KINDS["dense"]
    statistic = kind.statistic_layout(spec).views(bad.statistic)
    for name in ("A", "G"):
        statistic[f"{name}.packed"].zero_()[0] = 1.0
    results = Computer("cpu").run(Job(0, 0, spec, (good, bad))).results
    assert isinstance(results[0], Folded)
    assert isinstance(results[1], Failed)
    assert "NumericsError" in results[1].text


def test_a_preconditioner_of_the_wrong_layout_is_not_published(
    fake_kind: FakeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fake_spec("x")
    original = fake_kind.refresh

    def misshapen(*args):  # type: ignore[no-untyped-def]
        refreshed = original(*args)
        refreshed.published["U"] = refreshed.published["U"][:, :2]
        return refreshed

    monkeypatch.setattr(fake_kind, "refresh", misshapen)
    item = Item(0, "x", None, flat(1, 1, 1, 0), flat(1, 1, 1, 0), flat(0, 0, 0, 1))
    (result,) = Computer("cpu").run(Job(0, 0, spec, (item,))).results
    assert isinstance(result, Failed)
    assert "ShapeError" in result.text


def test_an_unforeseen_error_comes_out_of_collect(
    fake_kind: FakeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args):  # type: ignore[no-untyped-def]
        raise RuntimeError("a bug")

    monkeypatch.setattr(fake_kind, "refresh", broken)
    woken = threading.Event()
    thread = ComputeThread(Computer("cpu"), woken.set, "test")
    thread.start()
    try:
        item = Item(0, "x", None, flat(1, 1, 1, 0), flat(1, 1, 1, 0), flat(0, 0, 0, 1))
        assert thread.collect() is None
        thread.submit(Job(0, 0, fake_spec("x"), (item,)))
        with pytest.raises(AssertionError):
            thread.submit(Job(1, 0, fake_spec("x"), (item,)))
        assert woken.wait(DEADLINE_S)
        with pytest.raises(RuntimeError, match="a bug"):
            thread.collect()
        assert not thread.busy
    finally:
        thread.close()


def test_a_device_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="cuda:63"):
        Computer("cuda:63")


@pytest.mark.gpu
@SPECS
def test_cuda_agrees_with_the_cpu(spec: BlockSpec) -> None:
    """Eigenvectors are free in sign, so what is compared is invariant: traces and inverses."""
    job = Job(0, 0, spec, tuple(items(spec)))
    layout = KINDS[spec.kind].published_layout(spec)
    on_cpu, on_cuda = Computer("cpu").run(job), Computer("cuda").run(job)
    for one, other in zip(on_cpu.results, on_cuda.results, strict=True):
        assert isinstance(one, Folded)
        assert isinstance(other, Folded)
        assert other.published.device.type == "cpu"
        assert {value.device.type for value in other.state.values()} == {"cuda"}
        ours, theirs = layout.views(one.published), layout.views(other.published)
        for name in ours:
            if not name.endswith(".U"):
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
