"""The split of one damping over two sides, against the formulas and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcurv.curvature.damping import split_damping
from distcurv.errors import ConfigError, ShapeError


@given(
    damping=st.floats(1e-8, 1e3),
    trace_A=st.floats(1e-20, 1e15),
    trace_G=st.floats(1e-20, 1e15),
    dim_A=st.integers(1, 5000),
    dim_G=st.integers(1, 5000),
)
def test_both_forms_against_the_formulas(
    damping: float, trace_A: float, trace_G: float, dim_A: int, dim_G: int
) -> None:
    traces = [torch.tensor(value, dtype=torch.float64) for value in (trace_A, trace_G)]
    pi = math.sqrt((trace_A / dim_A) / (trace_G / dim_G))
    delta_A, delta_G = split_damping(damping, traces, [dim_A, dim_G], relative=False)
    assert delta_A.item() == pytest.approx(math.sqrt(damping) * pi, rel=1e-9)
    assert delta_G.item() == pytest.approx(math.sqrt(damping) / pi, rel=1e-9)
    assert (delta_A * delta_G).item() == pytest.approx(damping, rel=1e-9)
    delta_A, delta_G = split_damping(damping, traces, [dim_A, dim_G], relative=True)
    assert delta_A.item() == pytest.approx(math.sqrt(damping) * trace_A / dim_A, rel=1e-9)
    assert delta_G.item() == pytest.approx(math.sqrt(damping) * trace_G / dim_G, rel=1e-9)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_degenerate_traces_have_no_say(bad: float, relative: bool) -> None:
    traces = [torch.tensor([bad, 8.0]), torch.tensor([6.0, 6.0])]
    delta_A, delta_G = split_damping(0.04, traces, [4, 3], relative)
    assert delta_A[0].item() == pytest.approx(0.2)
    assert delta_G[0].item() == pytest.approx(0.4 if relative else 0.2)
    assert delta_A[1].item() == pytest.approx(0.4 if relative else 0.2)  # means are 2 and 2


def test_one_side_takes_all_and_tensors_are_accepted() -> None:
    (delta,) = split_damping(0.3, [torch.tensor(5.0)], [10], relative=False)
    assert delta.item() == pytest.approx(0.3)
    (delta,) = split_damping(torch.tensor(0.3), [torch.tensor(5.0)], [10], relative=True)
    assert delta.item() == pytest.approx(0.15)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"-0\.1"):
        split_damping(-0.1, [torch.tensor(1.0)], [1], relative=False)
    with pytest.raises(ConfigError, match="nan"):
        split_damping(float("nan"), [torch.tensor(1.0)], [1], relative=False)
    with pytest.raises(ShapeError, match="2 dims"):
        split_damping(0.1, [torch.tensor(1.0)], [1, 2], relative=False)
