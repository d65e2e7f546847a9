"""The loop matrix: wrapper, precision, accumulation and checkpointing, on two ranks.

All rows run in one torchrun job.  The rows of FSDP2 run under DistributedDataParallel as well, and
their whole parameters must come out the same.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest
from distributed_jobs import Results, Scenario, run_ranks
from distributed_loops import COLUMNS, LOOP_DOORS, MATRIX, Row

# Of the largest entry of each parameter, after the whole run: in half precision a difference in
# the last bits of float32 rounds weights to another number now and then.
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}
SHARDED = [row for row in MATRIX if row.wrapper == "fsdp2"]


def reference_of(row: Row) -> Row:
    return row._replace(wrapper="ddp")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Results:
    rows = dict.fromkeys([*MATRIX, *map(reference_of, SHARDED)])
    scenarios = [
        Scenario(f"{row.key}-{door}", 2, "loop_row", {"door": door, "row": list(row)})
        for row, door in product(rows, LOOP_DOORS)
    ]
    scenarios += [
        Scenario(f"overflow-{how}-{door}", 2, "overflowed_step", {"door": door, "wrapper": how})
        for how, door in product(COLUMNS[0], LOOP_DOORS)
    ]
    scenarios += [
        Scenario(f"empty-{door}", 2, "empty_batches", {"door": door}) for door in LOOP_DOORS
    ]
    return run_ranks(scenarios, tmp_path_factory.mktemp("loops"))


def test_every_two_settings_meet_in_a_row() -> None:
    for left, right in combinations(range(len(COLUMNS)), 2):
        met = {(row[left], row[right]) for row in MATRIX}
        assert met == set(product(COLUMNS[left], COLUMNS[right]))


@pytest.mark.parametrize("door", LOOP_DOORS)
@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.key)
def test_a_row_trains_and_its_replicas_are_the_same(job: Results, row: Row, door: str) -> None:
    said = job.of(f"{row.key}-{door}")
    assert said[0]["checksum"] == said[1]["checksum"]
    assert said[0]["log"] == said[1]["log"]
    # Installs in the early phase and after it.
    assert max(step for step, *_ in said[0]["log"]) > 8
    for one in said:
        assert one["finite"]
        assert one["nonfinite"] == 0
    assert sum(one["last"] for one in said) < 0.8 * sum(one["first"] for one in said)


@pytest.mark.parametrize("door", LOOP_DOORS)
@pytest.mark.parametrize("row", SHARDED, ids=lambda row: row.key)
def test_sharded_training_is_the_replicated_one(job: Results, row: Row, door: str) -> None:
    job.of(f"{row.key}-{door}")
    ours = job.tensors(f"{row.key}-{door}")
    theirs = job.tensors(f"{reference_of(row).key}-{door}")
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= TOLERANCES[row.precision] * b.abs().max()


@pytest.mark.parametrize("door", LOOP_DOORS)
@pytest.mark.parametrize("wrapper", COLUMNS[0])
def test_a_step_that_overflows_on_one_rank_leaves_no_trace_on_any(
    job: Results, wrapper: str, door: str
) -> None:
    said = job.of(f"overflow-{wrapper}-{door}")
    for one in said:
        assert one["with"] == said[0]["without"]
        assert one["none"] == 0
        # What the gradient source never sees it need not count.
        assert (one["counted"] > 0) == (door != "soap")


@pytest.mark.parametrize("door", LOOP_DOORS)
def test_a_rank_may_have_an_empty_batch(job: Results, door: str) -> None:
    said = job.of(f"empty-{door}")
    assert said[0]["checksum"] == said[1]["checksum"]
    for one in said:
        assert one["finite"]
        assert one["version"] >= 3
    assert sum(one["last"] for one in said) < sum(one["first"] for one in said)
