"""How many terms the loss counted: told per micro-batch, and where it may be told.

Oracle: the gradients of the summed loss in the layers' outputs; what is delivered is float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from capture_harness import Harness, TokenNet, assert_same_totals, batch, oracle_factors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distcurv.errors import CaptureError, ConfigError
from distcurv.train.likelihoods import Categorical
from distcurv.train.terms import MicroBatches

FLOAT32 = 1e-6
SIZES = [2, 3, 1]


def make() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A model, and three micro-batches with different numbers of unmasked tokens."""
    torch.manual_seed(3)
    model = TokenNet().double()
    inputs, targets = batch(model, sum(SIZES))
    targets[0, 1:] = targets[4, 0] = -100
    return model, list(inputs.split(SIZES)), list(targets.split(SIZES))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def unmasked(targets: Tensor) -> int:
    return int((targets != -100).sum())


def expected(model: nn.Module, inputs: list[Tensor], targets: list[Tensor]) -> dict:
    """Mean factors of the joined batch over all unmasked tokens."""
    x, y = torch.cat(inputs), torch.cat(targets)
    modules = {name: getattr(model, name) for name in ("first", "head")}
    factors = oracle_factors(
        model,
        modules,
        x,
        y,
        lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"),
    )
    return {
        (name, side): factor if side == "A" else factor * len(x) / unmasked(y)
        for (name, side), factor in factors.items()
    }


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    """Both layers in checkpoints of their own, so that the backward has two nested ones."""
    assert isinstance(model, TokenNet)
    hidden = checkpoint(model.first, x.requires_grad_(True), use_reentrant=True)
    return checkpoint(lambda h: model.head(h.tanh()), hidden, use_reentrant=True)


def not_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("how", ["int", "tensor", "observe_loss"])
@pytest.mark.parametrize("forward", [plainly, reentrant, not_reentrant])
def test_accumulated_means_over_unmasked_tokens_equal_the_joined_batch(
    forward: Callable[[nn.Module, Tensor], Tensor], how: str
) -> None:
    model, inputs, targets = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    harness = Harness(model, accumulation=3, grad_scaler=scaler)
    with harness.capture.armed(harness.bases, harness.sink):
        for x, y in zip(inputs, targets, strict=True):
            logits = forward(model, x.clone())
            if how == "observe_loss":
                harness.capture.observe_loss(logits, y, "categorical")
            else:
                harness.capture.count_terms(unmasked(y) if how == "int" else (y != -100).sum())
            with torch.no_grad():
                model(x)  # an evaluation in between belongs to no backward
            scaler.scale(mean_loss(logits, y) / 3).backward()
    for (name, side), factor in expected(model, inputs, targets).items():
        harness.assert_factor(name, side, factor, FLOAT32)
        assert harness.count(name, "G") == unmasked(torch.cat(targets))
    assert harness.capture.terms == unmasked(torch.cat(targets))


def test_a_sum_over_all_micro_batches_divided_by_their_terms() -> None:
    model, inputs, targets = make()
    total = unmasked(torch.cat(targets))
    harness = Harness(model)
    with harness.capture.armed(harness.bases, harness.sink):
        for x, y in zip(inputs, targets, strict=True):
            logits = model(x)
            harness.capture.count_terms(unmasked(y), divisor=total)
            (mean_loss(logits, y) * unmasked(y) / total).backward()
    for (name, side), factor in expected(model, inputs, targets).items():
        harness.assert_factor(name, side, factor, FLOAT32)
        assert harness.count(name, "G") == total


def test_several_forwards_before_one_backward_each_with_its_own_number() -> None:
    model, inputs, targets = make()
    harness = Harness(model)
    with harness.capture.armed(harness.bases, harness.sink):
        losses = []
        for x, y in zip(inputs, targets, strict=True):
            logits = model(x)
            harness.capture.count_terms(unmasked(y))
            losses.append(mean_loss(logits, y))
        torch.stack(losses).sum().backward()
    for (name, side), factor in expected(model, inputs, targets).items():
        harness.assert_factor(name, side, factor, FLOAT32)
        assert harness.count(name, "G") == unmasked(torch.cat(targets))


