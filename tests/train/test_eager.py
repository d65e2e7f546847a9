"""The stance of `torch.compile` while captures are armed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
from capture_harness import Harness, TokenNet, batch
from torch.compiler import set_stance

from distcurv.train.eager import hold_eager


def stance() -> str:
    """The one that is set; there is no way to ask for it."""
    probe = set_stance("default")
    probe.__exit__(None, None, None)
    return str(probe.prev.stance)


@pytest.fixture(autouse=True)
def _default_before_and_after() -> Iterator[None]:
    assert stance() == "default"
    yield
    assert stance() == "default"


def test_holds_overlap_in_any_order_and_end_once() -> None:
    first, second = hold_eager(), hold_eager()
    assert stance() == "force_eager"
    first()
    first()
    assert stance() == "force_eager"
    second()
    assert stance() == "default"


def test_the_users_stance_around_a_hold_comes_back() -> None:
    with set_stance("eager_on_recompile"):
        release = hold_eager()
        assert stance() == "force_eager"
        release()
        assert stance() == "eager_on_recompile"


def test_a_stance_that_the_user_sets_meanwhile_stands() -> None:
    release = hold_eager()
    with set_stance("fail_on_recompile"):
        release()
        assert stance() == "fail_on_recompile"
    # What the end of the body puts back was set by a hold that is over.
    assert stance() == "default"
    again = hold_eager()
    assert stance() == "force_eager"
    again()
    assert stance() == "default"


def test_the_stance_ends_with_the_arming_and_with_the_capture() -> None:
    model = TokenNet()
    inputs, _ = batch(model, 4)
    harness = Harness(model)
    with pytest.raises(ZeroDivisionError), harness.capture.armed(harness.bases, harness.sink):
        model(inputs)
        assert stance() == "force_eager"
        raise ZeroDivisionError
    assert stance() == "default"
    harness.arm()
    other = Harness(model)
    other.arm()
    harness.capture.finish()
    assert stance() == "force_eager"
    del other
    gc.collect()
    assert stance() == "default"


def test_torch_is_told_once_that_our_hook_meets_no_wrapper() -> None:
    with warnings.catch_warnings():
        hold_eager()()
        filters = len(warnings.filters)
        hold_eager()()
        assert len(warnings.filters) == filters
