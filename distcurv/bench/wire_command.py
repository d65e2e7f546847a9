"""``distcurv bench wire``: statistics and preconditioners over each link."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from distcurv.bench.arguments import at_least, numbers, words

_LINKS = ("memory", "ipc", "tcp", "raw-ipc", "raw-tcp")
_TRIPS = 300
_DIRECTIONS = ("statistics", "preconditioners")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench wire``."""
    add = parser.add_argument
    add(
        "--links",
        type=words(_LINKS),
        default=_LINKS,
        metavar="LIST",
        help=f"some of {', '.join(_LINKS)} (default all); raw ones are pyzmq without distcurv",
    )
    add(
        "--kilobytes",
        type=numbers(1),
        default=(16, 256, 4096, 16384),
        metavar="LIST",
        help="sizes of a payload in kB of 1,000 bytes (default 16,256,4096,16384)",
    )
    add(
        "--megabytes",
        type=at_least(1),
        default=256,
        metavar="N",
        help="sent in all for each size and direction, at most 2,000 messages (default 256)",
    )
    add(
        "--repetitions",
        type=at_least(1),
        default=3,
        metavar="N",
        help="times that everything is measured (default 3)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from distcurv.bench.clock import choose_cores, one_thread, pinned
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files

    cores = choose_cores()
    settings = {
        "links": args.links,
        "kilobytes": args.kilobytes,
        "core": cores.training,
        "core_of_peer": cores.worker,
    }
    record = Record(args, settings)
    work = args.repetitions * len(args.links)
    measured: dict[str, list[dict[str, Any]]] = {link: [] for link in args.links}
    copies: dict[int, list[dict[str, Any]]] = {size: [] for size in args.kilobytes}
    with one_thread(), pinned(cores.training), Bar("wire", work) as bar:
        for repetition in range(args.repetitions):
            for link in args.links if repetition % 2 == 0 else reversed(args.links):
                bar.at(link)
                found = measure(link, args.kilobytes, args.megabytes, cores.worker)
                measured[link].append(found)
                bar.advance()
            for size in args.kilobytes:
                copies[size].append(_copy(size, args.megabytes))
    rows = [_row(link, found, args.kilobytes) for link, found in measured.items()]
    copy = {str(size): _joined(found) for size, found in copies.items()}
    content = record.write(rows, memory_copy=copy)
    draw(record.picture, content)
    _show(content)
    show_files(record.file, record.picture)
    return 0


def measure(
    link: str, kilobytes: tuple[int, ...], megabytes: int, core: int | None
) -> dict[str, Any]:
    """One link once: round trips, and both directions at each size."""
    from distcurv.bench import wire_measure as wire

    opened: dict[str, Callable[[], AbstractContextManager[wire.Way]]] = {
        "memory": wire.in_memory,
        "ipc": lambda: wire.to_process("ipc", False, core),
        "tcp": lambda: wire.to_process("tcp", False, core),
        "raw-ipc": lambda: wire.to_process("ipc", True, core),
        "raw-tcp": lambda: wire.to_process("tcp", True, core),
    }
    with opened[link]() as way:
        found: dict[str, Any] = {"round_trip_us": wire.round_trips(way, _TRIPS)}
        for direction in _DIRECTIONS:
            found[direction] = {
                size: wire.throughput(way, 250 * size, _messages(size, megabytes), direction)
                for size in kilobytes
            }
    return found


def _copy(size: int, megabytes: int) -> dict[str, Any]:
    from distcurv.bench.wire_measure import memory_copy

    return memory_copy(250 * size, _messages(size, megabytes))


def _messages(size: int, megabytes: int) -> int:
    return max(1, min(2000, 1000 * megabytes // size))


def _row(link: str, found: list[dict[str, Any]], sizes: tuple[int, ...]) -> dict[str, Any]:
    from distcurv.bench.summary import spread

    row: dict[str, Any] = {
        "link": link,
        "round_trip_us": {
            key: spread([once["round_trip_us"][key] for once in found]) for key in ("median", "p99")
        },
    }
    for direction in _DIRECTIONS:
        row[direction] = {
            str(size): _joined([once[direction][size] for once in found]) for size in sizes
        }
    return row


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Each figure over the repetitions; None where it is unknown."""
    from distcurv.bench.summary import spread

    return {
        key: None if found[0][key] is None else spread([once[key] for once in found])
        for key in found[0]
    }


def _show(content: dict[str, Any]) -> None:
    from distcurv.bench.show import show_table

    sizes = [str(size) for size in content["settings"]["kilobytes"]]
    rows = []
    for row in content["results"]:
        trip = row["round_trip_us"]
        head = [row["link"], f"{trip['median']['median']:.0f}", f"{trip['p99']['median']:.0f}"]
        cells = [_cell(row[direction][size]) for direction in _DIRECTIONS for size in sizes]
        rows.append([*head, *cells])
    copies = [_cell(content["memory_copy"][size]) for size in sizes]
    rows.append(["memory copy", "", "", *copies, *[""] * len(sizes)])
    titles = [f"{word} {size} kB" for word in ("stat.", "prec.") for size in sizes]
    show_table(
        "GB/s (processor seconds per GB, both ends), medians; round trip in µs",
        ("link", "round trip", "p99", *titles),
        rows,
    )


def _cell(found: dict[str, Any]) -> str:
    used = found["cpu_s_per_gb"]
    cost = "" if used is None else f" ({used['median']:.2f})"
    return f"{found['gb_per_s']['median']:.2f}{cost}"


def draw(path: Path, content: dict[str, Any]) -> None:
    """GB/s against the size of a payload, both directions, with the memory copy on top."""
    from distcurv.bench.picture import PEER, new_figure, save

    sizes = content["settings"]["kilobytes"]
    figure, panels = new_figure(2)
    for axes, direction in zip(panels, _DIRECTIONS, strict=True):
        for row in content["results"]:
            rates = [row[direction][str(size)]["gb_per_s"] for size in sizes]
            middle = [rate["median"] for rate in rates]
            down = [rate["median"] - rate["min"] for rate in rates]
            up = [rate["max"] - rate["median"] for rate in rates]
            style = "--" if row["link"].startswith("raw") else "-"
            axes.errorbar(
                sizes, middle, (down, up), label=row["link"], marker="o", capsize=3, linestyle=style
            )
        copies = [content["memory_copy"][str(size)]["gb_per_s"]["median"] for size in sizes]
        axes.plot(sizes, copies, color=PEER, linestyle=":", label="memory copy")
        axes.set_title(direction)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("payload, kB")
        axes.set_ylabel("GB/s")
        axes.grid(True, which="both", alpha=0.2)
    panels[0].legend(fontsize=8)
    save(figure, path, "messages over each link, one thread at each end")
