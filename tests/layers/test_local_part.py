"""Which rows a rank holds: torch.chunk is the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distcurv.layers.linear import LinearIO
from distcurv.layers.local_part import (
    chunk_span,
    overlap,
    own_part,
    parameter_cut,
    refuse_placements,
    unsharded_type,
)
from distcurv.layers.shards import block_shard, refuse_shards


@given(size=st.integers(1, 40), parts=st.integers(1, 9))
def test_spans_are_those_of_torch_chunk(size: int, parts: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(parts)]
    chunks += [[]] * (parts - len(chunks))
    spans = [chunk_span(size, parts, index) for index in range(parts)]
    assert [list(range(*span)) for span in spans] == chunks


@given(
    span=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted),
    other=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted),
)
def test_overlap(span: list[int], other: list[int]) -> None:
    start, stop = overlap((span[0], span[1]), (other[0], other[1]))
    assert other[0] <= start <= stop <= other[1]
    assert set(range(start, stop)) == set(range(*span)) & set(range(*other))


def test_what_is_whole_stays_as_it_is() -> None:
    module = nn.Linear(3, 4)
    assert parameter_cut(module.weight) is None
    assert refuse_placements(module.weight) is None
    assert own_part(module.weight) is module.weight
    assert torch.equal(own_part(module.weight, (1, 3)), module.weight[1:3])
    assert unsharded_type(module) is nn.Linear
    assert refuse_shards(module, LinearIO()) is None
    assert block_shard(module, LinearIO(), True) is None


@pytest.mark.parametrize("kind", ["columns", "replicated", "both"])
def test_other_placements_are_refused(kind: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from distcurv.errors import ConfigError

    placements = {
        "columns": (Replicate(), Shard(1)),
        "replicated": (Replicate(), Replicate()),
        "both": (Shard(0), Shard(0)),
    }[kind]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensor = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1, 1)), placements)
        module = nn.Linear(3, 4, bias=False)
        module.weight = nn.Parameter(tensor)
        assert "placements" in (refuse_placements(module.weight) or "")
        assert "its weight is a DTensor" in (refuse_shards(module, LinearIO()) or "")
        with pytest.raises(ConfigError, match="dimension 0"):
            block_shard(module, LinearIO(), False)
    finally:
        dist.destroy_process_group()
