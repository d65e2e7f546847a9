"""What a pipeline can say of itself, as one flat dict of numbers; local to the rank."""

from __future__ import annotations

from distcurv.train.pipeline import Pipeline


def collect(pipeline: Pipeline) -> dict[str, float | int]:
    """Counts are of this rank as an owner, in (block, statistic step) where they are of
    statistics; installs and staleness are the same on all ranks."""
    counts = pipeline.depot.counts
    lanes = pipeline.lanes
    remotes = [lane.remote for lane in lanes.lanes if lane.remote is not None]
    blocks = range(len(pipeline.table))
    return {
        "step": pipeline.step_count,
        "blocks": len(pipeline.table),
        "versions_installed": pipeline.install_log.installs,
        "version": max((pipeline.installed[b].version for b in blocks), default=0),
        "versions_from_workers": counts.from_workers,
        "versions_inline": counts.inline,
        "versions_rejected": counts.rejected,
        "staleness": max((pipeline.staleness(b) for b in blocks), default=0),
        "max_staleness": pipeline.staleness_watch.worst,
        "statistics_observed": counts.observed,
        "statistics_sent": counts.sent,
        "statistics_folded": counts.folded,
        "statistics_dropped": counts.dropped,
        "statistics_pending": lanes.backlog.steps(),
        "statistics_in_flight": pipeline.depot.in_flight_steps(),
        "bytes_to_workers": counts.bytes_out,
        "bytes_from_workers": counts.bytes_in,
        "worker_busy": max((courier.busy for courier in remotes), default=0.0),
        "links_up": sum(courier.up for courier in remotes),
        "links_total": len(remotes),
        "refresh_failures": counts.refresh_failures,
    }
