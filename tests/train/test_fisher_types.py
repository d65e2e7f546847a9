"""The Fisher types against each other and against dense oracles by `torch.func`, in float64.

The oracle differentiates the logits in a layer's output (Jacobian J) and torch's own loss in the
logits (Hessian H): G = 1/M sum over samples, terms t and positions s of J_ts^T H_t J_ts.  What is
delivered is float32: 1e-6 of the largest entry.
"""

from __future__ import annotations

import pytest
import torch
from capture_harness import Harness
from loss_cases import CASES, LossCase, N, T, labels, numbers, seeded, true_count, true_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.train.likelihoods import Categorical, Gaussian

D, W = 3, 5
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Mixer(nn.Module):
    """[N, (T,) 3] to [N, (T,) 4]; where there are tokens, the output of ``first`` at each of them
    reaches the logits of all, as in an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, W)
        self.head = nn.Linear(W, 4, bias=False)
        self.register_buffer("mix", numbers(T, T, seed=20))

    def after(self, hidden: Tensor) -> Tensor:
        """The logits from the output of ``first``."""
        mixed = self.mix @ hidden if hidden.dim() == 3 else hidden
        return self.head(mixed.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.first(x))


def setting(case: LossCase) -> tuple[Mixer, Tensor]:
    torch.manual_seed(3)
    model = Mixer().double()
    shape = (N, T, D) if case.tokens else (N, D)
    return model, torch.randn(shape, generator=seeded(4), dtype=torch.float64)


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def oracle(case: LossCase, model: Mixer, x: Tensor) -> dict[str, Tensor]:
    """The mean factor G of each layer."""
    hidden = model.first(x).detach()
    with torch.no_grad():
        logits = model.after(hidden)
    size = logits.numel()
    H = true_hessian(case, logits)
    J = torch.func.jacrev(model.after)(hidden).reshape(size, -1, W)  # by position
    # Positions of a logit and the term it belongs to; H has nothing between two terms.
    width = logits.shape[-1] if case.kind == "categorical" else 1
    first = torch.zeros(W, W, dtype=torch.float64)
    head = torch.zeros(4, 4, dtype=torch.float64)
    for start in range(0, size, width):
        term = slice(start, start + width)
        first += torch.einsum("asi,ab,bsj->ij", J[term], H[term, term], J[term])
    blocks = H.view(size // 4, 4, size // 4, 4)
    head += torch.einsum("tatb->ab", blocks)
    count = true_count(case)
    return {"first": first / count, "head": head / count}


def captured(
    case: LossCase,
    model: Mixer,
    x: Tensor,
    fisher_type: str,
    reduction: str = "mean",
    times: int = 1,
    n_samples: int = 1,
) -> Harness:
    harness = Harness(model, fisher_type=fisher_type, loss_reduction=reduction, seed=7)
    with harness.capture.armed(harness.bases, harness.sink):
        for _ in range(times):
            logits = case.shaped(model(x))
            harness.capture.observe_loss(logits, case.targets, case.likelihood, n_samples)
            case.loss(logits, case.targets, reduction).backward()
    return harness


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each_case
def test_exact_equals_the_dense_gauss_newton_matrix(case: LossCase, reduction: str) -> None:
    model, x = setting(case)
    harness = captured(case, model, x, "exact", reduction, times=2)
    for name, expected in oracle(case, model, x).items():
        harness.assert_factor(name, "G", expected, 1e-6)
        assert harness.count(name, "G") == pytest.approx(2 * true_count(case).item(), rel=1e-6)
    A = rows(x)
    A = torch.cat([A, torch.ones_like(A[:, :1])], 1)
    harness.assert_factor("first", "A", A.T @ A / len(A), 1e-6)


def test_for_one_sample_the_product_of_the_sides_is_the_dense_matrix_of_the_weights() -> None:
    """One term and one position: nothing is approximated but float32."""
    torch.manual_seed(0)
    layer = nn.Linear(D, 4, bias=False).double()
    x, y = torch.randn(1, D, dtype=torch.float64), torch.tensor([2])
    J = torch.func.jacrev(lambda w: (x @ w.T).flatten())(layer.weight.detach()).reshape(4, -1)
    logits = layer(x).detach()
    H = torch.func.hessian(lambda z: F.cross_entropy(z, y))(logits).reshape(4, 4)
    harness = Harness(nn.Sequential(layer), fisher_type="exact")
    with harness.capture.armed(harness.bases, harness.sink):
        logits = layer(x)
        harness.capture.sample(logits, "categorical")
        F.cross_entropy(logits, y).backward()
    kron = torch.kron(harness.factor("0", "G"), harness.factor("0", "A")).double()
    torch.testing.assert_close(kron, J.T @ H @ J, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_samples", [1, 4])
@pytest.mark.parametrize(
    "name", ["weighted, smoothed, ignored, second", "weighted yes or no", "masked yes or no"]
)
def test_mc_has_the_exact_matrix_for_its_expectation(name: str, n_samples: int) -> None:
    """600 draws, fixed seed: within 5 standard errors, which are below half of the diagonal,
    however many of them a statistic has."""
    case = CASES[name]
    model, x = setting(case)
    harness = Harness(model, fisher_type="mc", seed=5)
    made = []
    for _ in range(600 // n_samples):
        harness.totals.clear()
        with harness.capture.armed(harness.bases, harness.sink):
            logits = case.shaped(model(x))
            harness.capture.sample(logits, case.likelihood, n_samples, targets=case.targets)
            case.loss(logits, case.targets, "mean").backward()
        made.append(harness.factor("first", "G"))
    assert harness.count("first", "G") == pytest.approx(true_count(case).item(), rel=1e-6)
    expected = oracle(case, model, x)["first"]
    stacked = torch.stack(made).double()
    standard_error = stacked.std(0) / len(made) ** 0.5
    assert ((stacked.mean(0) - expected).abs() <= 5 * standard_error).all()
    assert (5 * standard_error.diagonal() < 0.5 * expected.diagonal()).all()


@each_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_undoes_the_reduction_exactly(case: LossCase, reduction: str) -> None:
    """Against the gradients of the summed loss, over the count."""
    model, x = setting(case)
    harness = captured(case, model, x, "empirical", reduction)
    hidden = model.first(x)
    logits = model.after(hidden)
    loss = case.loss(case.shaped(logits), case.targets, "sum")
    for name, g in zip(("first", "head"), torch.autograd.grad(loss, [hidden, logits]), strict=True):
        expected = rows(g).T @ rows(g) / true_count(case)
        harness.assert_factor(name, "G", expected, 1e-6)
        assert harness.count(name, "G") == pytest.approx(true_count(case).item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_all_types_agree_in_scale(kind: str, reduction: str) -> None:
    """Tokens, nothing masked, targets of the data drawn from the model: within 5 standard errors
    over 200 batches, fixed seed."""
    model, x = setting(CASES["tokens"])
    likelihood = Categorical() if kind == "categorical" else Gaussian(0.5)
    with torch.no_grad():
        logits = model(x)
    generator = seeded(6)
    made: dict[str, list[Tensor]] = {"empirical": [], "mc": []}
    exact = None
    for _ in range(200):
        case = LossCase(
            kind,
            likelihood,
            CASES["tokens" if kind == "categorical" else "squares"].loss,
            likelihood.sample(logits, generator),
        )
        if exact is None:
            exact = captured(case, model, x, "exact", reduction).factor("head", "G")
        made["empirical"].append(
            captured(case, model, x, "empirical", reduction).factor("head", "G")
        )
    harness = Harness(model, fisher_type="mc", loss_reduction=reduction)
    for _ in range(200):
        harness.totals.clear()
        with harness.capture.armed(harness.bases, harness.sink):
            outputs = model(x)
            harness.capture.sample(outputs, likelihood)
            case.loss(outputs, case.targets, reduction).backward()
        made["mc"].append(harness.factor("head", "G"))
    for factors in made.values():
        stacked = torch.stack(factors)
        standard_error = stacked.std(0) / len(factors) ** 0.5
        assert ((stacked.mean(0) - exact).abs() <= 5 * standard_error).all()
        assert (5 * standard_error.diagonal() < 0.5 * exact.diagonal()).all()


def test_two_heads_add_up_each_with_its_own_number_of_terms() -> None:
    """The loss is the sum of two means, over 4 and over 12 terms."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x)
            return self.a(hidden[:, 0]), self.b(hidden)

    torch.manual_seed(1)
    model = Heads().double()
    x, y = torch.randn(N, T, 3, dtype=torch.float64), labels(N)
    singles = []
    for which in ((0,), (1,), (0, 1)):
        harness = Harness(model, fisher_type="exact")
        with harness.capture.armed(harness.bases, harness.sink):
            outputs = model(x)
            loss = F.cross_entropy(outputs[0], y) + outputs[1].square().mean()
            for head in which:
                kind = ("categorical", "gaussian")[head]
                harness.capture.sample(outputs[head], kind)
            loss.backward()
        singles.append(harness)
    one, other, both = singles
    expected = one.factor("body", "G") + other.factor("body", "G")
    both.assert_factor("body", "G", expected, 1e-6)
    both.assert_factor("a", "G", one.factor("a", "G"), 1e-6)
    both.assert_factor("b", "G", other.factor("b", "G"), 1e-6)
    assert both.count("body", "G") == both.count("a", "G") == 2 * N * T