@pytest.mark.parametrize("forward", [plainly, reentrant])
def test_one_number_holds_for_several_backwards_of_a_forward(
    forward: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = (nn.Linear(3, 3) for _ in range(3))

    torch.manual_seed(2)
    model = Heads().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    harness = Harness(model)
    with harness.capture.armed(harness.bases, harness.sink):
        if forward is reentrant:
            x.requires_grad_(True)
            a, b = (checkpoint(head, x, use_reentrant=True) for head in (model.a, model.b))
        else:
            a, b = model.a(x), model.b(x)
        harness.capture.count_terms(12)
        a.square().mean().backward()
        b.square().mean().backward()
    for name, out in (("a", a), ("b", b)):
        g = 2 * out.detach()
        harness.assert_factor(name, "G", g.T @ g / 12, FLOAT32)
        assert harness.count(name, "G") == 12


def test_what_one_micro_batch_was_told_is_forgotten_by_the_next() -> None:
    """Without a number the samples are the terms, as if none had ever been told."""
    model, inputs, targets = make()
    first, second, plain = Harness(model), Harness(model), Harness(model)
    with first.capture.armed(first.bases, first.sink):
        logits = model(inputs[0])
        first.capture.count_terms(unmasked(targets[0]))
        mean_loss(logits, targets[0]).backward()
    with plain.capture.armed(plain.bases, plain.sink):
        mean_loss(model(inputs[1]), targets[1]).backward()
    with second.capture.armed(second.bases, second.sink):
        logits = model(inputs[0])
        second.capture.count_terms(unmasked(targets[0]))
        mean_loss(logits, targets[0]).backward()
        before = {name: dict(tensors) for name, tensors in second.totals.items()}
        mean_loss(model(inputs[1]), targets[1]).backward()
    assert_same_totals(before, first.totals, 0.0)
    added = {
        name: {key: value - before[name][key] for key, value in tensors.items()}
        for name, tensors in second.totals.items()
    }
    assert_same_totals(plain.totals, added, 1e-5)
    assert second.capture.terms == unmasked(targets[0]) + len(inputs[1])


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("encoding", ["dense", "sketch"])
def test_a_micro_batch_without_terms_contributes_nothing(fisher_type: str, encoding: str) -> None:
    """Its loss is 0/0, and so are its gradients here."""
    model, inputs, targets = make()
    harness = Harness(model, fisher_type=fisher_type, encoding=encoding)
    nothing = torch.full_like(targets[0], -100)
    with harness.capture.armed(harness.bases, harness.sink):
        logits = model(inputs[0])
        harness.capture.observe_loss(logits, nothing, Categorical())
        (mean_loss(logits, nothing) * logits.sum()).backward()
    assert set(harness.deliveries.values()) == {1}
    for tensors in harness.totals.values():
        assert all(not tensor.any() for tensor in tensors.values())
    assert harness.capture.nonfinite == 0
    assert harness.capture.terms == 0


def test_the_number_is_told_between_forward_and_backward_once() -> None:
    model, inputs, targets = make()
    harness = Harness(model)
    capture = harness.capture
    capture.count_terms(3)  # nothing is due
    harness.arm()
    with pytest.raises(CaptureError, match="before any forward"):
        capture.count_terms(3)
    logits = model(inputs[0])
    for bad in (-1, True, float("nan"), "3", torch.ones(2), torch.ones((), dtype=torch.cfloat)):
        with pytest.raises(ConfigError, match="terms is"):
            capture.count_terms(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="divisor is -2"):
        capture.count_terms(3, divisor=-2)
    capture.count_terms(3)
    with pytest.raises(CaptureError, match="twice"):
        capture.count_terms(3)
    messages = []

    def tell(grad: Tensor) -> None:
        with pytest.raises(CaptureError, match="during a backward") as caught:
            capture.count_terms(3)
        messages.append(str(caught.value))

    logits.register_hook(tell)
    mean_loss(logits, targets[0]).backward()
    assert len(messages) == 1
    with pytest.raises(CaptureError, match="after the backward"):
        capture.count_terms(3)
    late = model(inputs[1])
    mean_loss(late, targets[1]).backward()
    with pytest.raises(CaptureError, match=r"after the backward.*between its forward"):
        capture.count_terms(3)
    capture.disarm()


def test_the_number_is_for_empirical() -> None:
    model, inputs, targets = make()
    for fisher_type in ("mc", "exact"):
        with pytest.raises(CaptureError, match=r"sample\(\) counts the terms"):
            Harness(model, fisher_type=fisher_type).capture.count_terms(3)

    class Bare:
        def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
            return targets[0]

        def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
            return logits.sum()

    with pytest.raises(ConfigError, match=r"Bare the methods count\("):
        Harness(model).capture.observe_loss(model(inputs[0]), targets[0], Bare())


def test_a_micro_batch_whose_backward_never_came_is_replaced() -> None:
    """As a reentrant checkpoint shows it: forwards without a graph only."""
    batches = MicroBatches()
    skipped = batches.of_forward(with_graph=False)
    batches.tell(3, None)
    current = batches.of_forward(with_graph=False)
    assert current is skipped
    batches.tell(5, None)
    batches.end(batches._current)
    assert batches.total() == 5
