"""Outputs, losses and gradients of a GradientMaker are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from output_cases import CASES, N, Network, T, classes, make, plain_output
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcurv.errors import ConfigError, StateError
from distcurv.makers import DummyObject, GradientMaker


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.clone() for g in found]


def assert_same(got: Any, wanted: Any) -> None:
    """The same outputs, whatever they consist of."""
    assert type(got) is type(wanted)
    if not isinstance(got, Tensor | tuple | list | dict):
        got, wanted = vars(got), vars(wanted)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_documented_output(name: str) -> None:
    case = CASES[name]
    model, x, t = make(case)
    y_plain = plain_output(case, model, x, t)
    loss_plain = case.loss(y_plain, t)
    loss_plain.backward()
    wanted = grads(model)

    gm = GradientMaker(model)
    for _ in range(2):
        model.zero_grad()
        case.setup(gm, model, x, t)
        y, loss = gm.forward_and_backward()
        assert_same(y, y_plain)
        assert y is gm.model_output
        assert loss is gm.loss
        torch.testing.assert_close(loss, loss_plain, rtol=0, atol=0)
        torch.testing.assert_close(grads(model), wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("name", CASES)
def test_every_documented_output_of_a_wrapped_model(name: str) -> None:
    check_wrapped(name)


# With these a wrapper's own forward takes part in the backward.
@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("setting", ["static_graph", "find_unused_parameters"])
def test_a_wrapper_that_watches_the_backward(setting: str) -> None:
    check_wrapped("dataclass", **{setting: True})


def check_wrapped(name: str, **settings: bool) -> None:
    case = CASES[name]
    model, x, t = make(case)
    case.loss(plain_output(case, model, x, t), t).backward()
    wanted = grads(model)
    wrapped = DistributedDataParallel(model, **settings)  # type: ignore[arg-type]
    gm = GradientMaker(wrapped)
    # The derivatives in between must not disturb the wrapper's reductions.
    for _ in range(3):
        wrapped.zero_grad()
        case.setup(gm, wrapped, x, t)
        torch.testing.assert_close([*gm.loss_grad()], wanted)
        gm.per_example_loss_grads()
        gm.loss_hvp(accumulate_grad=False)
        gm.logit_jvp()
        gm.forward_and_backward()
        torch.testing.assert_close(grads(model), wanted)


WAYS: dict[str, Callable[[Network], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "the model": lambda m: (m, (), {}),
    "its forward": lambda m: (m.forward, (), {}),
    "a method": lambda m: (m.score, (), {"factor": 2.0}),
    "a function": lambda m: (lambda x, shift: m(x) + shift, (), {"shift": 0.5}),
    "an inner module": lambda m: (lambda x: m.fc2(m.fc1(x)), (), {}),
    "parameters themselves": lambda m: (lambda x: x @ m.fc1.weight.T @ m.fc2.weight.T, (), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_model_called_in_any_way(way: str) -> None:
    model, x, t = make(CASES["tensor"])
    call, args, kwargs = WAYS[way](model)
    F.cross_entropy(call(x, *args, **kwargs), t).backward()
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    gm = GradientMaker(model)
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(call, x, *args, **kwargs), t)
    torch.testing.assert_close([*gm.loss_grad()], wanted, rtol=0, atol=0)
    assert not grads(model)
    gm.forward_and_backward()
    torch.testing.assert_close(grads(model), [g for g in wanted if g.any()], rtol=0, atol=0)


def test_a_model_with_keywords_only_and_a_loss_that_gets_the_output_by_keyword() -> None:
    model, x, t = make(CASES["tensor"])
    gm = GradientMaker(model)
    y = gm.setup_model_call(model, x=x)
    gm.setup_loss_call(F.cross_entropy, input=y, target=t, label_smoothing=0.1)
    out, loss = gm.forward_and_backward()
    assert torch.equal(loss, F.cross_entropy(out, t, label_smoothing=0.1))


def test_a_loss_of_several_parts_of_the_output_in_containers() -> None:
    model, x, t = make(CASES["mapping"])
    gm = GradientMaker(model)
    y = gm.setup_model_call(model, x, t)

    def total(parts: list[Tensor], *, weights: dict[str, Tensor]) -> Tensor:
        return sum(parts, torch.zeros(())) * weights["of"].sum()

    gm.setup_loss_call(total, [y["loss"], y["hidden"].mean()], weights={"of": y["logits"]})
    out, loss = gm.forward_and_backward()
    wanted = (out["loss"] + out["hidden"].mean()) * out["logits"].sum()
    torch.testing.assert_close(loss, wanted)


def test_gradients_add_up_until_they_are_zeroed() -> None:
    case = CASES["tensor"]
    model, x, t = make(case)
    gm = GradientMaker(model)
    case.setup(gm, model, x, t)
    gm.forward_and_backward()
    once = grads(model)
    gm.forward_and_backward()
    torch.testing.assert_close(grads(model), [2 * g for g in once])


def test_the_later_loss_replaces_the_earlier_one() -> None:
    case = CASES["sequence"]
    model, x, t = make(case)
    gm = GradientMaker(model)
    y = gm.setup_model_call(model, x, t)
    gm.setup_loss_call(F.cross_entropy, y[0], t, reduction="sum")
    assert not gm.loss_is_mean
    gm.setup_loss_repr(y[1])
    assert gm.loss_is_mean
    _, loss = gm.forward_and_backward()
    assert torch.equal(loss, gm.model_output[1])
    gm.setup_loss_call(F.cross_entropy, y[0], t, reduction="sum")
    _, summed = gm.forward_and_backward()
    torch.testing.assert_close(summed, N * loss)


@pytest.mark.parametrize(
    ("loss_fn", "is_mean"),
    [
        (F.cross_entropy, True),
        (nn.MSELoss(), True),
        (nn.MSELoss(reduction="sum"), False),
        (lambda y, t: (y - t).square().sum(), True),
    ],
)
def test_whether_the_loss_is_a_mean(loss_fn: Callable[..., Tensor], is_mean: bool) -> None:
    gm = GradientMaker(nn.Linear(1, 1))
    gm.setup_loss_call(loss_fn, DummyObject(), 0)
    assert gm.loss_is_mean is is_mean


def test_where_the_logits_are() -> None:
    case = CASES["sequence"]
    model, x, t = make(case)
    gm = GradientMaker(model)
    y = gm.setup_model_call(model, x, t)
    gm.setup_loss_repr(y[1])
    gm.forward_and_backward()
    assert gm.logits is gm.model_output[0]
    gm.setup_logits_repr(y[1])
    assert gm.logits is gm.model_output[1]
    gm.setup_logits_repr(y[0].flatten())
    gm.setup_model_call(model, x[:2], t[:2])
    gm.call_model()
    assert torch.equal(gm.logits, gm.model_output[0].flatten())


def test_delegation() -> None:
    case = CASES["operations"]
    model, x, t = make(case)
    first, second = GradientMaker(model), GradientMaker(model)
    case.setup(first, model, x, t)
    output, loss = first.delegate_forward_and_backward(second)
    assert output is first.model_output is second.model_output
    assert loss is first.loss is second.loss
    assert first.logits.shape == (N * T, 3)
    assert grads(model)


def test_forward_then_backward() -> None:
    case = CASES["tensor"]
    model, x, t = make(case)
    gm = GradientMaker(model)
    case.setup(gm, model, x, t)
    gm.forward()
    assert not grads(model)
    gm.backward()
    assert grads(model)


def test_misuse_is_told() -> None:
    model, x, t = make(CASES["tensor"])
    gm = GradientMaker(model)
    for call in (gm.call_model, gm.loss_grad, gm.per_example_loss_grads, gm.logit_jvp):
        with pytest.raises(StateError, match="setup_model_call"):
            call()
    with pytest.raises(StateError, match="setup_model_call"):
        gm.delegate_forward_and_backward(GradientMaker(model))
    with pytest.raises(StateError, match="forward"):
        gm.backward()
    gm.setup_model_call(model, x)
    for call in (gm.forward_and_backward, gm.loss_grad, gm.per_example_loss_grads):
        with pytest.raises(StateError, match="setup_loss_call"):
            call()
    other = GradientMaker(model)
    other.setup_loss_call(F.cross_entropy, DummyObject(), t)
    with pytest.raises(StateError, match="setup_loss_call"):
        gm.delegate_forward_and_backward(other)
    with pytest.raises(ConfigError, match="Module"):
        GradientMaker("model")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="callable"):
        gm.setup_model_call(x)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="callable"):
        gm.setup_loss_call("mse")  # type: ignore[arg-type]
    for method in (gm.setup_loss_repr, gm.setup_logits_repr):
        with pytest.raises(ConfigError, match="Tensor"):
            method(classes())  # type: ignore[arg-type]
