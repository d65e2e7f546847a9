"""Makes the rows of `bench step` from what its turns measured.

What is reported over SGD is a ratio within one repetition; its spread over the repetitions says
how far to believe it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from distcurv.bench.step_crew import Member, Turn
from distcurv.bench.step_phases import PHASES
from distcurv.bench.summary import Summary, spread, times

BASELINE = "sgd"


def row_of(member: Member, crew: Sequence[Member]) -> dict[str, Any]:
    """What the record says of one method; all times in ms.

    ``step_ms``: of all steps.  ``over_sgd``: mean step over SGD's mean step of the same
    repetition; ``cpu_over_sgd``: the same of the processor time of this process, all its threads:
    on one core both agree unless somebody else uses the machine (or the device is a GPU), and then
    this one is closer to what a quiet machine shows.  ``without_statistics_over_sgd``: the median
    step among those that take no statistics, over SGD's median step.  ``over_idle``: mean step over
    that of the same method with its worker idle: the worker's interference.

    ``worst_over_median``: see `worst_place`; to be compared with SGD's own in the same run.

    ``phases_ms`` are means over all steps; a phase that does not occur, or cannot be told apart,
    is None.  ``capture_share`` is capture's share of the steps that take statistics.
    ``apply_rate_share``: time of the plain products of the apply's shapes over that of the apply,
    at steps without statistics (at the others capture may have made a part of the products).
    ``apply_rate_share_beyond_sgd``: the same with SGD's median optimizer phase taken off the
    apply, for methods whose apply also updates momentum and weights, as that phase does.
    """
    turns, base = member.turns, crew[0].turns
    everything = [spent for turn in turns for spent in turn.phases]
    occurring = {name for spent in everything for name in spent}
    idle = [
        other
        for other in crew
        if other.variant == member.variant._replace(worker="idle") and other is not member
    ]
    worst, place = worst_place(turns)
    return {
        **member.variant._asdict(),
        "about": member.trainer.about,
        "step_ms": times([ms for turn in turns for ms in turn.ms]),
        "over_sgd": _ratios([fmean(turn.ms) for turn in turns], [fmean(turn.ms) for turn in base]),
        "cpu_over_sgd": _ratios([turn.cpu_ms for turn in turns], [turn.cpu_ms for turn in base]),
        "without_statistics_over_sgd": _without_statistics(turns, base),
        "over_idle": _ratios(
            [fmean(turn.ms) for turn in turns], [fmean(turn.ms) for turn in idle[0].turns]
        )
        if idle
        else None,
        "worst_over_median": worst,
        "worst_place": place,
        "phases_ms": {
            name: fmean(spent.get(name, 0.0) for spent in everything) if name in occurring else None
            for name in PHASES
        },
        "capture_share": _capture_share(turns),
        "apply_rate_share": _rate_share(turns, [0.0] * len(turns)),
        "apply_rate_share_beyond_sgd": _rate_share(turns, [_optimizer(turn) for turn in base])
        if member.trainer.apply_updates
        else None,
        "turns_ms": [turn.ms for turn in turns],
    }


def worst_place(turns: Sequence[Turn]) -> tuple[float, int]:
    """(worst step over median step, its place in the method's period).

    What a method does repeats after a period; of each place in it the median over all turns is
    taken, and the worst place is compared with the median of all steps.  So what the method does
    regularly counts however rare it is, and what happened to fall on single steps does not.  How
    heavy those were shows in the 99th percentile of all steps.
    """
    by_place: dict[int, list[float]] = {}
    for turn in turns:
        for place, ms in zip(turn.places, turn.ms, strict=True):
            by_place.setdefault(place, []).append(ms)
    place = max(by_place, key=lambda place: median(by_place[place]))
    return median(by_place[place]) / median([ms for turn in turns for ms in turn.ms]), place


def _ratios(ours: Iterable[float], theirs: Iterable[float]) -> Summary:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def _without_statistics(turns: Sequence[Turn], base: Sequence[Turn]) -> Summary | None:
    if not any(captured for turn in turns for captured in turn.captured):
        return None
    found = []
    for ours, theirs in zip(turns, base, strict=True):
        plain = [ms for ms, captured in zip(ours.ms, ours.captured, strict=True) if not captured]
        if plain:
            found.append(median(plain) / median(theirs.ms))
    return spread(found) if found else None


def _capture_share(turns: Sequence[Turn]) -> Summary | None:
    shares = [
        spent.get("capture", 0.0) / sum(spent.values())
        for turn in turns
        for spent, captured in zip(turn.phases, turn.captured, strict=True)
        if captured
    ]
    return spread(shares) if shares else None


def _rate_share(turns: Sequence[Turn], less: Sequence[float]) -> Summary | None:
    """By turn; None for methods without plain products, or where nothing is left of the apply."""
    shares = []
    for turn, off in zip(turns, less, strict=True):
        applies = [spent.get("apply", 0.0) for spent in turn.phases]
        plain = [ms for ms, taken in zip(applies, turn.captured, strict=True) if not taken]
        left = median(plain or applies) - off
        if turn.products_ms is not None and left > 0:
            shares.append(turn.products_ms / left)
    return spread(shares) if shares else None


def _optimizer(turn: Turn) -> float:
    return median([spent["optimizer"] for spent in turn.phases])
