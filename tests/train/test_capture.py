"""What capture delivers, against per-sample gradients; and what it must leave alone.

Models run in float64; what is delivered is float32, so factors agree to 1e-6 of their largest
entry."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
from capture_harness import (
    ConvNet,
    Harness,
    TokenNet,
    assert_same_totals,
    batch,
    cross_entropy,
    oracle_factors,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from distcurv.errors import CaptureError, ConfigError, ShapeError

FLOAT32 = 1e-6


@pytest.fixture(autouse=True)
def _seeded_and_no_hook_left() -> object:
    torch.manual_seed(0)
    yield
    assert not torch_module._global_forward_hooks


def make(kind: type[nn.Module], bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return kind(bias).double()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("encoding", ["sketch", "dense"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [ConvNet, TokenNet])
def test_factors_equal_per_sample_gradients(
    kind: type[nn.Module],
    bias: bool,
    reduction: str,
    weight_sharing: str,
    encoding: str,
    accumulation: int,
) -> None:
    model = make(kind, bias)
    harness = Harness(
        model,
        encoding=encoding,
        loss_reduction=reduction,
        accumulation=accumulation,
        weight_sharing=weight_sharing,
    )
    inputs, targets = batch(model, 4 * accumulation)
    loss = cross_entropy(reduction)
    with harness.capture.armed(harness.bases, harness.sink):
        for x, y in zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True):
            (loss(model(x), y) / accumulation).backward()
    # The loss of one sample alone: its mean over positions, or its sum.
    expected = oracle_factors(model, harness.modules, inputs, targets, loss, weight_sharing)
    for (name, side), factor in expected.items():
        harness.assert_factor(name, side, factor, FLOAT32)
    assert harness.deliveries == dict.fromkeys(harness.modules, accumulation)
    positions = 9 if kind is ConvNet else 3
    first = next(iter(harness.modules))
    expanded = positions if weight_sharing == "expand" else 1
    assert harness.count(first, "A") == 4 * accumulation * expanded
    assert harness.count(first, "G") == 4 * accumulation


def test_micro_batches_of_different_sizes_add_up_for_a_summed_loss() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 7)
    loss = cross_entropy("sum")
    whole = Harness(model, loss_reduction="sum")
    with whole.capture.armed(whole.bases, whole.sink):
        loss(model(inputs), targets).backward()
    parts = Harness(model, loss_reduction="sum")
    with parts.capture.armed(parts.bases, parts.sink):
        for x, y in zip(inputs.split([1, 0, 4, 2]), targets.split([1, 0, 4, 2]), strict=True):
            loss(model(x), y).backward()
    assert_same_totals(whole.totals, parts.totals, FLOAT32)
    assert set(parts.deliveries.values()) == {3}


def test_gradients_and_outputs_are_bit_identical_with_capture() -> None:
    model = ConvNet()
    inputs, targets = batch(model, 5)

    def run() -> list[Tensor]:
        model.zero_grad()
        output = model(inputs)
        F.cross_entropy(output, targets).backward()
        return [output.detach().clone()] + [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]

    before = run()
    harness = Harness(model, encoding="sketch")
    with harness.capture.armed(harness.bases, harness.sink):
        during = run()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_counts_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = make(ConvNet)
    inputs, targets = batch(model, 5)
    inputs.requires_grad_(True)
    loss = cross_entropy("mean")
    plain, checkpointed = Harness(model), Harness(model)
    with plain.capture.armed(plain.bases, plain.sink):
        loss(model(inputs), targets).backward()
    with checkpointed.capture.armed(checkpointed.bases, checkpointed.sink):
        loss(checkpoint(model, inputs, use_reentrant=reentrant), targets).backward()
    assert set(checkpointed.deliveries.values()) == {1}
    assert_same_totals(plain.totals, checkpointed.totals, FLOAT32)


def test_what_does_not_count() -> None:
    """no_grad, inference_mode, a forward without backward, the second backward of one graph."""
    model = make(TokenNet)
    inputs, targets = batch(model, 5)
    loss = cross_entropy("mean")
    harness = Harness(model)
    harness.arm()
    with torch.no_grad():
        model(inputs)
    with torch.inference_mode():
        model(inputs)
    model(inputs)
    assert not harness.totals
    kept = loss(model(inputs), targets)
    kept.backward(retain_graph=True)
    once = copy.deepcopy(harness.totals)
    kept.backward()
    assert_same_totals(once, harness.totals, 0.0)
    assert harness.count("head", "G") == 5
    assert harness.capture.finish() == frozenset()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("last", ["plain", "create_graph", "none"])
def test_a_gradient_penalty_counts_once_with_the_whole_losss_gradient(
    last: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(TokenNet)
    harness = Harness(model)
    inputs, targets = batch(model, 5)
    inputs.requires_grad_(True)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        output = model.head(hidden.tanh())
        (slope,) = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return output, cross_entropy("mean")(output, targets) + slope.square().mean()

    with harness.capture.armed(harness.bases, harness.sink):
        _, whole = loss(model.first(inputs))
        if last != "none":
            whole.backward(create_graph=last == "create_graph")
    if last != "plain":
        assert not harness.totals
        assert "create_graph=True" in caplog.text
        return
    assert not caplog.text
    hidden = model.first(inputs)
    output, whole = loss(hidden)
    for name, g in zip(
        ("first", "head"), torch.autograd.grad(whole, [hidden, output]), strict=True
    ):
        rows = 5 * g.flatten(0, -2)
        harness.assert_factor(name, "G", rows.T @ rows / 5, FLOAT32)
    assert harness.deliveries == {"first": 1, "head": 1}


def test_a_backward_after_disarm_or_in_the_next_arming_does_not_count() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 5)
    harness = Harness(model)
    harness.arm()
    late = cross_entropy("mean")(model(inputs), targets)
    harness.capture.disarm()
    harness.capture.disarm()
    harness.arm()
    late.backward()
    assert harness.capture.finish() == {"first", "head"}
    cross_entropy("mean")(model(inputs), targets).backward()
    assert not harness.totals


def test_the_runs_of_a_module_that_runs_twice_are_positions_of_the_same_samples() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(x).tanh())

    model = Twice().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    harness = Harness(model, loss_reduction="sum")
    with harness.capture.armed(harness.bases, harness.sink):
        model(x).square().sum().backward()
    first = model.shared(x)
    hidden = first.tanh()
    second = model.shared(hidden)
    grads = torch.autograd.grad(second.square().sum(), [first, second])
    ones = torch.ones(4, 1, dtype=torch.float64)
    a = torch.cat([torch.cat([x, ones], 1), torch.cat([hidden, ones], 1)])
    g = torch.cat(grads)
    assert harness.deliveries == {"shared": 1}
    harness.assert_factor("shared", "A", a.T @ a / 8, FLOAT32)
    harness.assert_factor("shared", "G", g.T @ g / 4, FLOAT32)


def test_in_place_operations_through_a_view_do_not_change_what_is_seen() -> None:
    class InPlace(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.linear, self.in_place = nn.Linear(3, 4), in_place

        def forward(self, x: Tensor) -> Tensor:
            out = self.linear(x)
            if not self.in_place:
                return torch.cat([out[:, :2] * 15, (out[:, 2:] * 3).relu()], dim=1)
            out[:, :2].mul_(5)
            out = out.view(-1).view(5, 4)
            out.mul_(3)
            out[:, 2:].relu_()
            return out

    x = torch.randn(5, 3, dtype=torch.float64)
    totals = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = InPlace(in_place).double()
        harness = Harness(model)
        with harness.capture.armed(harness.bases, harness.sink):
            model(x).square().mean().backward()
        totals.append(harness.totals)
    assert_same_totals(*totals, FLOAT32)


def test_users_hooks_that_replace_the_output_and_keyword_inputs() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = Harness(model)
    with plain.capture.armed(plain.bases, plain.sink):
        (model(x) * 2).square().sum().backward()
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    hooked = Harness(model)
    with hooked.capture.armed(hooked.bases, hooked.sink):
        model[0](input=x).square().sum().backward()
    handle.remove()
    assert_same_totals(plain.totals, hooked.totals, FLOAT32)


def test_autocast_statistics_are_float32_products_of_what_the_layer_saw() -> None:
    """bf16 rounds activations and gradients to 2^-9; sums of 30 rows stay within 2 %."""
    model = TokenNet()
    inputs, targets = batch(model, 10)
    loss = cross_entropy("mean")
    exact, autocast = Harness(model), Harness(model)
    with exact.capture.armed(exact.bases, exact.sink):
        loss(model(inputs), targets).backward()
    with autocast.capture.armed(autocast.bases, autocast.sink):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(inputs), targets)
        value.backward()
    assert_same_totals(exact.totals, autocast.totals, 0.02)
    # The first layer's input was float32: its products must not have been rounded at all.
    ours, theirs = autocast.totals["first"], exact.totals["first"]
    assert torch.equal(ours["A.packed"], theirs["A.packed"])


def test_the_loss_scale_of_amp_is_undone_and_an_overflow_contributes_nothing() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 6)
    loss = cross_entropy("mean")
    plain = Harness(model)
    with plain.capture.armed(plain.bases, plain.sink):
        loss(model(inputs), targets).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = Harness(model, grad_scaler=scaler)
    with scaled.capture.armed(scaled.bases, scaled.sink):
        scaler.scale(loss(model(inputs), targets)).backward()
    assert_same_totals(plain.totals, scaled.totals, FLOAT32)
    assert scaled.capture.nonfinite == 0
    with scaled.capture.armed(scaled.bases, scaled.sink):
        (scaler.scale(loss(model(inputs), targets)) * torch.inf).backward()
    assert_same_totals(plain.totals, scaled.totals, FLOAT32)
    assert scaled.capture.nonfinite == len(scaled.modules)

    off = Harness(model, grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    with off.capture.armed(off.bases, off.sink):
        loss(model(inputs), targets).backward()
    assert_same_totals(plain.totals, off.totals, FLOAT32)


@pytest.mark.gpu
@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_a_cuda_model_under_fp16_autocast_and_a_scaler(fisher_type: str) -> None:
    """fp16 rounds to 2^-11; against the same on the CPU in float32, within 2 %."""
    totals = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        model = ConvNet().to(device)
        inputs, targets = (tensor.to(device) for tensor in batch(model, 8))
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=device == "cuda")
        harness = Harness(model, fisher_type=fisher_type, grad_scaler=scaler)
        with harness.capture.armed(harness.bases, harness.sink):
            with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
                logits = model(inputs)
                if fisher_type == "mc":
                    harness.capture.sample(logits, "categorical", 2)
                loss = cross_entropy("mean")(logits, targets)
            scaler.scale(loss).backward()
        assert harness.capture.nonfinite == 0
        totals.append(
            {
                name: {k: v.cpu() for k, v in tensors.items()}
                for name, tensors in harness.totals.items()
            }
        )
    if fisher_type == "empirical":
        assert_same_totals(*totals, 0.02)
    for left, right in zip(*(t.values() for t in totals), strict=True):
        assert (left["A.packed"] - right["A.packed"]).abs().max() <= 0.02 * left["A.packed"].max()


def test_a_non_finite_input_contributes_zeros_to_both_sides() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 4)
    inputs[1, 0, 0] = torch.nan
    harness = Harness(model)
    with harness.capture.armed(harness.bases, harness.sink):
        cross_entropy("mean")(model(inputs), targets).backward()
    for tensors in harness.totals.values():
        assert all(not tensor.any() for tensor in tensors.values())
    assert harness.capture.nonfinite == 2


def test_only_the_named_blocks_are_captured_and_silent_ones_are_told() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen_run = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.frozen_run(x)
            return self.used(x)

    model = Branches()
    harness = Harness(model)
    harness.arm()
    model(torch.randn(4, 3)).sum().backward()
    assert harness.capture.finish() == {"unused", "frozen_run"}
    assert harness.deliveries == {"used": 1, "unused": 0, "frozen_run": 0}

    net = make(TokenNet)
    some = Harness(net)
    inputs, targets = batch(net, 4)
    with some.capture.armed({"head": some.bases["head"]}, some.sink):
        cross_entropy("mean")(net(inputs), targets).backward()
    assert list(some.totals) == ["head"]
    assert some.capture.finish() == frozenset()


def hooks_of(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(m.__dict__[t]) for m, t in itertools.product(model.modules(), tables))


def test_no_hook_outlives_disarm_an_exception_or_a_failed_arm() -> None:
    model = make(TokenNet)
    inputs, _ = batch(model, 4)
    harness = Harness(model, encoding="sketch")
    harness.arm()
    assert harness.capture.is_armed
    assert len(torch_module._global_forward_hooks) == 1
    with pytest.raises(CaptureError, match="already armed"):
        harness.arm()
    harness.capture.disarm()
    assert not harness.capture.is_armed
    assert not torch_module._global_forward_hooks

    missing = {**harness.bases, "head": {"A.U": harness.bases["head"]["A.U"]}}
    with pytest.raises(CaptureError, match=r"head.*G\.U"):
        harness.capture.arm(missing, harness.sink)
    with pytest.raises(CaptureError, match="no block 'tail'"):
        harness.capture.arm({"first": harness.bases["first"], "tail": {}}, harness.sink)
    assert not harness.capture.is_armed
    assert not torch_module._global_forward_hooks

    with pytest.raises(ZeroDivisionError), harness.capture.armed(harness.bases, harness.sink):
        model(inputs)
        raise ZeroDivisionError
    assert not torch_module._global_forward_hooks
    assert hooks_of(model) == 0


def test_a_model_copied_or_saved_while_armed_carries_nothing() -> None:
    model = ConvNet()
    inputs, targets = batch(model, 4)
    pristine = io.BytesIO()
    torch.save(model, pristine)
    harness = Harness(model)
    harness.arm()
    assert hooks_of(model) == 0
    armed = io.BytesIO()
    torch.save(model, armed)
    assert len(armed.getvalue()) == len(pristine.getvalue())
    F.cross_entropy(copy.deepcopy(model)(inputs), targets).backward()
    assert not harness.totals
    assert harness.capture.finish() == {"conv", "head"}


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_a_forgotten_capture_removes_itself_and_frees_graphs(fisher_type: str) -> None:
    """Also while forwards wait for a backward that never comes."""
    model = make(TokenNet)
    inputs, _ = batch(model, 4)
    harness = Harness(model, fisher_type=fisher_type)
    harness.arm()
    hidden = []
    handle = model.first.register_forward_hook(lambda m, a, out: hidden.append(weakref.ref(out)))
    model(inputs)
    handle.remove()
    forgotten = weakref.ref(harness.capture)
    del harness
    gc.collect()
    assert forgotten() is None
    assert not torch_module._global_forward_hooks
    assert hidden[0]() is None


def test_inputs_without_a_batch_dimension_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    harness = Harness(model)
    with (
        pytest.raises(CaptureError, match="batch"),
        harness.capture.armed(harness.bases, harness.sink),
    ):
        model(torch.randn(3))


def test_nested_tensors_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    harness = Harness(model)
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    refused = pytest.raises(CaptureError, match="block '0' got a nested tensor")
    with harness.capture.armed(harness.bases, harness.sink), refused:
        model(nested)


def test_bad_settings_are_refused_at_once() -> None:
    model = make(TokenNet)
    for settings in (
        {"loss_reduction": "none"},
        {"fisher_type": "ggn"},
        {"weight_sharing": "both"},
        {"accumulation": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Harness(model, **settings)
    harness = Harness(model)
    block = harness.capture.blocks["head"]
    spec = harness.specs["first"]
    with pytest.raises(ShapeError, match=r"'head'.*dimensions"):
        type(harness.capture)({"head": (block.module, block.layer, spec)})
