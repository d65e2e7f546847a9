"""The contract of every kind in the registry; an entry without an oracle here fails.

Oracle: the dense float64 EMA of the statistics' means, damped and inverted with
`torch.linalg.inv`. Kinds that approximate must meet it at full rank. Of a one-sided block the
factor is one 2 x 2 matrix per unit, a diagonal, or one matrix or more. (That of kfe: test_kfe.py.)
Tolerance: statistics, state and published tensors are float32, so 1e-5 relative at damping 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kind_cases import (
    APPROXIMATE,
    DAMPING,
    DECAY,
    DIM_A,
    DIM_G,
    EXACT,
    EXACT_SPECS,
    SPECS,
    TWO_SIDED,
    batched,
    describe,
    each_spec,
    factor_of,
    inverses_of,
    rows_of,
    statistic_of,
)
from oracles import averaged, generator, orthogonality_error, relative_error

from distcurv.curvature.kinds import (
    KINDS,
    ONE_SIDE,
    SIDE_NAMES,
    dense,
    fisher,
    kfe,
    lowrank,
    shampoo,
)
from distcurv.curvature.kinds import averaged as averaged_kind
from distcurv.curvature.spec import ENCODINGS, BlockSpec, Tensors
from distcurv.curvature.statistics import encode_gradient
from distcurv.errors import NumericsError


def test_every_kind_has_an_oracle() -> None:
    assert set(KINDS) == set(EXACT) == set(APPROXIMATE)
    assert all(EXACT.values())
    assert all(kind.name == name for name, kind in KINDS.items())
    assert (*SIDE_NAMES, ONE_SIDE) == ("A", "G", "F")
    assert {side.encoding for spec in EXACT_SPECS for side in spec.sides} == set(ENCODINGS)


@pytest.mark.parametrize("spec", [s for s in EXACT_SPECS if s.kind != "kfe"], ids=describe)
def test_inverse_meets_the_dense_oracle(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    published = batched(kind.start(spec, seed=3))
    state = kind.seed(spec, published)
    arrivals: dict[str, list[tuple[int, torch.Tensor]]] = {n: [] for n, _ in spec.named_sides()}
    for seed, steps in enumerate([1, 3, 2]):
        rows = rows_of(seed)
        refreshed = kind.refresh(spec, state, statistic_of(spec, rows, published, steps), published)
        state, published = refreshed.state, refreshed.published
        for name, side in spec.named_sides():
            arrivals[name].append((steps, factor_of(side, rows[name])))
    factors = [averaged(DECAY, arrived) for arrived in arrivals.values()]
    inverses = kind.inverses(spec, published, DAMPING, spec.relative_damping)
    for inverse, wanted in zip(inverses, inverses_of(spec, factors), strict=True):
        assert relative_error(inverse.dense()[0], wanted) < 1e-5
    for name, factor in zip(arrivals, factors, strict=True):
        if f"{name}.trace" in published:
            trace = published[f"{name}.trace"].item()
            assert trace == pytest.approx(factor.trace().item(), rel=1e-6)
        assert published[f"{name}.weight"].item() == pytest.approx(1 - DECAY**6, rel=1e-6)
    assert refreshed.uncaptured.item() == pytest.approx(0.0, abs=1e-5)


@each_spec
def test_layouts_fit_what_the_kind_makes(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    start = kind.start(spec, seed=0)
    layout = kind.published_layout(spec)
    assert layout.pack(start).shape == (layout.size,)
    assert set(start) == set(layout)
    published = batched(start)
    statistic = statistic_of(spec, rows_of(0), published, 1)
    assert set(statistic) == set(kind.statistic_layout(spec))
    travelled = kind.statistic_layout(spec).views(kind.statistic_layout(spec).pack(statistic))
    refreshed = kind.refresh(spec, kind.seed(spec, published), travelled, published)
    assert set(refreshed.published) == set(layout)
    assert layout.pack(refreshed.published).shape == (1, layout.size)
    assert set(refreshed.state) == set(kind.seed(spec, published))
    assert refreshed.uncaptured.shape == refreshed.innovation.shape == (1,)
    assert refreshed.innovation.item() == -1.0
    again = kind.refresh(spec, refreshed.state, statistic, published)
    assert again.innovation.item() >= 0.0


@each_spec
def test_start_depends_on_seed_and_name_alone(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    torch.manual_seed(1)
    first = kind.start(spec, seed=5)
    torch.manual_seed(2)
    second = kind.start(spec, seed=5)
    assert all(torch.equal(first[name], second[name]) for name in first)
    renamed = BlockSpec("other", spec.kind, spec.sides, spec.decay, spec.damping)
    for name in (n for n in first if n.endswith(".U")):
        assert orthogonality_error(first[name]) < 1e-6
        assert not torch.equal(first[name], kind.start(spec, seed=6)[name])
        assert not torch.equal(first[name], kind.start(renamed, seed=5)[name])
    assert all(first[f"{name}.weight"].item() == 0.0 for name, _ in spec.named_sides())


@each_spec
def test_an_empty_statistic_changes_nothing(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    published = batched(kind.start(spec, seed=0))
    state = kind.seed(spec, published)
    empty = {
        name: torch.zeros_like(t)
        for name, t in statistic_of(spec, rows_of(0), published, 1).items()
    }
    untouched = kind.refresh(spec, state, empty, published)
    assert all(torch.equal(untouched.published[name], published[name]) for name in published)
    refreshed = kind.refresh(spec, state, statistic_of(spec, rows_of(0), published, 1), published)
    after = kind.refresh(spec, refreshed.state, empty, refreshed.published)
    assert all(torch.equal(after.state[name], t) for name, t in refreshed.state.items())
    assert all(torch.equal(after.published[name], t) for name, t in refreshed.published.items())
    # A count of 0 on one side stops the whole block, although steps were announced.
    half = statistic_of(spec, rows_of(1), published, 1)
    half[f"{list(spec.named_sides())[-1][0]}.count"] = torch.zeros(1)
    after = kind.refresh(spec, refreshed.state, half, published)
    assert all(torch.equal(after.state[name], t) for name, t in refreshed.state.items())


@each_spec
def test_batched_equals_looped(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    singles = [batched(kind.start(spec, seed=i)) for i in range(3)]
    states = [kind.seed(spec, single) for single in singles]
    for round_ in range(3):
        # Block 1 has nothing in the second round, and so a first pass in the third.
        steps = [1, 0 if round_ < 2 else 2, 3]
        statistics = [
            statistic_of(spec, rows_of(10 * round_ + i), singles[i], steps[i]) for i in range(3)
        ]

        def joined(parts: list[Tensors]) -> Tensors:
            return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

        whole = kind.refresh(spec, joined(states), joined(statistics), joined(singles))
        looped = [kind.refresh(spec, states[i], statistics[i], singles[i]) for i in range(3)]
        for i in range(3):
            for name, tensor in whole.published.items():  # on the CPU bit for bit
                assert torch.equal(tensor[i], looped[i].published[name][0]), (name, i, round_)
        states = [one.state for one in looped]
        singles = [one.published for one in looped]


@each_spec
def test_the_call_that_a_gpu_gets_equals_single_calls(
    spec: BlockSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refresh of the whole batch, which the CPU makes block by block."""
    kind = KINDS[spec.kind]
    singles = []
    for i in range(3):
        published = batched(kind.start(spec, seed=i))
        state = kind.seed(spec, published)
        for seed in range(i):  # block 0 holds nothing yet, the others do
            statistic = statistic_of(spec, rows_of(seed), published, 1)
            state, published = kind.refresh(spec, state, statistic, published)[:2]
        # Block 1 gets nothing new.
        late = statistic_of(spec, rows_of(5 + i), published, steps=[1, 0, 2][i])
        singles.append((state, late, published))
    looped = [kind.refresh(spec, *single) for single in singles]
    for module in (lowrank, dense, averaged_kind, shampoo, fisher, kfe):
        monkeypatch.setattr(module, "block_by_block", lambda refresh, *batch: refresh(*batch))
    joined = [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*singles, strict=True)
    ]
    whole = kind.refresh(spec, *joined)
    for i, one in enumerate(looped):
        assert (whole.innovation[i].item() == -1.0) == (i == 0)
        part = {name: tensor[i : i + 1] for name, tensor in whole.published.items()}
        pairs = zip(
            kind.inverses(spec, part, DAMPING, spec.relative_damping),
            kind.inverses(spec, one.published, DAMPING, spec.relative_damping),
            strict=True,
        )
        for got, wanted in pairs:
            assert relative_error(got.dense(), wanted.dense()) < 1e-4


