"""Every bad setting names its field, its value and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distcurv.config import MAX_DELAY_WINDOWS, KfacConfig, ServiceConfig, SoapConfig
from distcurv.errors import ConfigError

NAN, INF = float("nan"), float("inf")
INTEGER = "give an integer >= 1"
OPTIONAL = "give None or an integer >= 0"
SECONDS = "give a number of seconds > 0"

SHARED: list[tuple[str, list[Any], str]] = [
    ("rank", [0, -1, 1.5, 16.0, True, "16", None, NAN], INTEGER),
    ("preconditioner_upd_interval", [0, -1, 2.5, None, True], INTEGER),
    ("early_interval", [0, -2, None, "5"], INTEGER),
    ("max_owners", [0, -1, 2.0], INTEGER),
    ("curvature_upd_interval", [0, -1, 21, 1.5, True], "from 1 to preconditioner_upd_interval"),
    ("statistics_at", [3, True, "always"], "give None or a function of the step"),
    ("early_steps", [-1, 1.5, "all", True], OPTIONAL),
    ("install_delay", [-1, 0.5, "none"], OPTIONAL),
    ("max_staleness", [-1, INF], OPTIONAL),
    ("max_rows", [0, -1, 1.5, True, "all"], "use 'auto', None or an integer >= 1"),
    ("factor_decay", [1.0, 1.5, -0.1, NAN, INF, None, "0.9"], r"give a number in \[0, 1\)"),
    ("encoding", ["Sketch", "", None, 3], "use 'auto', 'sketch' or 'dense'"),
    ("wire_dtype", ["f2", "bfloat16", "float64", "", None, 16], "use 'float32' or 'float16'"),
    ("staleness_policy", ["drop", "", None], "use 'keep' or 'fallback'"),
    ("link_timeout", [0, -1, NAN, INF, None, "5"], SECONDS),
    ("heartbeat", [0, -1, NAN, None], SECONDS),
    ("wait_timeout", [0, -1.0, INF, None], SECONDS),
    ("seed", [1.5, None, "0", True], "give an integer"),
]
KFAC: list[tuple[str, list[Any], str]] = [
    ("kind", ["cholesky", "", None], "use one of lowrank, dense"),
    ("damping", [0, -1e-3, NAN, INF, None, "small"], "give a number > 0"),
    ("damping_form", ["pi", None], "use one of absolute, relative"),
    ("tail_in", ["diag", None], "use one of none, isotropic, diagonal"),
    ("tail_out", ["full", 1], "use one of none, isotropic, diagonal"),
    ("kl_clip", [0, -1, NAN, "auto"], "give None or a number > 0"),
    ("lr", [0, -1, INF], "give None or a number > 0"),
    ("fisher_type", ["ggn", "MC", None], "use one of empirical, mc, exact"),
    ("loss_reduction", ["none", None], "use one of mean, sum"),
    ("graft", [1, None, "norm"], "give True or False"),
    ("overrides", [3, "head", {"head": {}}], "give a list of"),
    ("accumulation", [0, -1, 1.5, None, True], "give an integer >= 1"),
    ("weight_sharing", ["both", None], "use one of expand, reduce"),
    ("max_itr", [0, -1, 1.5, True, 10_001], "give None or an integer from 1 to 10000"),
    ("tolerance", [-1e-3, NAN, INF, None, "small"], "give 0 or a number > 0"),
    ("tolerance", [1e-3], "it ends the products that max_itr allows: give both"),
]
SOAP: list[tuple[str, list[Any], str]] = [
    ("source", ["hooks", None], "use 'gradient' or 'activations'")
]


def cases() -> list[Any]:
    every = [(ServiceConfig, SHARED), (SoapConfig, SHARED + SOAP), (KfacConfig, KFAC)]
    return [
        pytest.param(cls, field, value, remedy, id=f"{cls.__name__}.{field}={value!r}")
        for cls, table in every
        for field, values, remedy in table
        for value in values
    ]


@pytest.mark.parametrize(("cls", "field", "value", "remedy"), cases())
def test_a_bad_value_names_field_value_and_remedy(
    cls: type[ServiceConfig], field: str, value: Any, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        cls(**{field: value})
    assert str(caught.value).startswith(f"{cls.__name__}.{field} is {value!r}: ")
    assert isinstance(caught.value, ValueError)


# Settings that are no single number or word: checked by other tests, or any value is good.
UNCHECKED = {"check_replicas", "ignore_modules"}


@pytest.mark.parametrize("cls", [ServiceConfig, SoapConfig, KfacConfig])
def test_every_field_is_in_the_tables_above(cls: type[ServiceConfig]) -> None:
    """A new field needs a line there."""
    tested = {field for field, _, _ in [*SHARED, *KFAC, *SOAP]}
    assert {f.name for f in dataclasses.fields(cls)} <= tested | UNCHECKED


def test_statistics_may_not_be_rarer_than_installs() -> None:
    with pytest.raises(ConfigError, match=r"curvature_upd_interval is 9: .* \(8\)"):
        ServiceConfig(preconditioner_upd_interval=8, curvature_upd_interval=9)
    ServiceConfig(preconditioner_upd_interval=8, curvature_upd_interval=8)


def test_the_delay_is_bounded_by_the_bases_that_are_held() -> None:
    with pytest.raises(ConfigError, match=r"install_delay is \d+: give at most"):
        ServiceConfig(preconditioner_upd_interval=4, install_delay=4 * MAX_DELAY_WINDOWS + 1)
    ServiceConfig(preconditioner_upd_interval=4, install_delay=4 * MAX_DELAY_WINDOWS)


def test_heartbeats_must_fit_into_the_time_out() -> None:
    with pytest.raises(ConfigError, match=r"heartbeat is 5.0: give less than link_timeout \(5.0\)"):
        ServiceConfig(heartbeat=5.0, link_timeout=5.0)
    # Services would take rarer ones for silence, whatever the owner's own time-out is.
    with pytest.raises(ConfigError, match=r"heartbeat is 5.1: give at most 5 s"):
        ServiceConfig(heartbeat=5.1, link_timeout=60.0)
    ServiceConfig(heartbeat=5.0, link_timeout=60.0)


def test_a_sketch_is_one_product() -> None:
    with pytest.raises(ConfigError, match=r"max_itr is 2: a sketch is one product"):
        KfacConfig(max_itr=2, encoding="sketch")
    KfacConfig(max_itr=1, encoding="sketch")
    KfacConfig(max_itr=2, tolerance=1e-3)


def test_two_norm_rules_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="kl_clip and graft exclude each other: choose one"):
        KfacConfig(graft=True, kl_clip=1e-3)


def test_positional_arguments_and_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError):
        KfacConfig(64)  # type: ignore[misc]
    with pytest.raises(TypeError):
        KfacConfig(rnak=64)  # type: ignore[call-arg]


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KfacConfig().rank = 3  # type: ignore[misc]


def test_each_door_has_a_policy_that_fits_it() -> None:
    """LowRankSOAP has no base optimizer to fall back to, hence refreshes in process."""
    assert SoapConfig().staleness_policy == "fallback"
    assert KfacConfig().staleness_policy == "keep"


def test_what_none_stands_for() -> None:
    config = ServiceConfig(preconditioner_upd_interval=8)
    assert config.resolved_early_steps == 40
    assert ServiceConfig(preconditioner_upd_interval=20).resolved_early_steps == 80
    assert config.resolved_curvature_upd_interval == 4
    assert ServiceConfig(preconditioner_upd_interval=1).resolved_curvature_upd_interval == 1
    assert ServiceConfig(curvature_upd_interval=3).resolved_curvature_upd_interval == 3
    assert config.resolved_max_staleness == 80
    assert ServiceConfig(early_steps=3, max_staleness=7).resolved_early_steps == 3
    assert ServiceConfig(early_steps=3, max_staleness=7).resolved_max_staleness == 7
    assert KfacConfig(kind="dense").resolved_early_steps == 0
    assert KfacConfig(kind="dense", early_steps=5).resolved_early_steps == 5


def test_what_max_rows_auto_stands_for() -> None:
    assert ServiceConfig(rank=16).resolved_max_rows == 128
    assert KfacConfig(rank=128).resolved_max_rows == 512
    assert KfacConfig(kind="dense").resolved_max_rows is None
    assert KfacConfig(kind="dense", max_rows=9).resolved_max_rows == 9
    assert KfacConfig(max_rows=None).resolved_max_rows is None
    assert SoapConfig(max_rows=1).resolved_max_rows == 1


def test_the_bound_on_staleness_has_room_for_the_delay() -> None:
    config = ServiceConfig(
        preconditioner_upd_interval=2, curvature_upd_interval=1, install_delay=20
    )
    assert config.resolved_max_staleness == 26
