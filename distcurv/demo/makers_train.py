"""One training of the demo's autoencoder with one gradient maker, in this process.

Initial weights, batches and their order are those of the demo (`distcurv.demo.tasks`), so a maker
sees what any other sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from distcurv.demo.makers_registry import Choice
from distcurv.demo.makers_settings import MakersSettings
from distcurv.demo.tasks import pixel_loss
from distcurv.demo.train import CONNECT_PATIENCE_S, await_links
from distcurv.makers import GradientMaker, PreconditionedGradientMaker
from distcurv.train.provider import Workers


@dataclass(frozen=True)
class Training:
    """What came out.

    Attributes:
        losses: of each step's batch before its update.
        step_ms: wall time of each step: batch, forward, backward, what the maker does, optimizer.
        final_loss: of the task's evaluation after the last step; None where that is not finite.
        diverged: whether it ended early, at a loss that is not finite.
        versions: of preconditioners that were installed; this and the following are None where
            nothing is.
        from_workers: how many of them workers made.
        max_staleness: in steps.
    """

    losses: list[float]
    step_ms: list[float]
    final_loss: float | None
    diverged: bool
    versions: float | None
    from_workers: float | None
    max_staleness: float | None


def train(
    choice: Choice, settings: MakersSettings, workers: Workers, watch: Callable[[int, float], bool]
) -> Training | None:
    """Train once.

    Args:
        workers: as everywhere: 0 or endpoints.
        watch: called with (steps done, loss) after each step, outside of the times; False ends the
            training, and the result is None.
    """
    task = settings.problem
    model = task.build(settings.seed)
    maker = choice.make(model, rank=settings.rank, workers=workers, seed=settings.seed)
    optimizer = choice.make_optimizer(model.parameters())
    task.batches(0, 0, 1, settings.seed)  # the first call reads the data
    losses: list[float] = []
    step_ms: list[float] = []
    diverged = False
    try:
        if _metrics(maker):
            # A training of seconds would otherwise be over before the workers were met.
            await_links(lambda: _metrics(maker), CONNECT_PATIENCE_S)
        for step in range(settings.resolved_steps):
            start = time.perf_counter_ns()
            (images,) = task.batches(step, 0, 1, settings.seed)
            optimizer.zero_grad(set_to_none=True)
            dummy_logits = maker.setup_model_call(model, images)
            maker.setup_loss_call(pixel_loss, dummy_logits, images)
            _, loss = maker.forward_and_backward()
            optimizer.step()
            loss_now = loss.item()
            step_ms.append((time.perf_counter_ns() - start) / 1e6)
            losses.append(loss_now)
            if not watch(step + 1, loss_now):
                return None
            if not math.isfinite(loss_now):
                diverged = True
                break
        final, counts = task.evaluate(model), _metrics(maker)
        return Training(
            losses=losses,
            step_ms=step_ms,
            final_loss=final if math.isfinite(final) else None,
            diverged=diverged or not math.isfinite(final),
            versions=counts.get("versions_installed"),
            from_workers=counts.get("versions_from_workers"),
            max_staleness=counts.get("max_staleness"),
        )
    finally:
        if isinstance(maker, PreconditionedGradientMaker):
            maker.close()


def _metrics(maker: GradientMaker) -> dict[str, float | int]:
    """The service's counters; empty where there is none."""
    return maker.metrics() if isinstance(maker, PreconditionedGradientMaker) else {}
