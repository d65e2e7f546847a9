"""The public names: all are there, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import distcurv
from distcurv import makers


@pytest.mark.parametrize("name", distcurv.__all__)
def test_public_name_can_be_had_and_is_listed(name: str) -> None:
    assert getattr(distcurv, name) is not None
    assert name in dir(distcurv)


def test_all_of_the_unified_interface_is_public() -> None:
    wanted = set(makers.__all__)
    assert {"GradientMaker", "LOSS_CROSS_ENTROPY", "FISHER_EMP", "SHAPE_KFE"} <= wanted
    assert wanted <= set(distcurv.__all__)
    for name in wanted:
        assert getattr(distcurv, name) is getattr(makers, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchMaker"):
        _ = distcurv.NoSuchMaker  # type: ignore[attr-defined]


def test_importing_and_listing_load_no_torch() -> None:
    code = "import sys, distcurv; dir(distcurv); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
