"""``distcurv bench bytes``: what a refresh sends both ways, sketches against dense factors.

Nothing is measured: the numbers come from the layouts that the messages are made of.  Sketches are
counted as float32 (key ``sketch``) and with ``wire_dtype="float16"`` (key ``narrow``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distcurv.bench.arguments import at_least
from distcurv.bench.block_presets import PRESETS, Shape, parse_shapes
from distcurv.errors import ConfigError

_DEFAULT_RANK = {"bert-large": 128}
_FLOAT = 4  # bytes of a float32
_COUNTED = ("sketch", "narrow", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench bytes``."""
    parser.add_argument(
        "--model", default="bert-large", help=f"{', '.join(PRESETS)} (default bert-large)"
    )
    parser.add_argument(
        "--shapes", metavar="LIST", help="instead of a model: Do x Di, as in 1000x784,500x1000*3"
    )
    parser.add_argument(
        "--rank",
        type=at_least(1),
        metavar="R",
        help="the low rank r (default 32, for bert-large 128)",
    )
    parser.add_argument(
        "--rule",
        default="lowrank-soap",
        help="whose blocks: lowrank-soap (isotropic tails, default) or kfac (with the bias "
        "coordinate, diagonal tail on the output side)",
    )


def run(args: argparse.Namespace) -> int:
    """Count, print, write."""
    from distcurv.bench.output import Record
    from distcurv.bench.show import show_files, show_table

    if args.rule not in ("lowrank-soap", "kfac"):
        raise ConfigError(f"--rule is {args.rule!r}: use lowrank-soap or kfac")
    if args.shapes is None and args.model not in PRESETS:
        raise ConfigError(f"--model is {args.model!r}: choose one of {', '.join(PRESETS)}")
    name = args.model if args.shapes is None else "given shapes"
    shapes = PRESETS[args.model] if args.shapes is None else parse_shapes(args.shapes)
    rank = args.rank or _DEFAULT_RANK.get(name, 32)
    record = Record(args, {"model": name, "rank": rank, "rule": args.rule})
    rows = [block_bytes(shape, rank, args.rule) for shape in shapes]
    total = total_bytes(rows)
    content = record.write(rows, total=total)
    draw(record.picture, content)
    show_table(
        f"bytes per refresh and block, {name}, r = {rank}, {args.rule}",
        (
            *("block", "count", "sketch out", "back", "float16 out", "back", "dense out", "back"),
            *("less", "less than d²", "float16 less", "less than d²"),
        ),
        [_cells(row) for row in [*rows, total]],
    )
    show_files(record.file, record.picture)
    return 0


def block_bytes(shape: Shape, rank: int, rule: str) -> dict[str, Any]:
    """Bytes of one block's statistic (out) and preconditioner (back).

    ``dense`` are packed triangles, what the kind ``dense`` sends; ``full`` are d² numbers for each
    side and direction, what an implementation without symmetry sends.  ``ratio`` and
    ``ratio_to_full`` are those over the sketch, both directions together; ``narrow_ratio`` and
    ``narrow_ratio_to_full`` over the sketch and basis as float16.
    """
    from distcurv.curvature.kinds import KINDS
    from distcurv.curvature.spec import BlockSpec, SideSpec
    from distcurv.curvature.statistics import resolve_encoding

    bias = 1 if rule == "kfac" else 0
    tails = ("isotropic", "diagonal") if rule == "kfac" else ("isotropic", "isotropic")
    dims = (shape.into + bias, shape.out)
    sketch_sides = []
    for dim, tail in zip(dims, tails, strict=True):
        low = min(rank, dim)
        sketch_sides.append(SideSpec(dim, low, tail, resolve_encoding(dim, low, tail, "auto")))
    dense_sides = [SideSpec(dim, dim, "none", "dense") for dim in dims]
    row: dict[str, Any] = {
        "block": shape.name,
        "out": shape.out,
        "into": shape.into,
        "count": shape.count,
        "encodings": [side.encoding for side in sketch_sides],
    }
    for key, kind, sides, wire_dtype in (
        ("sketch", "lowrank", sketch_sides, "float32"),
        ("narrow", "lowrank", sketch_sides, "float16"),
        ("dense", "dense", dense_sides, "float32"),
    ):
        spec = BlockSpec(shape.name, kind, tuple(sides), 0.95, 1e-3, wire_dtype=wire_dtype)
        row[f"{key}_statistic"] = KINDS[kind].statistic_layout(spec).nbytes
        row[f"{key}_preconditioner"] = KINDS[kind].published_layout(spec).nbytes
    row["full"] = 2 * _FLOAT * sum(dim * dim for dim in dims)
    return row | _ratios(row)


def total_bytes(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole model: every row times its count."""
    keys = [f"{key}_{what}" for key in _COUNTED for what in ("statistic", "preconditioner")]
    total: dict[str, Any] = {"block": "all", "count": sum(row["count"] for row in rows)}
    for key in (*keys, "full"):
        total[key] = sum(row[key] * row["count"] for row in rows)
    return total | _ratios(total)


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    sketch, narrow, dense = (
        row[f"{key}_statistic"] + row[f"{key}_preconditioner"] for key in _COUNTED
    )
    return {
        "ratio": dense / sketch,
        "ratio_to_full": row["full"] / sketch,
        "narrow_ratio": dense / narrow,
        "narrow_ratio_to_full": row["full"] / narrow,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    keys = [f"{key}_{what}" for key in _COUNTED for what in ("statistic", "preconditioner")]
    ratios = ("ratio", "ratio_to_full", "narrow_ratio", "narrow_ratio_to_full")
    numbers = [f"{row[key]:,}" for key in ("count", *keys)]
    return [row["block"], *numbers, *(f"{row[key]:.1f}×" for key in ratios)]


def draw(path: Path, content: dict[str, Any]) -> None:
    """Bars for each block: statistic and preconditioner, sketches beside dense."""
    from distcurv.bench.picture import OURS, PEER, new_figure, save

    figure, (axes,) = new_figure(1, width=9)
    rows = content["results"]
    bars = (
        (-0.27, "narrow", OURS, "sketch, float16"),
        (0.0, "sketch", "#8c7aa9", "sketch, float32"),
        (0.27, "dense", PEER, "dense"),
    )
    for place, key, colour, name in bars:
        places = [index + place for index in range(len(rows))]
        out = [row[f"{key}_statistic"] / 1e6 for row in rows]
        back = [row[f"{key}_preconditioner"] / 1e6 for row in rows]
        axes.bar(places, out, 0.25, color=colour, label=f"{name}: statistic")
        axes.bar(
            places, back, 0.25, bottom=out, color=colour, alpha=0.5, label=f"{name}: preconditioner"
        )
    names = [f"{row['block']}\n× {row['count']}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("MB per block and refresh")
    axes.legend()
    settings, total = content["settings"], content["total"]
    save(
        figure,
        path,
        f"{settings['model']}, r = {settings['rank']}: {total['ratio']:.1f} times fewer bytes than "
        f"packed dense factors, {total['narrow_ratio']:.1f} times as float16",
    )
