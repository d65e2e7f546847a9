"""The install log and its replay."""

from __future__ import annotations

import pytest
import torch

from distcurv.errors import StateError
from distcurv.train.log import InstallLog, Record, Replay

RECORDS = [
    Record(4, 0, 1, 0, 4),
    Record(4, 1, 1, 0, 4),
    Record(8, 0, 2, 5, 8),
    Record(16, 1, 2, 5, 12),
]


def log_of(records: list[Record]) -> InstallLog:
    log = InstallLog()
    for record in records:
        log.append(record)
    return log


def test_records_come_back_in_order() -> None:
    log = log_of(RECORDS)
    assert log.records() == RECORDS
    assert len(log) == log.installs == 4


def test_versions_passed_over_are_in_the_log_but_are_no_installs() -> None:
    log = log_of([Record(4, 0, 1, 0, 2), Record(4, 0, 2, 3, 4), Record(4, 1, 1, 0, 4)])
    assert (len(log), log.installs) == (3, 2)


def test_the_digest_tells_any_difference() -> None:
    logs = [log_of(RECORDS), log_of(RECORDS[::-1]), log_of(RECORDS[:3]), log_of([])]
    for i in range(len(Record._fields)):
        changed = list(RECORDS[0])
        changed[i] += 1
        logs.append(log_of([Record(*changed), *RECORDS[1:]]))
    digests = [log.digest() for log in logs]
    assert len(set(digests)) == len(digests)
    assert log_of(RECORDS).digest() == digests[0]


def test_a_log_is_taken_over_from_plain_lists() -> None:
    log = log_of([Record(1, 1, 1, 1, 1)])
    log.replace([list(record) for record in RECORDS])
    assert log.records() == RECORDS
    assert log.installs == 4
    assert log.digest() == log_of(RECORDS).digest()


def test_an_empty_log() -> None:
    assert InstallLog().records() == []


def test_replay_sends_where_the_log_folded_and_goes_on_adding_up_before() -> None:
    replay = Replay(RECORDS, 2)
    assert replay.window([0, 1], 4) == ({0, 1}, [])
    assert replay.window([0, 1], 8) == ({0}, [])  # block 1 sends both windows together at 12
    assert replay.window([0, 1], 12) == ({1}, [0])


def test_replay_drops_what_was_never_folded() -> None:
    replay = Replay([Record(8, 0, 1, 5, 8)], 2)
    assert replay.window([0, 1], 4) == (set(), [0, 1])
    assert replay.window([0, 1], 8) == ({0}, [1])


def test_replay_knows_what_each_step_installs() -> None:
    replay = Replay([*RECORDS, Record(20, 0, 3, 9, 14), Record(20, 0, 4, 15, 18)], 2)
    assert replay.version_at(0, 4) == 1
    assert replay.version_at(0, 5) is None
    assert replay.version_at(1, 8) is None
    assert replay.version_at(0, 20) == 4


def test_a_log_of_another_model_is_refused() -> None:
    with pytest.raises(StateError, match=r"names block 1, this run has 1: .*same model"):
        Replay(RECORDS, 1)
    with pytest.raises(StateError, match="names block -1"):
        Replay([Record(0, -1, 1, 0, 0)], 1)


def test_the_tensor_of_a_state_dict_holds_all_and_is_a_copy() -> None:
    log = InstallLog()
    assert log.tensor().shape == (0, 5)
    records = [Record(3, 0, 1, 0, 2), Record(2**40, 1, 2, 3, 2**40)]
    for record in records:
        log.append(record)
    saved = log.tensor()
    log.append(Record(9, 0, 3, 3, 8))
    assert saved.dtype == torch.int64
    assert [Record(*row) for row in saved.tolist()] == records
    again = InstallLog()
    again.replace(saved.tolist())
    assert again.records() == records
    assert again.installs == 2
