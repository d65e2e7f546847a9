"""`full_float32` switches everything inexact off and puts back what it found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distcurv.curvature.precision import full_float32, products_are_full

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def test_old_interface_is_switched_off_and_restored() -> None:
    torch.set_float32_matmul_precision("medium")
    with full_float32(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_new_interface_is_switched_off_and_restored() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with full_float32(CPU):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_restored_after_an_error_and_autocast_is_off_inside() -> None:
    torch.set_float32_matmul_precision("high")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="boom"),
        full_float32(CPU),
    ):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        raise RuntimeError("boom")
    assert torch.get_float32_matmul_precision() == "high"


def test_whether_products_are_full_goes_by_what_the_caller_has_set() -> None:
    assert products_are_full(CPU)
    with full_float32(CPU):
        assert products_are_full(CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products_are_full(CPU)
        with full_float32(CPU):
            assert products_are_full(CPU)
    torch.set_float32_matmul_precision("medium")
    with full_float32(CPU):
        assert not products_are_full(CPU)  # not beyond this block, which another thread may leave
    assert not products_are_full(CPU)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert products_are_full(CPU)
    assert not products_are_full(torch.device("cuda"))
    with full_float32(CPU):
        assert not products_are_full(torch.device("cuda"))
