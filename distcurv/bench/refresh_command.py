"""``distcurv bench refresh``: the low-rank refresh against eigh and the Cholesky inverse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distcurv.bench.arguments import at_least, device, numbers

_MATMUL = 1024  # size of the product that stands for what the machine can do
_TURN = 0.02  # seconds: what a turn of one method takes at least, in as many calls as it needs
_RESIDUAL_MAX = 2048  # beyond it the exact eigenvalues alone take minutes on one core


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench refresh``."""
    parser.add_argument(
        "--dims",
        type=numbers(8),
        default=(256, 512, 1024),
        metavar="LIST",
        help="dimensions d of a side (default 256,512,1024)",
    )
    parser.add_argument(
        "--ranks",
        type=numbers(1),
        default=(16, 32, 64),
        metavar="LIST",
        help="ranks r below d (default 16,32,64)",
    )
    parser.add_argument(
        "--blocks",
        type=numbers(1),
        default=(1, 4),
        metavar="LIST",
        help="blocks of one shape in a call (default 1,4)",
    )
    parser.add_argument(
        "--repetitions",
        type=at_least(1),
        default=5,
        metavar="N",
        help="times that every method has its turn (default 5)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from distcurv.bench.clock import choose_cores, one_thread, pinned
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files, show_table

    device(args.device)
    sizes = [(d, b) for d in args.dims for b in args.blocks]
    record = Record(
        args,
        {
            "dims": args.dims,
            "ranks": args.ranks,
            "blocks": args.blocks,
            "tail": "isotropic",
            "clock": "wall" if args.device == "cuda" else "processor time",
            "seconds_per_turn": _TURN,
        },
        args.device,
    )
    with (
        one_thread(),
        pinned(choose_cores().training),
        Bar("refresh", args.repetitions * len(sizes)) as bar,
    ):
        rows: list[dict[str, Any]] = []
        for d, b in sizes:
            bar.at(f"d = {d}, {b} blocks")
            rows += measure(d, b, args.ranks, args.repetitions, args.device, bar.advance)
        content = record.write(rows, matmul_size=_MATMUL)
    draw(record.picture, content)
    show_table(
        "one side's refresh: ms per block, median over repetitions (min to max)",
        ("d, r, blocks", "refresh ms", "GFLOP/s", "of matmul", "eigh", "Cholesky", "residual",
         "cold", "cold, 2 it.", "best"),
        [_cells(row) for row in rows],
    )  # fmt: skip
    show_files(record.file, record.picture)
    return 0


def measure(
    d: int,
    blocks: int,
    ranks: tuple[int, ...],
    repetitions: int,
    where: str,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """One row for each rank below d; all methods have a turn in each repetition.

    A worker refreshes one block after the other, so a turn of less than `_TURN` seconds has several
    calls, for every method alike: a single one would time the caches that another has filled.
    """
    import torch

    from distcurv.bench import refresh_cases as cases
    from distcurv.bench.clock import work_time
    from distcurv.bench.summary import spread

    generator = torch.Generator(where).manual_seed(1)
    square = torch.randn(_MATMUL, _MATMUL, device=where, generator=generator)
    used = {r: cases.make_case(d, r, blocks, where) for r in ranks if r < d}
    if not used:
        return []
    factor_dd = next(iter(used.values())).factor_dd
    damped_Bdd = (factor_dd + 1e-3 * torch.eye(d, device=where)).repeat(blocks, 1, 1)
    work: dict[str | int, Callable[[], object]] = {
        "matmul": lambda: square @ square,
        "eigh": lambda: torch.linalg.eigh(damped_Bdd),
        "cholesky": lambda: torch.cholesky_inverse(torch.linalg.cholesky(damped_Bdd)),
    }
    for r, case in used.items():
        work[r] = lambda case=case: cases.refresh(case)  # type: ignore[misc]
    calls = {name: _calls(call, where) for name, call in work.items()}
    seconds: dict[str | int, list[float]] = {name: [] for name in work}
    order = list(work)
    for repetition in range(repetitions):
        for name in order if repetition % 2 == 0 else reversed(order):
            start = work_time(where)
            for _ in range(calls[name]):
                work[name]()
            seconds[name].append((work_time(where) - start) / calls[name])
        advance()
    matmul_rates = [2 * _MATMUL**3 / s / 1e9 for s in seconds["matmul"]]
    rows = []
    for r in used:
        rates = [blocks * cases.nominal_flops(d, r) / s / 1e9 for s in seconds[r]]
        per_block = {
            name: spread([1e3 * s / blocks for s in seconds[key]])
            for name, key in (("refresh", r), ("eigh", "eigh"), ("cholesky", "cholesky"))
        }
        row = {
            "d": d,
            "r": r,
            "blocks": blocks,
            "calls_per_turn": {
                name: calls[key]
                for name, key in (("refresh", r), ("eigh", "eigh"), ("cholesky", "cholesky"))
            },
            "ms_per_block": per_block,
            "speedup_over_eigh": per_block["eigh"]["median"] / per_block["refresh"]["median"],
            "speedup_over_cholesky": per_block["cholesky"]["median"]
            / per_block["refresh"]["median"],
            "nominal_flops_per_block": cases.nominal_flops(d, r),
            "gflops": spread(rates),
            "matmul_gflops": spread(matmul_rates),
            "share_of_matmul": spread(rates)["median"] / spread(matmul_rates)["median"],
            "residual": None,
        }
        if d <= _RESIDUAL_MAX and blocks == 1:
            # Without a tail, which the rivals have not either.
            bare = cases.make_case(d, r, 1, where, tail="none")
            row["residual"] = {
                "refresh": cases.low_rank_residual(bare),
                "cold_randomized_svd": cases.cold_residual(bare, 0),
                "cold_randomized_svd_2_iterations": cases.cold_residual(bare, 2),
                "best": cases.best_residual(bare),
            }
        rows.append(row)
    return rows


def _calls(work: Callable[[], object], where: str) -> int:
    """How many calls make a turn; the first of the two here is for warming up."""
    from distcurv.bench.clock import work_time

    taken = 0.0
    for _ in range(2):
        start = work_time(where)
        work()
        taken = work_time(where) - start
        if taken > _TURN:
            return 1
    return max(1, round(_TURN / max(taken, 1e-5)))


def _cells(row: dict[str, Any]) -> list[str]:
    def with_spread(summary: dict[str, float]) -> str:
        return f"{_ms(summary['median'])} ({_ms(summary['min'])} to {_ms(summary['max'])})"

    def times(name: str) -> str:
        middle = row["ms_per_block"][name]["median"]
        return f"{_ms(middle)} = {row[f'speedup_over_{name}']:,.1f}×"

    residuals = row["residual"] or {}
    return [
        f"{row['d']}, {row['r']}, {row['blocks']}",
        with_spread(row["ms_per_block"]["refresh"]),
        f"{row['gflops']['median']:.2f}",
        f"{row['share_of_matmul']:.1%}",
        times("eigh"),
        times("cholesky"),
        *(
            f"{residuals[key]:.4f}" if residuals else ""
            for key in (
                "refresh",
                "cold_randomized_svd",
                "cold_randomized_svd_2_iterations",
                "best",
            )
        ),
    ]


def _ms(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def draw(path: Path, content: dict[str, Any]) -> None:
    """Time per block against d, with the spread: ours for each rank, and the rivals."""
    from distcurv.bench.picture import PEER, new_figure, save

    figure, (axes,) = new_figure(1, width=7)
    rows = [row for row in content["results"] if row["blocks"] == content["settings"]["blocks"][0]]
    lines: list[tuple[str, str, int | None, str | None]] = [
        ("eigh", "torch.linalg.eigh", None, PEER),
        ("cholesky", "Cholesky inverse", None, "#4a4a4a"),
    ]
    ranks = sorted({row["r"] for row in rows})
    lines += [("refresh", f"low-rank refresh, r = {r}", r, None) for r in ranks]
    for key, label, r, colour in lines:
        points = {row["d"]: row["ms_per_block"][key] for row in rows if r in (None, row["r"])}
        middle = [points[d]["median"] for d in sorted(points)]
        down = [points[d]["median"] - points[d]["min"] for d in sorted(points)]
        up = [points[d]["max"] - points[d]["median"] for d in sorted(points)]
        axes.errorbar(
            sorted(points), middle, (down, up), color=colour, label=label, marker="o", capsize=3
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("d")
    axes.set_ylabel("ms per block")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    save(figure, path, f"one side's refresh on {content['machine']['device']}, one thread")
