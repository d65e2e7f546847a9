"""Every field of PreconditioningConfig works, or is refused by name."""

from __future__ import annotations

import pytest
from torch import nn

from distcurv.errors import ConfigError
from distcurv.makers import PreconditioningConfig, get_update_schedule


def due(config: PreconditioningConfig, steps: int = 24) -> tuple[list[int], list[int]]:
    """Steps with an update of the preconditioner, and those with one of the curvature."""
    both = (config.preconditioner_times(), config.curvature_times())
    first, second = ([step for step in range(steps) if times.due(step)] for times in both)
    return first, second


def test_by_default_everything_is_updated_at_every_step() -> None:
    assert due(PreconditioningConfig(), 5) == ([*range(5)], [*range(5)])


def test_intervals_and_warm_up() -> None:
    config = PreconditioningConfig(
        preconditioner_upd_interval=6,
        preconditioner_warmup_steps=2,
        curvature_upd_interval=4,
        curvature_warmup_steps=3,
    )
    assert due(config) == ([0, 1, 2, 8, 14, 20], [0, 1, 2, 3, 7, 11, 15, 19, 23])


def test_the_curvature_follows_the_preconditioner_unless_it_has_times_of_its_own() -> None:
    config = PreconditioningConfig(preconditioner_upd_interval=6, preconditioner_warmup_steps=2)
    assert due(config) == ([0, 1, 2, 8, 14, 20], [0, 1, 2, 8, 14, 20])
    assert due(PreconditioningConfig(num_total_steps=24, preconditioner_upd_ratio=0.25)) == (
        [0, 4, 8, 12, 16, 20],
        [0, 4, 8, 12, 16, 20],
    )


@pytest.mark.parametrize("kind", ["constant", "step", "linear"])
def test_ratios_and_interval_types(kind: str) -> None:
    config = PreconditioningConfig(
        num_total_steps=24,
        preconditioner_upd_ratio=0.3,
        preconditioner_warmup_ratio=0.1,
        preconditioner_interval_type=kind,
        curvature_upd_ratio=0.5,
        curvature_warmup_ratio=0.2,
        curvature_interval_type=kind,
    )
    assert due(config, 40) == (
        [s for s, on in enumerate(get_update_schedule(24, 0.3, 0.1, kind)) if on],
        [s for s, on in enumerate(get_update_schedule(24, 0.5, 0.2, kind)) if on],
    )
    assert [len(steps) for steps in due(config)] == [7, 12]


def test_ratio_for_the_preconditioner_and_interval_for_the_curvature() -> None:
    config = PreconditioningConfig(
        num_total_steps=24, preconditioner_upd_ratio=0.125, curvature_upd_interval=12
    )
    assert due(config) == ([0, 8, 16], [0, 12])


def test_minus_one_is_not_set() -> None:
    config = PreconditioningConfig(
        num_total_steps=-1,
        curvature_upd_interval=-1,
        curvature_upd_ratio=-1,
        data_size=-1,
        ema_decay=-1,
        rank=-1,
        max_staleness=-1,
        install_delay=-1,
        max_rows=-1,
        early_steps=-1,
    )
    assert config == PreconditioningConfig()


GIVEN_TWICE = {
    "preconditioner_upd_interval": {"num_total_steps": 100, "preconditioner_upd_interval": 10},
    "preconditioner_warmup_steps": {"num_total_steps": 100, "preconditioner_warmup_steps": 10},
    "curvature_upd_interval": {
        "num_total_steps": 100,
        "curvature_upd_interval": 10,
        "curvature_upd_ratio": 0.1,
    },
}


@pytest.mark.parametrize("name", GIVEN_TWICE)
def test_interval_and_ratio_exclude_each_other(name: str) -> None:
    other = "curvature_upd_ratio" if name.startswith("curvature") else "num_total_steps"
    with pytest.raises(ConfigError, match=rf"{name}.*{other}"):
        PreconditioningConfig(**GIVEN_TWICE[name])  # type: ignore[arg-type]


WITHOUT_EFFECT = [
    {"preconditioner_upd_ratio": 0.5},
    {"preconditioner_warmup_ratio": 0.5},
    {"preconditioner_interval_type": "linear"},
    {"curvature_upd_ratio": 0.5},
    {"curvature_warmup_ratio": 0.5},
    {"curvature_interval_type": "step"},
    {"curvature_warmup_steps": 5},
]


@pytest.mark.parametrize("settings", WITHOUT_EFFECT, ids=str)
def test_a_field_that_would_have_no_effect_is_refused(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"PreconditioningConfig.{name} is "):
        PreconditioningConfig(**settings)  # type: ignore[arg-type]


WRONG = [
    ("num_total_steps", 0),
    ("num_total_steps", 3.5),
    ("preconditioner_upd_interval", 0),
    ("preconditioner_upd_interval", True),
    ("preconditioner_upd_interval", None),
    ("preconditioner_warmup_steps", -1),
    ("preconditioner_upd_ratio", 1.5),
    ("preconditioner_upd_ratio", None),
    ("preconditioner_warmup_ratio", -0.5),
    ("preconditioner_interval_type", "cosine"),
    ("curvature_upd_interval", 0),
    ("curvature_warmup_steps", 0.5),
    ("curvature_upd_ratio", 2),
    ("curvature_warmup_ratio", "a"),
    ("curvature_interval_type", None),
    ("data_size", 0),
    ("damping", 0.0),
    ("damping", -1),
    ("damping", float("inf")),
    ("ema_decay", 0.0),
    ("ema_decay", 1.5),
    ("ignore_modules", "conv"),
    ("rank", 0),
    ("rank", 2.0),
    ("max_staleness", -2),
    ("staleness_policy", "hope"),
    ("install_delay", -3),
    ("early_steps", 0.5),
    ("early_interval", 0),
    ("damping_form", "odd"),
    ("tail_in", "odd"),
    ("tail_out", "odd"),
    ("encoding", "odd"),
    ("wire_dtype", "float8"),
    ("weight_sharing", "odd"),
    ("max_rows", 0),
    ("accumulation", 0),
    ("kl_clip", 0.0),
    ("lr", -1.0),
    ("graft", 1),
    ("overrides", [("a", {"no_such": 1})]),
    ("max_owners", 0),
    ("link_timeout", 0.0),
    ("heartbeat", 99.0),
    ("wait_timeout", -1.0),
    ("check_replicas", "yes"),
    ("seed", 0.5),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        PreconditioningConfig(**{name: value})  # type: ignore[arg-type]


def test_what_may_be_ignored() -> None:
    module = nn.Linear(2, 2)
    config = PreconditioningConfig(ignore_modules=[module, nn.Conv2d, "head"])
    assert config.ignore_modules == [module, nn.Conv2d, "head"]
