"""The tables and the picture of `bench step`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcurv.bench.picture import new_figure, save
from distcurv.bench.show import show_table
from distcurv.bench.step_phases import PHASES

_TITLES = {
    "forward_backward": "fwd+bwd", "capture": "capture", "reduce_send": "reduce+send",
    "install": "install", "refresh": "refresh", "apply": "apply", "optimizer": "optimizer",
}  # fmt: skip
_PLACES_SHOWN = 4


def label(row: Mapping[str, Any]) -> str:
    """A method with what it ran with."""
    rank = "" if row["rank"] is None else f" r={row['rank']}"
    worker = "" if row["worker"] in (None, "process") else f" {row['worker']}"
    return f"{row['method']}{rank}{worker}"


def show(content: dict[str, Any]) -> None:
    """Print what a step costs, what it consists of, and the memory."""
    settings, rows = content["settings"], content["results"]
    show_table(
        f"{settings['model']}, ms per step; interval {settings['interval']}",
        (
            *("method", "mean over sgd", "CPU over sgd", "w/o statistics"),
            *("mean", "median", "p99", "worst place / median", "over idle"),
        ),
        [_cost(row) for row in rows],
    )
    show_table(
        "parts of the mean step, ms",
        (
            *("method", *_TITLES.values()),
            *("capture of its step", "apply: of plain products", "less sgd's update"),
        ),
        [_parts(row) for row in rows],
    )
    if all(row["memory"] is not None for row in rows):
        show_table(
            "memory of a process of its own; numbers are float32 per (Di + Do), kept between steps",
            ("method", "peak MB", "kept MB", "numbers above sgd", "of these and sgd's"),
            [_memory(row) for row in rows],
        )
    left_out = content.get("left_out")  # records from before there was such a thing lack it
    if left_out:
        show_table(
            "left out, as it failed",
            ("method", "why"),
            [[label(row), row["why"]] for row in left_out],
        )


def _cost(row: Mapping[str, Any]) -> list[str]:
    ms = row["step_ms"]
    return [
        label(row),
        _spread(row["over_sgd"]),
        _spread(row["cpu_over_sgd"]),
        _middle(row["without_statistics_over_sgd"]),
        *(f"{ms[key]:.2f}" for key in ("mean", "median", "p99")),
        f"{row['worst_over_median']:.2f}",
        _spread(row["over_idle"]),
    ]


def _parts(row: Mapping[str, Any]) -> list[str]:
    phases = [row["phases_ms"][name] for name in _TITLES]
    return [
        label(row),
        *("" if ms is None else f"{ms:.2f}" for ms in phases),
        _share(row["capture_share"]),
        _share(row["apply_rate_share"]),
        _share(row["apply_rate_share_beyond_sgd"]),
    ]


def _memory(row: Mapping[str, Any]) -> list[str]:
    memory = row["memory"]
    places = list(memory["numbers_per_side_by_place"].items())
    shown = [f"{place or 'itself'} {number:.1f}" for place, number in places[:_PLACES_SHOWN]]
    rank = "" if row["rank"] is None else f" = {memory['numbers_per_side'] / row['rank']:.1f} r"
    return [
        label(row),
        f"{memory['peak_bytes'] / 1e6:.0f} ({memory['peak_bytes_above'] / 1e6:+.0f})",
        f"{memory['held_bytes'] / 1e6:.1f} ({memory['held_bytes_above'] / 1e6:+.1f})",
        f"{memory['numbers_per_side']:.1f}{rank}",
        ", ".join(shown),
    ]


def _spread(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def _middle(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}"


def _share(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['median']:.1%}"


def draw(path: Path, content: dict[str, Any]) -> None:
    """The mean step's parts, stacked; and the ratio to SGD with its spread."""
    rows = content["results"]
    figure, (parts, ratio) = new_figure(2, height=0.45 * len(rows) + 2.2)
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for phase in PHASES:
        values = [row["phases_ms"][phase] or 0.0 for row in rows]
        if any(values):
            parts.barh(places, values, left=left, label=_TITLES[phase])
            left = [start + value for start, value in zip(left, values, strict=True)]
    parts.set_xlabel("ms per step, mean")
    parts.legend(fontsize=8)
    middle = [row["over_sgd"]["median"] for row in rows]
    down = [row["over_sgd"]["median"] - row["over_sgd"]["min"] for row in rows]
    up = [row["over_sgd"]["max"] - row["over_sgd"]["median"] for row in rows]
    ratio.errorbar(middle, places, xerr=(down, up), fmt="o", capsize=3)
    ratio.axvline(1.0, color="#7a7a7a", linewidth=0.8)
    ratio.set_xlabel("mean step over SGD's (median, extremes)")
    for axes in (parts, ratio):
        axes.set_yticks(places, [label(row) for row in rows])
        axes.invert_yaxis()
        axes.grid(True, axis="x", alpha=0.2)
    settings = content["settings"]
    save(
        figure,
        path,
        f"{settings['model']} on {content['machine']['device']}, one thread; interval "
        f"{settings['interval']}",
    )
