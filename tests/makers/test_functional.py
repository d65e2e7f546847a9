"""The derivatives of a maker equal dense autograd in float64, and leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from dense_derivatives import fisher, flat, hessian, jacobian, row, sample_gradients, trained
from output_cases import CASES, N, T, classes, logits_of, make, plain_loss, plain_output
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distcurv.errors import ConfigError, ShapeError, StateError
from distcurv.makers import GradientMaker

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tied(nn.Module):
    """The first and the last layer have one weight; the bias of the second is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(3, 4, bias=False)
        self.last.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x))))[:, :3])
        return out


class Tokens(nn.Module):
    """Embedding, attention with PyTorch's fused kernel, layer norm, classes of the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x)).unsqueeze(1)
        h = F.scaled_dot_product_attention(h, h, h).squeeze(1)
        out: Tensor = self.head(h.mean(1))
        return out


def conv(train: bool) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten(), nn.Linear(8, 4)
    )
    return model.train(train)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(N, 3)),
    "tied and frozen": lambda: (Tied(), torch.randn(N, 3)),
    "conv, batch norm in eval": lambda: (conv(False), torch.randn(N, 1, 5, 5)),
    "conv, batch norm in train": lambda: (conv(True), torch.randn(N, 1, 5, 5)),
    "tokens": lambda: (Tokens(), torch.randint(0, 7, (N, T))),
    "linear in its parameters": lambda: (nn.Linear(3, 4), torch.randn(N, 3)),
}
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


class Rig:
    """A model, its maker, and a check that nothing but the asked-for has changed."""

    def __init__(self, name: str, loss_type: str = "cross_entropy") -> None:
        torch.manual_seed(0)
        self.model, self.x = MODELS[name]()
        self.t = classes() if loss_type == "cross_entropy" else torch.randn(N, 4)
        self.loss_fn: Callable[[Tensor, Tensor], Tensor] = LOSSES[loss_type]
        self.gm = GradientMaker(self.model)
        y = self.gm.setup_model_call(self.model, self.x)
        self.gm.setup_loss_call(self.loss_fn, y, self.t)
        self.params = trained(self.model)
        self.tangents = tuple(torch.randn_like(p) for p in self.params)
        self.v = flat(self.tangents)
        self._before = {k: v.clone() for k, v in self.model.state_dict().items()}
        # The references run a copy, whose running statistics may change.
        self.plain = copy.deepcopy(self.model)
        self.plain_params = trained(self.plain)

    def loss(self) -> Tensor:
        # The fused attention kernel cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return self.loss_fn(self.plain(self.x), self.t)

    def assert_untouched(self) -> None:
        after = self.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in self._before.items())
        assert all(p.grad is None for p in self.model.parameters())


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_the_loss(name: str, loss_type: str) -> None:
    rig = Rig(name, loss_type)
    g = row(rig.loss(), rig.plain_params)
    H = hessian(rig.loss(), rig.plain_params)
    grads, output = rig.gm.loss_grad(return_output=True)
    torch.testing.assert_close(flat(grads), g, **TOLERANCE)
    torch.testing.assert_close(output, rig.plain(rig.x), **TOLERANCE)
    blocks = rig.gm.loss_hessian()
    for p, blocks_of in zip(rig.params, blocks, strict=True):
        for q, block in zip(rig.params, blocks_of, strict=True):
            assert block.shape == p.shape + q.shape
    dense = torch.cat(
        [
            torch.cat([b.reshape(p.numel(), -1) for b in blocks_of], 1)
            for p, blocks_of in zip(rig.params, blocks, strict=True)
        ]
    )
    torch.testing.assert_close(dense, H, **TOLERANCE)
    products = rig.gm.loss_hvp(rig.tangents, accumulate_grad=False)
    torch.testing.assert_close(flat(products), H @ rig.v, **TOLERANCE)
    rig.assert_untouched()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_the_logits(name: str, loss_type: str) -> None:
    rig = Rig(name, loss_type)
    logits = rig.plain(rig.x)
    J = jacobian(logits, rig.plain_params)
    parts = rig.gm.logit_jacobian()
    assert [part.shape for part in parts] == [logits.shape + p.shape for p in rig.params]
    got = torch.cat([part.reshape(logits.numel(), -1) for part in parts], 1)
    torch.testing.assert_close(got, J, **TOLERANCE)

    product, out = rig.gm.logit_jvp(rig.tangents, return_model_output=True)
    torch.testing.assert_close(product, (J @ rig.v).view_as(logits), **TOLERANCE)
    torch.testing.assert_close(out, logits.detach(), **TOLERANCE)

    u = torch.randn_like(logits)
    product, out = rig.gm.nvp(u, return_model_output=True)
    torch.testing.assert_close(product, (J @ J.T @ u.flatten()).view_as(logits), **TOLERANCE)
    torch.testing.assert_close(out, logits.detach(), **TOLERANCE)

    for size in (None, -1, 50):
        wanted = fisher(logits, J, loss_type, 50 if size == 50 else N) @ rig.v
        products = rig.gm.fvp(loss_type, size, rig.tangents)
        torch.testing.assert_close(flat(products), wanted, **TOLERANCE)
    products, out = rig.gm.fvp(loss_type, tangents=rig.tangents, return_model_output=True)
    torch.testing.assert_close(out, logits.detach(), **TOLERANCE)
    rig.assert_untouched()


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("in train")])
def test_gradients_of_single_samples(name: str) -> None:
    rig = Rig(name)
    wanted = sample_gradients(
        lambda n: rig.loss_fn(rig.plain(rig.x[n : n + 1]), rig.t[n : n + 1]), N, rig.plain_params
    )
    for chunk_size in (None, 4):
        parts = rig.gm.per_example_loss_grads(chunk_size)
        assert [part.shape for part in parts] == [(N, *p.shape) for p in rig.params]
        got = torch.cat([part.flatten(1) for part in parts], 1)
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    rig.assert_untouched()


def test_single_samples_do_not_exist_where_the_model_mixes_them() -> None:
    with pytest.raises(StateError, match=r"BatchNorm2d .*eval\(\)"):
        Rig("conv, batch norm in train").gm.per_example_loss_grads()
    # Without running statistics it mixes them always.
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    gm = GradientMaker(model)
    gm.setup_loss_repr(gm.setup_model_call(model, torch.randn(N, 4)).square().mean())
    with pytest.raises(StateError, match=r"BatchNorm1d 1 .*eval\(\)"):
        gm.per_example_loss_grads()


class Recurrent(nn.Module):
    """The last state of a GRU or LSTM, by a linear layer."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x)[0][:, -1])
        return out


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_gradients_of_single_samples_of_recurrent_layers(layer: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model, x, t = Recurrent(layer), torch.randn(N, T, 3), classes()
    gm = GradientMaker(model)
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), t)
    wanted = sample_gradients(
        lambda n: F.cross_entropy(model(x[n : n + 1]), t[n : n + 1]), N, trained(model)
    )
    got = torch.cat([part.flatten(1) for part in gm.per_example_loss_grads()], 1)
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_the_hessian_where_torch_cannot_batch_the_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh())
    x = torch.randn(2, 2, 4)
    gm = GradientMaker(model)
    gm.setup_loss_repr(gm.setup_model_call(model, x).square().mean())
    blocks = gm.loss_hessian()
    sizes = [p.numel() for p in trained(model)]
    rows = [
        torch.cat([part.reshape(size, -1) for part in row_of], 1)
        for size, row_of in zip(sizes, blocks, strict=True)
    ]
    H = hessian(model(x).square().mean(), trained(model))
    torch.testing.assert_close(torch.cat(rows), H, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_every_documented_output(name: str) -> None:
    case = CASES[name]
    model, x, t = make(case)
    params = trained(model)
    gm = GradientMaker(model)
    case.setup(gm, model, x, t)
    tangents = tuple(torch.randn_like(p) for p in params)
    v = flat(tangents)
    g = row(plain_loss(case, model, x, t), params)
    H = hessian(plain_loss(case, model, x, t), params)
    logits = logits_of(plain_output(case, model, x, t))
    J = jacobian(logits, params)
    G = fisher(logits, J, "cross_entropy", len(logits))
    per_sample = sample_gradients(
        lambda n: plain_loss(case, model, x[n : n + 1], t[n : n + 1]), N, params
    )

    torch.testing.assert_close(flat(gm.loss_grad()), g, **TOLERANCE)
    output = gm.loss_grad(return_output=True)[1]
    torch.testing.assert_close(logits_of(output), logits, **TOLERANCE)
    samples = torch.cat([part.flatten(1) for part in gm.per_example_loss_grads()], 1)
    torch.testing.assert_close(samples, per_sample, **TOLERANCE)
    of_all = samples.mean(0) if case.mean else samples.sum(0)
    torch.testing.assert_close(of_all, g, **TOLERANCE)
    blocks = gm.loss_hessian()
    torch.testing.assert_close(blocks[0][0].reshape(20, 20), H[:20, :20], **TOLERANCE)
    products = gm.loss_hvp(tangents, accumulate_grad=False)
    torch.testing.assert_close(flat(products), H @ v, **TOLERANCE)
    found = torch.cat([part.reshape(len(J), -1) for part in gm.logit_jacobian()], 1)
    torch.testing.assert_close(found, J, **TOLERANCE)
    torch.testing.assert_close(gm.logit_jvp(tangents).flatten(), J @ v, **TOLERANCE)
    torch.testing.assert_close(flat(gm.fvp("cross_entropy", tangents=tangents)), G @ v, **TOLERANCE)
    u = torch.randn_like(logits)
    found = gm.nvp(u.reshape(gm.run_logits().shape)).flatten()
    torch.testing.assert_close(found, J @ J.T @ u.flatten(), **TOLERANCE)
    again = gm.nvp((u.reshape(gm.run_logits().shape),)).flatten()  # as ASDL takes it
    assert torch.equal(again, found)
    assert all(p.grad is None for p in params)


def test_the_product_with_the_hessian_adds_the_gradient_when_asked() -> None:
    rig = Rig("mlp")
    g = row(rig.loss(), rig.plain_params)
    rig.gm.loss_hvp(rig.tangents)
    rig.gm.loss_hvp()
    torch.testing.assert_close(flat([p.grad for p in rig.params if p.grad is not None]), 2 * g)


def test_random_directions_differ() -> None:
    rig = Rig("mlp")
    for product in (rig.gm.logit_jvp, rig.gm.nvp):
        assert not torch.equal(product(), product())
    assert not torch.equal(rig.gm.fvp("mse")[0], rig.gm.fvp("mse")[0])


def test_dropout_draws_once_for_a_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    x = torch.randn(N, 3)
    gm = GradientMaker(model)
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), classes())
    torch.manual_seed(1)
    H = hessian(F.cross_entropy(model(x), classes()), trained(model))
    torch.manual_seed(1)
    blocks = gm.loss_hessian()
    torch.testing.assert_close(blocks[0][0].reshape(24, 24), H[:24, :24], **TOLERANCE)


