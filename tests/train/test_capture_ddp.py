"""Capture of a model inside DistributedDataParallel (one gloo rank, in this process)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from capture_harness import ConvNet, Harness, assert_same_totals, batch, cross_entropy
from torch.nn.parallel import DistributedDataParallel

from distcurv.train.discover import find_layer_blocks


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_the_wrapped_model_gives_the_same_and_is_reduced_once(fisher_type: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    inputs, targets = batch(model, 5)
    wrapped = DistributedDataParallel(model)
    found, uncovered = find_layer_blocks(wrapped)
    assert [name for name, _, _ in found] == ["conv", "head"]
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
            if fisher_type == "mc":
                harness.capture.sample(logits, "categorical", 2)
                assert not reductions
            cross_entropy("mean")(logits, targets).backward()
        totals.append(harness.totals)
    assert_same_totals(*totals, 1e-6)
    assert len(reductions) == len(set(reductions)) > 0
