"""The timeline: valid Chrome trace JSON in which the path of a version can be seen."""

from __future__ import annotations

from typing import Any

import chrome_trace_format

from distcurv.observe.timeline import REFRESH_TRACK, STEPS_TRACK, chrome_trace

MS = 1_000_000
START = 7_000_000_000


def event(who: str, kind: str, ms: float, **fields: Any) -> dict[str, Any]:
    return {"t": START + int(ms * MS), "who": who, "kind": kind, **fields}


def step(who: str, number: int, since: float, until: float) -> dict[str, Any]:
    times = {"t0": START + int(since * MS), "t1": START + int(until * MS)}
    return event(who, "step", until, step=number, **times)


def refresh(blocks: list[Any], versions: list[int], since: float, until: float, **more: Any) -> Any:
    times = {"t0": START + int(since * MS), "t1": START + int(until * MS)}
    return event("worker0", "refresh", until, blocks=blocks, versions=versions, **times, **more)


def run_of_two_ranks(rank_blocks: list[Any]) -> list[dict[str, Any]]:
    """Ten steps of 10 ms; a statistic sent in step 1 becomes version 1, installed in step 6."""
    events = []
    for rank in ("rank0", "rank1"):
        events += [step(rank, n, 10 * n, 10 * n + 9) for n in range(10)]
        events.append(
            event(
                rank,
                "install",
                65,
                step=6,
                blocks=rank_blocks,
                versions=[1, 1],
                based_on=[1, 1],
                route="worker",
            )
        )
    statistic = {"seq": 0, "since": 0, "through": 1, "basis": [0, 0]}
    events += [
        event("rank0", "statistic_sent", 15, blocks=rank_blocks, bytes=100, **statistic),
        event(
            "worker0", "statistic_received", 16, blocks=["a", "b"], bytes=117, owner=0, **statistic
        ),
        refresh(["a", "b"], [1, 1], 20, 40, seq=0, owner=0),
        event("worker0", "publish", 40.5, blocks=["a", "b"], versions=[1, 1], based_on=[1, 1]),
        event("worker0", "heartbeat", 50, busy=0.4, queued=0),
        event("rank0", "published_received", 41, blocks=rank_blocks, versions=[1, 1], bytes=90),
        event("rank0", "something_new", 42),
    ]
    return events


def of(trace: dict[str, Any], ph: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        record
        for record in trace["traceEvents"]
        if record["ph"] == ph and all(record.get(key) == value for key, value in fields.items())
    ]


def test_path_of_a_version_leads_from_step_over_refresh_to_step() -> None:
    trace = chrome_trace(run_of_two_ranks(["a", "b"]))
    chrome_trace_format.check(trace)
    pids = {r["args"]["name"]: r["pid"] for r in of(trace, "M", name="process_name")}
    points = [
        (r["ph"], r["pid"], r["tid"], r["ts"])
        for r in trace["traceEvents"]
        if r["ph"] in ("s", "t", "f")
    ]
    assert points == [
        ("s", pids["rank0"], STEPS_TRACK, 15_000.0),
        ("t", pids["worker0"], REFRESH_TRACK, 30_000.0),
        ("f", pids["rank0"], STEPS_TRACK, 65_000.0),
    ]


def test_tracks_slices_and_instants() -> None:
    trace = chrome_trace(run_of_two_ranks(["a", "b"]))
    order = [r["args"]["name"] for r in of(trace, "M", name="process_name")]
    assert order == ["rank0", "rank1", "worker0"]
    names = {r["args"]["name"] for r in of(trace, "M", name="thread_name")}
    assert names == {"rank0 steps", "rank1 steps", "worker0 refreshes"}
    steps = of(trace, "X", cat="step", pid=1)
    assert [(s["ts"], s["dur"]) for s in steps] == [(10_000.0 * n, 9_000.0) for n in range(10)]
    (made,) = of(trace, "X", cat="refresh")
    assert (made["name"], made["ts"], made["dur"]) == ("refresh v1", 20_000.0, 20_000.0)
    assert made["args"]["seq"] == 0
    instants = sorted(r["cat"] for r in of(trace, "i"))
    assert instants == [
        "install",
        "install",
        "publish",
        "published_received",
        "statistic_received",
        "statistic_sent",
    ]
    (beat,) = of(trace, "C", name="heartbeat")
    assert beat["args"] == {"busy": 0.4, "queued": 0}