def test_a_module_that_runs_twice_in_one_forward_adds_its_positions_and_counts_terms_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(x).tanh())

    torch.manual_seed(1)
    model = Twice().double()
    x = torch.randn(N, 3, dtype=torch.float64)
    harness = Harness(model, fisher_type="exact")
    with harness.capture.armed(harness.bases, harness.sink):
        out = model(x)
        harness.capture.sample(out, Gaussian(0.5))
        out.square().mean().backward()
    first = model.shared(x)
    second = model.shared(first.tanh())
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for k in range(3):
        for g in torch.autograd.grad(second[:, k].sum(), [first, second], retain_graph=True):
            expected += 2 * g.T @ g / (3 * N)
    harness.assert_factor("shared", "G", expected, 1e-6)
    assert harness.count("shared", "G") == 3 * N


def test_autocast_in_half_precision_keeps_the_exact_matrix() -> None:
    """fp16 rounds to 2^-11 and the terms are summed, so nothing underflows: within 2 %."""
    torch.manual_seed(3)
    model = Mixer().float()
    x = torch.randn(N, T, D, generator=seeded(4))
    case = CASES["ignored"]
    plain = captured(case, model, x, "exact")
    half = Harness(model, fisher_type="exact", grad_scaler=torch.amp.GradScaler("cpu"))
    with half.capture.armed(half.bases, half.sink):
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(x)
            assert logits.dtype == torch.float16
            half.capture.observe_loss(logits, case.targets, case.likelihood)
            loss = case.loss(logits.float(), case.targets, "mean")
        (65536.0 * loss).backward()
    for name in ("first", "head"):
        half.assert_factor(name, "G", plain.factor(name, "G"), 0.02)
    assert half.capture.nonfinite == 0