def test_an_lstm() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 2, batch_first=True)
    x = torch.randn(2, T, 3)
    gm = GradientMaker(model)
    gm.setup_loss_repr(gm.setup_model_call(model, x)[0].square().mean())
    H = hessian(model(x)[0].square().mean(), trained(model))
    v = tuple(torch.randn_like(p) for p in trained(model))
    products = gm.loss_hvp(v, accumulate_grad=False)
    torch.testing.assert_close(flat(products), H @ flat(v), **TOLERANCE)


@pytest.mark.parametrize("recurrent", [True, False])
def test_cudnn_which_cannot_be_differentiated_twice_runs_no_recurrent_layer(
    recurrent: bool,
) -> None:
    """Needs no GPU: whether it is on is asked on any machine."""
    layer = nn.GRU(3, 2, batch_first=True) if recurrent else nn.Linear(3, 2)
    seen: list[bool] = []
    layer.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    gm = GradientMaker(nn.Sequential(layer))
    y = gm.setup_model_call(gm.model, torch.randn(2, T, 3))
    gm.setup_loss_repr((y[0] if recurrent else y).square().mean())
    before = torch.backends.cudnn.enabled
    gm.loss_hvp()
    gm.forward_and_backward()
    assert torch.backends.cudnn.enabled == before
    assert seen == [before and not recurrent, before]