def test_staleness_counts_up_from_the_step_a_version_is_based_on() -> None:
    trace = chrome_trace(run_of_two_ranks(["a", "b"]))
    counted = [(r["ts"], r["args"]["steps"]) for r in of(trace, "C", name="staleness", pid=2)]
    # Installed at 65 ms in step 6, based on step 1; then the ends of steps 6 to 9.
    assert counted == [(65_000.0, 5), (69_000.0, 5), (79_000.0, 6), (89_000.0, 7), (99_000.0, 8)]


def test_staleness_is_that_of_the_oldest_block() -> None:
    events = [
        step("rank0", 8, 0, 9),
        event("rank0", "install", 5, step=8, blocks=[0], versions=[3], based_on=[7]),
        event("rank0", "install", 6, step=8, blocks=[1], versions=[2], based_on=[2]),
    ]
    counted = [r["args"]["steps"] for r in of(chrome_trace(events), "C")]
    assert counted == [1, 6, 6]


def test_arrow_without_install_ends_at_the_refresh() -> None:
    events = [e for e in run_of_two_ranks(["a", "b"]) if e["kind"] != "install"]
    trace = chrome_trace(events)
    chrome_trace_format.check(trace)
    assert [r["ph"] for r in trace["traceEvents"] if r["ph"] in "stf"] == ["s", "f"]


def test_no_arrow_without_a_step_to_start_from_or_a_statistic() -> None:
    for missing in ("step", "statistic_sent"):
        events = [e for e in run_of_two_ranks(["a", "b"]) if e["kind"] != missing]
        trace = chrome_trace(events)
        chrome_trace_format.check(trace)
        assert not [r for r in trace["traceEvents"] if r["ph"] in "stf"], missing


def test_message_that_went_between_two_steps_is_bound_to_the_nearer_one() -> None:
    events = run_of_two_ranks(["a", "b"])
    sent = next(e for e in events if e["kind"] == "statistic_sent")
    sent["t"] = START + int(19.3 * MS)  # step 1 ends at 19 ms, step 2 starts at 20 ms
    trace = chrome_trace(events)
    chrome_trace_format.check(trace)
    assert of(trace, "s")[0]["ts"] == 19_000.0


def test_worker_that_was_quicker_than_the_senders_note_gets_an_arrow_forward() -> None:
    events = run_of_two_ranks(["a", "b"])
    sent = next(e for e in events if e["kind"] == "statistic_sent")
    sent["t"] = START + 45 * MS  # written down after the refresh had ended
    trace = chrome_trace(events)
    chrome_trace_format.check(trace)
    assert of(trace, "s")[0]["ts"] == 20_000.0


def test_two_owners_with_the_same_sequence_numbers_are_kept_apart() -> None:
    events = [step(rank, 0, 0, 100) for rank in ("rank0", "rank1")]
    for owner, block in ((0, "a"), (1, "b")):
        statistic = {"seq": 0, "since": 0, "through": 0, "basis": [0]}
        events.append(event(f"rank{owner}", "statistic_sent", 10, blocks=[block], **statistic))
        events.append(
            event("worker0", "statistic_received", 11, blocks=[block], owner=owner, **statistic)
        )
        events.append(refresh([block], [1], 20 + 10 * owner, 25 + 10 * owner, seq=0, owner=owner))
    trace = chrome_trace(events)
    chrome_trace_format.check(trace)
    assert [r["pid"] for r in of(trace, "s")] == [1, 2]


def test_no_events_make_an_empty_trace() -> None:
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}
