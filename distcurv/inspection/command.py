"""``distcurv inspect``: the blocks that a model would have, and what would be left out.

Neither workers nor process groups are started, and nothing is trained: what is shown is the plan
that `distcurv.Preconditioner` would make of the same model and settings.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Literal

from distcurv.config.kfac import KINDS
from distcurv.launcher.arguments import count_from

if TYPE_CHECKING:
    from distcurv.train.summary import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``distcurv inspect``."""
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="what makes the model, called without arguments, e.g. package.models:make_model; the "
        "module is looked for in the current directory too",
    )
    parser.add_argument(
        "--rank", type=count_from(1), metavar="R", help="r of every side (default: KfacConfig's)"
    )
    parser.add_argument("--kind", choices=KINDS, help="of the blocks (default: KfacConfig's)")
    parser.add_argument(
        "--world",
        type=count_from(1),
        default=1,
        metavar="N",
        help="training ranks, all on one node, among which blocks get their owners (default 1)",
    )
    parser.add_argument(
        "--meta",
        action="store_true",
        help="build the model on the device meta, so that a large one needs no memory",
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON, not a table")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0."""
    from distcurv.config import KfacConfig
    from distcurv.inspection.factory import build
    from distcurv.train.coverage import block_rows, kfac_summary
    from distcurv.train.planning import plan_blocks
    from distcurv.train.table import BlockTable

    given = {"rank": args.rank, "kind": args.kind}
    config = KfacConfig(**{name: value for name, value in given.items() if value is not None})
    model = build(args.factory, meta=args.meta)
    blocks, uncovered = plan_blocks(model, config)
    table = BlockTable.make([b.spec for b in blocks], [0] * args.world, config.max_owners)
    summary = kfac_summary(model, blocks, uncovered, block_rows(table))
    if args.json:
        print(json.dumps(summary.as_fields(), indent=1))
    else:
        show(summary)
    return 0


def show(summary: Summary) -> None:
    """Print a summary: with rich where it is installed, else in plain columns."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(summary)
        return
    from distcurv.train.summary import NUMBERS

    titles, lines = summary.cells()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        justify: Literal["left", "right"] = "right" if title in NUMBERS else "left"
        table.add_column(title, justify=justify, overflow="fold")
    for line in lines:
        # Names like "in_proj_weight[0:4]" are no markup.
        table.add_row(*(cell.replace("[", r"\[") for cell in line))
    console = Console()
    if not console.is_terminal:  # piped into a file there is no width to keep to
        console = Console(width=max(80, max(map(len, str(summary).splitlines())) + len(titles)))
    console.print(table)
    console.print(summary.total, highlight=False, soft_wrap=True)