def test_a_compiled_model() -> None:
    rig = Rig("mlp")
    compiled = torch.compile(rig.model, backend="eager")
    gm = GradientMaker(compiled)
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(compiled, rig.x), rig.t)
    torch.testing.assert_close([*gm.loss_grad()], [*rig.gm.loss_grad()])
    torch.testing.assert_close(
        [*gm.loss_hvp(rig.tangents, False)], [*rig.gm.loss_hvp(rig.tangents, False)]
    )
    assert len(gm.per_example_loss_grads()) == len(rig.params)


# -- samples in the arguments -------------------------------------------------------------


class Pair(nn.Module):
    """Inputs in containers, with the batch in a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, batch: dict[str, Tensor], scale: Tensor, *, mask: Tensor) -> Tensor:
        out: Tensor = self.linear(batch["a"] + batch["b"]) * scale + mask
        return out


def pair() -> tuple[GradientMaker, Tensor]:
    """A maker of Pair, and the gradients of its samples [N, P] by a loop."""
    torch.manual_seed(0)
    model = Pair()
    a, b, mask = torch.randn(N, 3), torch.randn(N, 3), torch.randn(4, N)
    scale, w, t = torch.randn(4), torch.rand(4), classes()

    def loss(n: slice) -> Tensor:
        y = model({"a": a[n], "b": b[n]}, scale, mask=mask[:, n].T)
        return F.cross_entropy(y, t[n], w)

    wanted = sample_gradients(lambda n: loss(slice(n, n + 1)), N, trained(model))
    gm = GradientMaker(model)
    y = gm.setup_model_call(
        lambda batch, scale, mask: model(batch, scale, mask=mask.T), {"a": a, "b": b}, scale, mask
    )
    gm.setup_loss_call(F.cross_entropy, y, t, weight=w)
    return gm, wanted


def test_what_has_a_batch_dimension_is_said_by_argument() -> None:
    gm, wanted = pair()
    gm.setup_model_vmap_info(0, None, 1)
    gm.setup_loss_vmap_info(None, 0, weight=None)
    parts = gm.per_example_loss_grads()
    torch.testing.assert_close(torch.cat([p.flatten(1) for p in parts], 1), wanted, **TOLERANCE)
    gm.setup_model_vmap_info(-2, None, -1)
    parts = gm.per_example_loss_grads()
    torch.testing.assert_close(torch.cat([p.flatten(1) for p in parts], 1), wanted, **TOLERANCE)


def test_arguments_that_cannot_be_cut_are_told() -> None:
    gm, _ = pair()
    with pytest.raises(ShapeError, match=r"model call has .*\(4,\).*setup_model_vmap_info"):
        gm.per_example_loss_grads()
    gm.setup_model_vmap_info(0, None, 1)
    with pytest.raises(ShapeError, match=r"loss call has .*\(4,\).*setup_loss_vmap_info"):
        gm.per_example_loss_grads()
    gm.setup_model_vmap_info(0, 2, 1)
    with pytest.raises(ShapeError, match="batch dimension 2"):
        gm.per_example_loss_grads()
    gm.setup_model_vmap_info(0, None)
    with pytest.raises(ConfigError, match="2 arguments"):
        gm.per_example_loss_grads()
    gm.setup_model_vmap_info(None, None, None)
    with pytest.raises(ConfigError, match="no tensor with a batch dimension"):
        gm.per_example_loss_grads()
    with pytest.raises(ConfigError, match="integer or None"):
        gm.setup_model_vmap_info("0")  # type: ignore[arg-type]


def test_wrong_directions_and_losses_are_told() -> None:
    rig = Rig("mlp")
    with pytest.raises(ShapeError, match="trained parameters"):
        rig.gm.loss_hvp(rig.tangents[:1])
    with pytest.raises(ShapeError, match="cotangents"):
        rig.gm.nvp(torch.zeros(3))
    with pytest.raises(ShapeError, match="2 cotangents"):
        rig.gm.nvp([torch.zeros(N, 3)] * 2)
    with pytest.raises(ConfigError, match="loss_type"):
        rig.gm.fvp("hinge")
    y = rig.gm.setup_model_call(rig.model, rig.x)
    rig.gm.setup_logits_repr(y.flatten())
    with pytest.raises(ShapeError, match="setup_logits_repr"):
        rig.gm.fvp("mse")
    rig.gm.setup_logits_repr(y.size())
    with pytest.raises(ShapeError, match="setup_logits_repr"):
        rig.gm.logit_jvp()


def test_a_model_without_trained_parameters_has_no_derivatives() -> None:
    rig = Rig("mlp")
    rig.model.requires_grad_(False)
    for method in (rig.gm.loss_grad, rig.gm.per_example_loss_grads, rig.gm.logit_jacobian):
        with pytest.raises(StateError, match="no trained parameter"):
            method()
    assert rig.gm.call_model().shape == (N, 4)
