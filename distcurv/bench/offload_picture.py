"""Shows where offloading pays: a map of blocks × width for each kind and rank, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm

from distcurv.bench.picture import new_figure, save
from distcurv.bench.show import show_table

_DARKEST = 3.0  # a step this many times longer or shorter has the full colour


def draw(path: Path, content: dict[str, Any]) -> None:
    """One panel per kind and rank: the mean step with refreshes in process over that with a worker.

    The line goes between the cells for which ``auto`` takes a worker and those where it does not.
    """
    settings = content["settings"]
    rows, left_out = content["results"], content["left_out"]
    arms = ["worker", "in process", *(["sharded over 2 ranks"] if settings["sharded"] else [])]
    groups = sorted({(row["kind"], row["rank"]) for row in rows + left_out}, reverse=True)
    groups.sort(key=lambda group: (group[0] == "dense", group[1]))
    figure, panels = new_figure(
        max(1, len(groups)), width=0.8 + 1.3 * len(settings["blocks"]),
        height=1.4 + 0.75 * len(settings["widths"]), in_a_row=2,
    )  # fmt: skip
    for axes, (kind, rank) in zip(panels, groups, strict=True):
        cells = {
            (r["width"], r["blocks"]): r for r in rows if (r["kind"], r["rank"]) == (kind, rank)
        }
        values = [
            [cells[w, b]["gain"]["median"] if (w, b) in cells else float("nan")
             for b in settings["blocks"]]
            for w in settings["widths"]
        ]  # fmt: skip
        axes.imshow(
            values, cmap="RdBu_r", norm=LogNorm(1 / _DARKEST, _DARKEST), origin="lower",
            aspect="auto",
        )  # fmt: skip
        axes.set_facecolor("#e6e6e6")
        for y, width in enumerate(settings["widths"]):
            for x, blocks in enumerate(settings["blocks"]):
                row = cells.get((width, blocks))
                text = "left out" if row is None else _cell_text(row)
                if row is not None or (kind, rank, width, blocks) in _places(left_out):
                    axes.text(x, y, text, ha="center", va="center", fontsize=7)
                if row is None or row["auto"] != "worker":
                    continue
                axes.add_patch(_frame(x, y))
        axes.set_xticks(range(len(settings["blocks"])), list(map(str, settings["blocks"])))
        axes.set_yticks(range(len(settings["widths"])), list(map(str, settings["widths"])))
        axes.set_xlabel("blocks")
        axes.set_ylabel("width")
        axes.set_title("dense" if kind == "dense" else f"low rank, r = {rank}", fontsize=10)
    save(
        figure,
        path,
        "Mean step with refreshes in process / with a worker (≈: repetitions disagree); below, "
        f"over no refreshes: {' / '.join(arms)}.\n"
        f'Framed: workers="auto" takes a worker. {settings["rows"]} rows, interval '
        f"{settings['interval']}, one core to train on",
    )


def _places(rows: list[dict[str, Any]]) -> set[tuple[str, int, int, int]]:
    return {(row["kind"], row["rank"], row["width"], row["blocks"]) for row in rows}


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=1.4)


def _cell_text(row: dict[str, Any]) -> str:
    arms = row["arms"]
    over = [
        f"{arms[name]['over_none']['median']:.2f}"
        for name in ("worker", "inline", "sharded")
        if name in arms
    ]
    sign = "≈ " if row["measured"] == "even" else ""
    return f"{sign}{row['gain']['median']:.2f}\n{' / '.join(over)}"


def show(content: dict[str, Any]) -> None:
    """The table, what was left out, and the constants that fit."""
    rows = []
    for row in content["results"]:
        arms = row["arms"]
        over = [
            f"{arms[name]['over_none']['median']:.2f}" if name in arms else ""
            for name in ("worker", "inline", "sharded")
        ]
        rows.append(
            [
                row["kind"],
                str(row["blocks"]),
                str(row["width"]),
                str(row["rank"] or ""),
                f"{row['none_ms']['solo']['mean']:.1f}",
                *over,
                *(f"{arms[name]['cpu_window_ms']['median']:.1f}" for name in ("worker", "inline")),
                *(f"{arms[name]['step_ms']['p99']:.0f}" for name in ("worker", "inline")),
                f"{arms['worker']['kept_up']:.0%}",
                _ratio(row["gain"]),
                row["measured"],
                row["auto"],
            ]
        )
    settings = content["settings"]
    show_table(
        f"Mean step with refreshes over mean step without: worker, in process, shared by 2 ranks; "
        f"interval {settings['interval']}, {settings['rows']} rows.\n"
        "cost: CPU ms that a window adds to training; kept up: versions that came by the next poll",
        (
            *("kind", "blocks", "width", "r", "step, ms", "worker", "in process", "shared"),
            *("cost worker", "in process", "p99 worker", "in process", "kept up"),
            *("in process / worker", "better", "auto"),
        ),
        rows,
    )
    if content["left_out"]:
        show_table(
            "Left out",
            ("point", "reason"),
            [
                [f"{p['kind']}, {p['blocks']} x {p['width']}, r = {p['rank'] or '-'}", p["reason"]]
                for p in content["left_out"]
            ],
        )
    fitted = content["calibration"]
    parts = {f"in process, {kind}": rates for kind, rates in fitted["inline"].items()}
    show_table(
        "Rates that fit (s), for distcurv/train/placement.py",
        ("what", "block", "operation", "byte", "median error"),
        [
            [
                name,
                *(f"{rates[key]:.3g}" for key in ("block", "operation", "byte")),
                f"{rates['median_relative_error']:.0%}",
            ]
            for name, rates in {**parts, "worker": fitted["worker"]}.items()
            if rates is not None
        ],
    )


def _ratio(summary: dict[str, float]) -> str:
    return f"{summary['median']:.2f} ({summary['min']:.2f} to {summary['max']:.2f})"
