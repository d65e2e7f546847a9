"""Fingerprints: equal for equal gradients, different otherwise."""

from __future__ import annotations

import pytest
import torch

from distcurv.train.fingerprint import Fingerprint, of_text


def grads(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (40, 50), (1,)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_equal_gradients_have_equal_numbers() -> None:
    assert Fingerprint(True).take(grads()) == Fingerprint(True).take(grads())
    assert Fingerprint(True).take(grads()) == Fingerprint(True).now(grads())


@pytest.mark.parametrize("tensor", [0, 1, 2, 3])
def test_one_bit_in_any_of_the_first_gradients_shows(tensor: int) -> None:
    changed = grads()
    flat = changed[tensor].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    assert Fingerprint(True).take(changed) != Fingerprint(True).take(grads())


def test_gradients_of_another_iteration_differ() -> None:
    numbers = {Fingerprint(True).take(grads(seed)) for seed in range(50)}
    assert len(numbers) == 50


def test_numbers_fit_a_control_vector() -> None:
    for seed in range(20):
        assert 0 <= Fingerprint(True).take(grads(seed)) < 2**62
        assert 0 <= of_text(str(seed)) < 2**62


def test_switched_off_or_without_gradients_there_is_nothing_to_compare() -> None:
    assert Fingerprint(False).take(grads()) == Fingerprint(False).now(grads()) == 0
    assert Fingerprint(True).take([]) == Fingerprint(True).now([]) == 0


def test_a_large_gradient_is_looked_at_in_many_places() -> None:
    large = torch.zeros(100_000)
    zero = Fingerprint(True).take([large])
    stride = 100_000 // 64
    for place in range(0, 64 * stride, 8 * stride):
        changed = large.clone()
        changed[place] = 1.0
        assert Fingerprint(True).take([changed]) != zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts_are_read_by_value(dtype: torch.dtype) -> None:
    grad = grads()[2].to(dtype)
    assert Fingerprint(True).take([grad]) == Fingerprint(True).take([grad.T.contiguous().T])


def test_empty_and_non_finite_gradients_have_numbers_too() -> None:
    poisoned = grads()
    poisoned[0][0, 0] = float("nan")
    assert Fingerprint(True).take(poisoned) == Fingerprint(True).take(poisoned)
    assert Fingerprint(True).take([torch.empty(0)]) >= 0


def test_texts_have_numbers() -> None:
    assert of_text("rank=16") == of_text("rank=16") != of_text("rank=17")
