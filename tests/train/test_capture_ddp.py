"""Capture of a model inside DistributedDataParallel (one gloo rank, in this process)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from capture_harness import ConvNet, Harness, assert_same_totals, batch, cross_entropy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcurv.errors import CaptureError
from distcurv.train.discover import find_layer_blocks


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_the_wrapped_model_gives_the_same_and_is_reduced_once(fisher_type: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    inputs, targets = batch(model, 5)
    wrapped = DistributedDataParallel(model)
    found, uncovered = find_layer_blocks(wrapped)
    assert [layer.name for layer in found] == ["conv", "head"]
    assert not uncovered

    reductions = []

    # DistributedDataParallel compares annotations by identity, so here they must be absent.
    def count(state, bucket):  # type: ignore[no-untyped-def]
        reductions.append(bucket.index())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    totals = []
    for runs in (model, wrapped):
        harness = Harness(model, fisher_type=fisher_type)
        with harness.capture.armed(harness.bases, harness.sink):
            logits = runs(inputs)
            if fisher_type != "empirical":
                harness.capture.sample(logits, "categorical", 2)
                assert not reductions
            cross_entropy("mean")(logits, targets).backward()
        totals.append(harness.totals)
    assert_same_totals(*totals, 1e-6)
    assert len(reductions) == len(set(reductions)) > 0


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("wrapping", ["static_graph", "find_unused_parameters"])
def test_sampling_starts_no_reduction_before_the_backward(wrapping: str, fisher_type: str) -> None:
    """Here the wrapper has put a node of its own behind the model's output."""
    torch.manual_seed(0)
    model = ConvNet()
    inputs, targets = batch(model, 5)
    loss = cross_entropy("mean")

    class Wordy(nn.Module):
        """Returns more than logits: what is no tensor, and what has no gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, object]:
            logits = self.model(x)
            return {"n": len(x), "best": logits.argmax(1), "name": "logits", "logits": logits}

    loss(model(inputs), targets).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    plain = Harness(model, fisher_type=fisher_type)
    with plain.capture.armed(plain.bases, plain.sink):
        logits = model(inputs)
        plain.capture.sample(logits, "categorical")
        loss(logits, targets).backward()
    wrapped = DistributedDataParallel(Wordy(), **{wrapping: True})
    reductions = []

    def count(state, bucket):  # type: ignore[no-untyped-def]
        reductions.append(bucket.index())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    for _ in range(2):
        model.zero_grad()
        reductions.clear()
        harness = Harness(model, fisher_type=fisher_type)
        with harness.capture.armed(harness.bases, harness.sink):
            logits = wrapped(inputs)["logits"]
            harness.capture.sample(logits, "categorical")
            assert not reductions
            assert all(p.grad is None for p in model.parameters())
            loss(logits, targets).backward()
        assert_same_totals(plain.totals, harness.totals, 1e-6)
        assert len(reductions) == len(set(reductions)) > 0
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, grad)


@pytest.mark.usefixtures("_one_rank")
def test_a_static_graph_whose_first_output_was_changed_is_refused() -> None:
    """The wrapper takes the first gradient that comes for the training loss's."""
    model = ConvNet()
    inputs, targets = batch(model, 5)
    wrapped = DistributedDataParallel(model, static_graph=True)
    harness = Harness(model, fisher_type="exact")
    for changed in (True, False, True):
        harness.arm()
        logits = wrapped(inputs)
        given = 2 * logits if changed else logits
        if changed and harness.deliveries["head"] == 0:
            with pytest.raises(CaptureError, match="very tensor that it returned"):
                harness.capture.sample(given, "categorical")
            harness.capture.disarm()
        else:
            harness.capture.sample(given, "categorical")
            cross_entropy("mean")(given, targets).backward()
            harness.capture.finish()