@each_spec
def test_a_seeded_worker_goes_on_where_the_first_stopped(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    published = batched(kind.start(spec, seed=0))
    state = kind.seed(spec, published)
    for seed in range(3):
        statistic = statistic_of(spec, rows_of(seed), published, 1)
        refreshed = kind.refresh(spec, state, statistic, published)
        state, published = refreshed.state, refreshed.published
    statistic = statistic_of(spec, rows_of(9), published, 1)
    direct = kind.refresh(spec, state, statistic, published)
    seeded = kind.refresh(spec, kind.seed(spec, published), statistic, published)
    for name, tensor in direct.published.items():
        # But for dense the state is what was published; a dense one loses digits (see dense.py).
        tolerance = 1e-4 if spec.kind == "dense" else 0.0
        assert relative_error(seeded.published[name], tensor) <= tolerance, name


@each_spec
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1e8])
def test_any_scale_stays_finite(spec: BlockSpec, scale: float) -> None:
    kind = KINDS[spec.kind]
    # Absolute damping 0.01 has no meaning at 1e-24 or 1e16; the relative form has.
    spec = BlockSpec(spec.name, spec.kind, spec.sides, spec.decay, 1e-2, relative_damping=True)
    published = batched(kind.start(spec, seed=0))
    state = kind.seed(spec, published)
    for seed in range(3):
        statistic = statistic_of(spec, rows_of(seed, scale), published, 1)
        refreshed = kind.refresh(spec, state, statistic, published)
        state, published = refreshed.state, refreshed.published
    assert all(bool(torch.isfinite(t).all()) for t in published.values())
    assert bool(torch.isfinite(refreshed.uncaptured).all())
    assert bool(torch.isfinite(refreshed.innovation).all())
    for inverse in kind.inverses(spec, published, 1e-2, relative=True):
        assert bool(torch.isfinite(inverse.dense()).all())
        assert torch.linalg.eigvalsh(inverse.dense().double()).min().item() > 0.0


