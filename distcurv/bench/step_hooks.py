"""Where `bench step` looks into distcurv: the only methods of its insides that it knows by name.

Each is watched as it is called; who renames one is told by a `StateError` and changes it here.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from distcurv.bench.step_phases import PhaseClock
from distcurv.optim.lowrank_soap import LowRankSOAP
from distcurv.train.activations import ActivationSource
from distcurv.train.pipeline import Pipeline
from distcurv.train.preconditioner import Preconditioner


class Hook(NamedTuple):
    """``method`` of what lies at ``path`` ("" for the object itself) is counted as ``phase``."""

    path: str
    method: str
    phase: str


# What is left of Pipeline.step: the window's end, reduce, hand-over to the I/O thread, the poll.
PIPELINE = (
    Hook("", "step", "reduce_send"),
    Hook("_switch", "announce", "install"),
    Hook("", "_install", "install"),
    Hook("lanes", "settle", "refresh"),  # waits for the in-process service, where that serves
)
# What is left of LowRankSOAP.step is the vectors' rule and its own bookkeeping: the optimizer.
SOAP = (
    Hook("", "_add_statistics", "capture"),
    Hook("_rule", "project", "apply"),  # of the gradient: made once, for statistic and update
    Hook("_rule", "turn", "install"),
    Hook("_rule", "update", "apply"),
)
SOURCE = (
    Hook("capture", "observe", "capture"),
    Hook("capture", "deliver", "capture"),
    Hook("capture", "make_statistics", "capture"),
    Hook("", "finish", "capture"),
    Hook("", "arm_if_due", "capture"),
)


def watch_soap(clock: PhaseClock, optimizer: LowRankSOAP) -> Pipeline:
    """Tell the phases of `LowRankSOAP.step` apart; returns its pipeline."""
    _watch(clock, optimizer, SOAP)
    if optimizer._source is not None:
        _watch(clock, optimizer._source, SOURCE)
    pipeline = optimizer._open_pipeline()
    _watch(clock, pipeline, PIPELINE)
    return pipeline


def watch_preconditioner(clock: PhaseClock, precond: Preconditioner) -> Pipeline:
    """Tell the phases of `Preconditioner.step` apart, what is left is apply; its pipeline."""
    source: ActivationSource = precond._source
    _watch(clock, source, SOURCE)
    _watch(clock, precond._pipeline, PIPELINE)
    return precond._pipeline


def _watch(clock: PhaseClock, root: object, hooks: tuple[Hook, ...]) -> None:
    for hook in hooks:
        owner = attrgetter(hook.path)(root) if hook.path else root
        clock.watch(owner, hook.method, hook.phase)


def begin_captured_step(precond: Preconditioner) -> None:
    """What `Preconditioner.step` does for the capture of the step that follows."""
    precond._source.arm_if_due()


def end_captured_step(precond: Preconditioner) -> None:
    """What `Preconditioner.step` does for the capture of the step that has run."""
    precond._source.finish()
