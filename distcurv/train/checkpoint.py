"""The pipeline's state_dict: installed versions and the log, complete on every rank.

What the window and the workers hold between two installs is not in it: a resumed run goes on from
the installed versions, and the statistics since then are counted as dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distcurv.curvature.spec import Layout
from distcurv.errors import StateError
from distcurv.train.depot import State
from distcurv.train.pipeline import Pipeline
from distcurv.train.switch import Install

FORMAT = 1


def save(pipeline: Pipeline) -> dict[str, Any]:
    """Tensors and plain values only (``torch.load(weights_only=True)`` reads it); local."""
    blocks = {}
    for spec, layout, install in zip(
        pipeline.table.specs, pipeline.table.published_layouts, pipeline.installed, strict=True
    ):
        blocks[spec.name] = {
            "shapes": _shapes(layout),
            "version": install.version,
            "since": install.since,
            "through": install.through,
            "step": install.step,
            "flat": install.flat.detach().cpu().clone(),
        }
    return {
        "format": FORMAT,
        "step": pipeline.step_count,
        "table": pipeline.table.digest_number,
        "blocks": blocks,
        "install_log": pipeline.install_log.tensor(),
    }


def _shapes(layout: Layout) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in layout.shapes.items()}


def read(pipeline: Pipeline, state: Mapping[str, Any]) -> list[Install]:
    """The installs of a state_dict, checked; nothing is changed.

    Raises `StateError` when the state is of another format, of other blocks, or not finite."""
    if state.get("format") != FORMAT:
        raise StateError(
            f"curvature state has format {state.get('format')!r}, this version reads {FORMAT}"
        )
    names = [spec.name for spec in pipeline.table.specs]
    if list(state["blocks"]) != names:
        missing = sorted(set(names) ^ set(state["blocks"]))
        raise StateError(
            f"curvature state is of other blocks (differing: {missing[:5]}): load it into the "
            "model and config that it was saved from"
        )
    restored: list[Install] = []
    for block, name in enumerate(names):
        saved = state["blocks"][name]
        layout = pipeline.table.published_layouts[block]
        # Sizes alone would let a side's tail be read as the other side's.
        if saved.get("shapes") != _shapes(layout) or saved["flat"].shape != (layout.size,):
            raise StateError(
                f"curvature state of block {name} has {saved['flat'].numel()} numbers for "
                f"{saved.get('shapes')}, this config needs {layout.size} for {_shapes(layout)}: "
                "use the kind, rank and tails that it was saved with"
            )
        flat = saved["flat"].to(torch.float32).to(pipeline.device).clone()
        if not bool(torch.isfinite(flat).all()):
            raise StateError(f"curvature state of block {name} is not finite: the file is damaged")
        restored.append(
            Install(
                block,
                int(saved["version"]),
                int(saved["since"]),
                int(saved["through"]),
                int(saved["step"]),
                "state_dict",
                flat,
                layout.views(flat),
            )
        )
    return restored


def load(pipeline: Pipeline, state: Mapping[str, Any]) -> list[Install]:
    """Continue from a state_dict; must be called on all ranks at the same step.

    Returns the restored installs (those of version 0 too).  Raises `StateError` as `read` does;
    then nothing has changed."""
    restored = read(pipeline, state)
    pipeline.restore(int(state["step"]), restored)
    pipeline.install_log.replace(state["install_log"].tolist())
    for install in restored:
        pipeline.depot.reset(
            install.block,
            [State(install.version, install.since, install.through, install.flat.cpu())],
        )
    return restored