@each_spec
def test_one_row_and_repeated_rows(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    published = batched(kind.start(spec, seed=0))
    state = kind.seed(spec, published)
    rows = {name: torch.ones_like(own) for name, own in rows_of(0).items()}
    for _ in range(3):
        refreshed = kind.refresh(spec, state, statistic_of(spec, rows, published, 1), published)
        state, published = refreshed.state, refreshed.published
    inverses = kind.inverses(spec, published, DAMPING, spec.relative_damping)
    factors = [factor_of(side, rows[name]) for name, side in spec.named_sides()]
    for inverse, wanted in zip(inverses, inverses_of(spec, factors), strict=True):
        assert relative_error(inverse.dense()[0], wanted) < 1e-4


@each_spec
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t.fill_(float("nan")), lambda t: t.neg_()],
    ids=["nan", "negative"],
)
def test_impossible_statistics_raise(
    spec: BlockSpec, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    kind = KINDS[spec.kind]
    published = batched(kind.start(spec, seed=0))
    statistic = statistic_of(spec, rows_of(0), published, 1)
    for name in statistic:
        prefix, _, own = name.rpartition(".")
        if own in ("Y", "packed", "ww", "bb") or (own == "diag" and f"{prefix}.Y" not in statistic):
            spoil(statistic[name])
    with pytest.raises(NumericsError):
        kind.refresh(spec, kind.seed(spec, published), statistic, published)


def test_gradient_statistics_run_through_every_kind() -> None:
    for spec in TWO_SIDED:
        kind = KINDS[spec.kind]
        published = batched(kind.start(spec, seed=0), 2)
        state = kind.seed(spec, published)
        for seed in range(2):
            grad = torch.randn(2, DIM_G, DIM_A, generator=generator(seed))
            grad[1, 0, 0] = float("nan") if seed == 1 else 1.0
            statistic = encode_gradient(spec, grad, published)
            refreshed = kind.refresh(spec, state, statistic, published)
            kept = all(torch.equal(refreshed.state[n][1], state[n][1]) for n in state)
            assert kept == (seed == 1)
            state, published = refreshed.state, refreshed.published


def test_adding_statistics_equals_joining_their_rows() -> None:
    for spec in SPECS:
        kind = KINDS[spec.kind]
        published = batched(kind.start(spec, seed=0))
        state = kind.seed(spec, published)
        first, second = rows_of(0), rows_of(1)
        joined = {name: torch.cat([first[name], second[name]]) for name in first}
        parts = [statistic_of(spec, rows, published, 1) for rows in (first, second)]
        added = {name: parts[0][name] + parts[1][name] for name in parts[0]}
        one = kind.refresh(spec, state, added, published)
        two = kind.refresh(spec, state, statistic_of(spec, joined, published, 2), published)
        pairs = zip(
            kind.inverses(spec, one.published, DAMPING, False),
            kind.inverses(spec, two.published, DAMPING, False),
            strict=True,
        )
        for a, b in pairs:
            assert relative_error(a.dense(), b.dense()) < 1e-4
