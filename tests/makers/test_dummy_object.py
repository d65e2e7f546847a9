"""What is recorded on a DummyObject gives what doing it at once would have given."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from distcurv.makers import DummyObject
from distcurv.makers.dummy_object import default_logits, evaluate

Y = torch.arange(1.0, 25.0).reshape(2, 3, 4) / 7
T = torch.tensor([[0, 3, 1], [2, -1, 0]])

# Each does something to a model's output; done to a DummyObject it must be recorded.
TENSOR_OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda y: y,
    "item": lambda y: y[1],
    "slice": lambda y: y[:, -1, 1:3],
    "slice by the output": lambda y: y[..., : y.size(0)],
    "index by the output": lambda y: y[y > 1],
    "attribute": lambda y: y.mT,
    "method": lambda y: y.view(-1, y.size(-1)),
    "keyword": lambda y: y.sum(dim=y.dim() - 1, keepdim=True),
    "arithmetic": lambda y: (2 - y) / (1 + y) * 3 - y**2 + 2**y - (-y) + (+y) + abs(y - 1),
    "division": lambda y: (y // 0.3) + (7 // y) + (y % 0.3) + (7 % y) + 1 / y,
    "matrices": lambda y: (y @ y.mT) + torch.ones(3, 4) @ y.mT,
    "comparison": lambda y: ((y > 1) & (y <= 2)) | ~(y < 3) ^ (y >= 2) | (y == 1) | (y != 1),
    "bits reflected": lambda y: (True & (y > 1)) | (False | (y > 2)) | (True ^ (y > 1)),
    "powers of it": lambda y: y**y,
    "shifts": lambda y: ((y.int() << 2) >> 1) + (1 << y.int()) + (64 >> y.int()),
    "numpy's number first": lambda y: np.float64(2.0) * y,
    "tensor first": lambda y: torch.ones(4) + y - torch.ones(4) * y,
    "torch function": lambda y: torch.stack([y[0], y[1]]).softmax(-1) + torch.relu(y),
    "functional": lambda y: F.cross_entropy(y.flatten(0, 1), T.flatten(), ignore_index=-1),
    "functional on arguments": lambda y: F.linear(torch.ones(2, 4), y[0], bias=y[0].sum(1)),
    "nested containers": lambda y: torch.cat([y, *(2 * y, y)], dim=0),
}


@pytest.mark.parametrize("name", TENSOR_OPERATIONS)
def test_what_is_recorded_gives_what_is_done_at_once(name: str) -> None:
    operation = TENSOR_OPERATIONS[name]
    recorded = operation(DummyObject())
    assert isinstance(recorded, DummyObject)
    torch.testing.assert_close(recorded.eval(Y), operation(Y), rtol=0, atol=0)
    # The same recording serves for the next step's output.
    torch.testing.assert_close(recorded.eval(2 * Y), operation(2 * Y), rtol=0, atol=0)


def test_items_of_mappings_attributes_of_objects_and_calls() -> None:
    output = {"parts": (1, SimpleNamespace(value=5, add=lambda a, *, b: a + b))}
    y = DummyObject()
    part = y["parts"][1]
    assert part.value.eval(output) == 5
    assert part.add(y["parts"][0], b=part.value).eval(output) == 6
    assert y[y["key"]].eval({"key": "a", "a": 3}) == 3


def test_containers_of_dummies_are_evaluated_inside() -> None:
    y = DummyObject()
    tree = {"a": [y[0], (y[1], slice(y[0], None))], "b": 4}
    assert evaluate(tree, (7, 8)) == {"a": [7, (8, slice(7, None))], "b": 4}


def test_what_is_used_twice_is_computed_once() -> None:
    y = DummyObject()
    twice = y.pop()
    assert (twice + twice * twice).eval([1, 3]) == 12
    dropped = F.dropout(y, 0.5, training=True)
    assert torch.equal((dropped - dropped).eval(Y), torch.zeros_like(Y))
    # 2^60 evaluations if each use were its own.
    doubled = y
    for _ in range(60):
        doubled = doubled + doubled
    assert doubled.eval(1) == 2**60


def test_recordings_may_be_longer_than_the_stack() -> None:
    total = DummyObject()
    for _ in range(5000):
        total = total + 1
    assert total.eval(0) == 5000


@given(st.lists(st.sampled_from(["add", "sub", "mul", "radd", "rsub", "neg", "abs"]), max_size=20))
def test_any_chain_of_arithmetic(names: list[str]) -> None:
    def chain(value: Any) -> Any:
        for i, name in enumerate(names):
            if name in ("neg", "abs"):
                value = getattr(operator, name)(value)
            elif name[0] == "r":
                value = getattr(operator, name[1:])(i, value)
            else:
                value = getattr(operator, name)(value, i)
        return value

    assert chain(DummyObject()).eval(3) == chain(3)


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda y: bool(y), "truth value"),
        (lambda y: 1 if y > 0 else 2, "truth value"),
        (lambda y: list(y), "unpacked"),
        (lambda y: (lambda a, b: a)(*y), "unpacked"),
        (lambda y: 1 in y, "not iterable"),
        (lambda y: len(y), "len"),
        (lambda y: float(y), "float"),
        (lambda y: operator.setitem(y, 0, 1), "assignment"),
    ],
)
def test_what_needs_the_value_at_once_is_refused(
    misuse: Callable[[DummyObject], Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        misuse(DummyObject())


def test_setting_an_attribute_is_refused() -> None:
    with pytest.raises(AttributeError):
        DummyObject().loss = 1


def test_copies_hash_and_repr() -> None:
    y = DummyObject()
    loss = y.logits[0].sum(dim=1) + 2
    assert copy.deepcopy(loss).eval(SimpleNamespace(logits=[torch.ones(2, 3)])).tolist() == [5, 5]
    assert len({y, loss, y}) == 2
    said = "getattr(getitem(getattr(DummyObject(), 'logits'), 0), 'sum')"
    assert repr(loss) == f"add(call({said}, dim=1), 2)"


@pytest.mark.parametrize(
    "output",
    [
        Y,
        (Y, 1),
        [Y],
        {"logits": Y, "loss": 1},
        {"first": Y, "second": 1},
        SimpleNamespace(loss=1, logits=Y),
    ],
)
def test_where_the_logits_are_by_default(output: object) -> None:
    assert default_logits().eval(output) is Y


@pytest.mark.parametrize("output", [None, (), {}, 3.0])
def test_outputs_without_logits_stand_for_themselves(output: object) -> None:
    assert default_logits().eval(output) == output
