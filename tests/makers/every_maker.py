"""A row for every gradient maker: how it is made, what its gradient must be, what it takes.

`ROWS` is what `test_every_maker` goes through.  An oracle runs a maker on a tiny MLP and says what
it has left in ``.grad`` and what the definition says, dense and in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import batch_makers
import kfac_job
import quasi_newton_ranks
import torch
from kfac_oracle import doubled, factors, layers, matrix_of, solved
from kron_bfgs_reference import Reference, observe
from maker_models import batch_of, loss_of, made_gradients, model_of, plain_gradients
from optim.soap_oracle import DenseSoap, spread_gradients
from oracles import kronecker_solve, orthonormal
from quasi_newton_models import make_batch, make_model, move, one_step, raw_gradient
from shampoo_oracle import DenseShampoo
from test_fisher_shapes import groups, sample_gradients, taken
from torch import Tensor, nn

from distcurv import makers
from distcurv.curvature.deflation import deflated_eigenpairs
from distcurv.makers import PreconditionedGradientMaker, PreconditioningConfig

DAMPING = batch_makers.DAMPING
SOAP_EPS = 0.01
RANK = 3
Named = dict[str, Tensor]
Make = Callable[..., PreconditionedGradientMaker]  # (model, **settings of the config)
Outcome = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # (found, wanted)


@dataclass(frozen=True)
class Row:
    """One maker in one form.

    Attributes:
        maker: its class.
        options: keyword arguments beside model and config.
        oracle: runs it and says what there is and what there should be.
        served: whether its expensive part runs through the service.
        ema: ``average``, ``unread`` (documented so) or ``refused``.
        every_step: made anew of every batch: intervals are refused.
        ranks: the two-rank job that compares it with one rank on the joined batch: what that job
            makes of a bare model.
        settings: of its config.
        resumed: how far a resumed run may be off, relative; 0: bit for bit.
    """

    maker: type[PreconditionedGradientMaker]
    oracle: Callable[[Make], Outcome]
    ranks: Callable[[nn.Module], Any]
    options: Mapping[str, Any]
    served: bool = True
    ema: str = "average"
    every_step: bool = False
    settings: Mapping[str, Any] | None = None
    resumed: float = 0.0

    def make(self, model: nn.Module, **settings: Any) -> Any:
        """The maker over a model."""
        merged = {"damping": DAMPING, **(self.settings or {}), **settings}
        return self.maker(model, PreconditioningConfig(**merged), **self.options)


# -- oracles ------------------------------------------------------------------------------


def after(steps: int, expected: Callable[[nn.Module], Named]) -> Callable[[Make], Outcome]:
    """Some steps on one batch, the parameters standing still."""

    def run(make: Make) -> Outcome:
        model = model_of("mlp")
        gm = make(model)
        for _ in range(steps):
            found = made_gradients(gm, "mlp", 0)
        gm.close()
        return found, expected(model)

    return run


def _named(model: nn.Module, matrices: Named) -> Named:
    """Parameters from the matrices [O, I + 1] of layers."""
    made = {}
    for name, matrix in matrices.items():
        made[f"{name}.weight"], made[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1]
    return made


def _both_factors(model: nn.Module) -> Any:
    x, t = batch_of("mlp", 0)
    return factors(doubled(model), x.double(), lambda z: len(t) * loss_of(z, t), len(t))


def kronecker(model: nn.Module) -> Named:
    """((A + pi root I) (x) (G + root/pi I))^-1 g."""
    raw, both = plain_gradients(model, "mlp", 0), _both_factors(model)
    return _named(
        model,
        {
            name: solved(*both[name], matrix_of(module, raw, name), DAMPING)
            for name, module in layers(model).items()
        },
    )


def truncated(model: nn.Module) -> Named:
    """As `kronecker`, of each factor its leading eigenvectors alone, found by deflation."""
    raw, made = plain_gradients(model, "mlp", 0), {}
    for name, (A, G) in _both_factors(model).items():
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        kept = []
        for factor, own in ((A, DAMPING**0.5 * pi), (G, DAMPING**0.5 / pi)):
            d = len(factor)
            U, lam = deflated_eigenpairs(factor, orthonormal(d, min(RANK, d), seed=1))
            kept.append((U * lam) @ U.mT + own * torch.eye(d).double())
        g = matrix_of(layers(model)[name], raw, name)
        made[name] = kronecker_solve(*kept, g)
    return _named(model, made)


def eigenbasis(model: nn.Module) -> Named:
    """U_G [(U_G^T g U_A) / (S + damping)] U_A^T, S the mean of the samples' squares there."""
    raw, both = plain_gradients(model, "mlp", 0), _both_factors(model)
    rows, terms = sample_gradients(model, "mlp", 0)
    made = {}
    for name, module in layers(model).items():
        U_A, U_G = (torch.linalg.eigh(factor).eigenvectors for factor in both[name])
        inside = [U_G.mT @ matrix_of(module, row, name) @ U_A for row in rows]
        S = sum((one.square() for one in inside), torch.zeros(())) / terms
        made[name] = U_G @ ((U_G.mT @ matrix_of(module, raw, name) @ U_A) / (S + DAMPING)) @ U_A.mT
    return _named(model, made)


def fisher(shape: str, model: nn.Module) -> Named:
    """(F + damping I)^-1 g, for each group of parameters that shares a matrix."""
    raw = {name: grad.double() for name, grad in plain_gradients(model, "mlp", 0).items()}
    rows, terms = sample_gradients(model, "mlp", 0)
    made = {name: torch.zeros_like(grad) for name, grad in raw.items()}
    for group in groups(model, shape):
        v, g = torch.stack([taken(row, group) for row in rows]), taken(raw, group)
        done = torch.linalg.solve(v.mT @ v / terms + DAMPING * torch.eye(len(g)).double(), g)
        parts = done.split([raw[name][index].numel() for name, index in group])
        for (name, index), part in zip(group, parts, strict=True):
            made[name][index] = part.view_as(made[name][index])
    return made


def assigned(model: nn.Module) -> Named:
    """The first layer layer-wise, the last in its Kronecker form."""
    return fisher("layer_wise", model) | {
        name: grad for name, grad in kronecker(model).items() if name.startswith("2.")
    }


def shampoo(model: nn.Module) -> Named:
    """g times the roots of the summed statistics."""
    made = {}
    for name, grad in plain_gradients(model, "mlp", 0).items():
        dense = DenseShampoo(grad.shape, DAMPING)
        for _ in range(3):
            dense.take(grad)
        dense.update()
        made[name] = dense.direction(grad)
    return made


def soap(make: Make) -> Outcome:
    """Adam in the eigenbasis, of gradients whose eigenbasis is well determined."""
    model = nn.Linear(5, 5, bias=False)
    gm: Any = make(model)
    dense = DenseSoap(model.weight, lr=1.0, eps=SOAP_EPS, early=False)
    for grad in spread_gradients((5, 5), 6, seed=1):
        before = dense.weight.clone()
        dense.step(grad)
        model.zero_grad()
        gm.setup_loss_repr(gm.setup_model_call(lambda: (model.weight * grad).sum()))  # noqa: B023
        gm.forward_and_backward()
    gm.close()
    assert model.weight.grad is not None
    return {"weight": model.weight.grad}, {"weight": before - dense.weight}


def kron_bfgs(make: Make) -> Outcome:
    """H_g g H_a, both by damped updates on the pairs of three steps."""
    model = make_model("mlp")
    gm: Any = make(model)
    references = {layer: Reference(DAMPING, None) for layer in gm.covered}
    for at in range(3):
        batch = make_batch("mlp", at)
        seen, raw = observe(model, batch), raw_gradient(model, batch)
        one_step(gm, model, batch)
        matrices = {}
        for layer, reference in references.items():
            reference.step(seen[layer])
            g = torch.cat([raw[f"{layer}.weight"], raw[f"{layer}.bias"][:, None]], 1)
            matrices[layer] = reference.state["H_g"] @ g @ reference.state["H_a"]
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        move(model)
        for layer, later in observe(model, batch).items():
            references[layer].moved(later)
    wanted = _named(model, matrices)
    return {name: found[name] for name in wanted}, wanted


def least_squares(fitted: Callable[[Any], Tensor], make: Make) -> Outcome:
    """The fitting condition: P H^2 P -> I where H is known, that of a linear least squares."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.5, 1.0, 0.5]).double()
    t = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    gm: Any = make(model, damping=1e-7)
    gm.setup_loss_call(nn.functional.mse_loss, gm.setup_model_call(model, x), t)
    for step in torch.logspace(-0.5, -2.5, 800).tolist():
        gm.precond_lr = step
        gm.update_preconditioner()
    gm.forward_and_backward()
    values, basis = torch.linalg.eigh(torch.kron(torch.eye(2), x.mT @ x / 20))
    q = fitted(gm)
    (raw,) = torch.autograd.grad(nn.functional.mse_loss(model(x), t), [model.weight])
    assert model.weight.grad is not None
    found = {"P": q.mT @ q, "grad": model.weight.grad}
    made = (q.mT @ q @ raw.flatten()).view_as(raw)
    return found, {"P": basis @ torch.diag(1 / values) @ basis.mT, "grad": made}


def of_batch(name: str, make: Make) -> Outcome:
    """As `batch_makers` defines it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model, x, t = batch_makers.make("mlp")
        wanted = batch_makers.DEFINITIONS[name][1](model, x, t)
        return {"all": batch_makers.step_of(make(model), model, x, t)}, {"all": wanted}
    finally:
        torch.set_default_dtype(before)


# -- the table ----------------------------------------------------------------------------

EMP: dict[str, Any] = {"fisher_type": "fisher_emp"}


def _served_job(key: str) -> Callable[[nn.Module], Any]:
    return lambda model: kfac_job.MAKERS[key][1](model)


def _batch_job(key: str) -> Callable[[nn.Module], Any]:
    return lambda model: batch_makers.DEFINITIONS[key][0](model)


def _of_one_batch(maker: Any, name: str, **fields: Any) -> Row:
    return Row(maker, partial(of_batch, name), _batch_job(name), {}, served=False, **fields)


ROWS: dict[str, Row] = {
    "natural": Row(
        makers.NaturalGradientMaker, after(1, partial(fisher, "full")), _served_job("emp"), EMP
    ),
    "natural, by module": Row(
        makers.NaturalGradientMaker,
        after(1, assigned),
        _served_job("by module"),
        {**EMP, "fisher_shape": [("0", "layer_wise"), "kron_eigen"]},
    ),
    "kfac": Row(
        # The worker's factor is had back from the published inverse, to four digits.
        makers.KfacGradientMaker,
        after(1, kronecker),
        _served_job("dense"),
        EMP,
        resumed=1e-4,
    ),
    "kfac, eigen": Row(
        makers.KfacGradientMaker, after(1, kronecker), _served_job("eigen"), {**EMP, "eigen": True}
    ),
    "kfac, low rank": Row(
        makers.KfacGradientMaker,
        after(1, kronecker),
        _served_job("low-rank"),
        EMP,
        settings={"rank": 100},
    ),
    "kfac, power iteration": Row(
        makers.KfacGradientMaker,
        after(1, truncated),
        _served_job("low-rank"),
        EMP,
        settings={
            "rank": RANK,
            "max_itr": 60,
            "tolerance": 1e-6,
            "tail_in": "none",
            "tail_out": "none",
        },
    ),
    "kfac, swift": Row(
        makers.KfacGradientMaker,
        after(1, kronecker),
        _served_job("swift"),
        {**EMP, "swift": True},
        served=False,
    ),
    "ekfac": Row(makers.EkfacGradientMaker, after(3, eigenbasis), _served_job("ekfac"), EMP),
    "full": Row(
        makers.FullNaturalGradientMaker, after(1, partial(fisher, "full")), _served_job("full"), EMP
    ),
    "layer_wise": Row(
        makers.LayerWiseNaturalGradientMaker,
        after(1, partial(fisher, "layer_wise")),
        _served_job("layer-wise"),
        EMP,
    ),
    "unit_wise": Row(
        makers.UnitWiseNaturalGradientMaker,
        after(1, partial(fisher, "unit_wise")),
        _served_job("unit-wise"),
        EMP,
    ),
    "diag": Row(
        makers.DiagNaturalGradientMaker,
        after(1, partial(fisher, "diag")),
        _served_job("diag"),
        EMP,
    ),
    "emp": Row(
        makers.EmpNaturalGradientMaker, after(1, partial(fisher, "full")), _served_job("emp"), {}
    ),
    "shampoo": Row(makers.ShampooGradientMaker, after(3, shampoo), _served_job("shampoo"), {}),
    "soap": Row(makers.SoapGradientMaker, soap, _served_job("soap"), {"eps": SOAP_EPS}),
    "kron-bfgs": Row(
        makers.KronBfgsGradientMaker,
        kron_bfgs,
        quasi_newton_ranks.MAKERS["kron-bfgs"],
        {},
        served=False,
    ),
    "psgd": Row(
        makers.PsgdGradientMaker,
        partial(least_squares, lambda gm: gm.state["Q"]),
        quasi_newton_ranks.MAKERS["psgd"],
        {"precond_lr": 0.1},
        served=False,
        ema="unread",
    ),
    "kron-psgd": Row(
        makers.KronPsgdGradientMaker,
        partial(
            least_squares,
            lambda gm: torch.kron(gm.state["Linear.left"], gm.state["Linear.right"]),
        ),
        quasi_newton_ranks.MAKERS["kron-psgd"],
        {"precond_lr": 0.1},
        served=False,
        ema="unread",
    ),
    "seng": _of_one_batch(makers.SengGradientMaker, "seng", ema="refused"),
    "smw": _of_one_batch(makers.SmwEmpNaturalGradientMaker, "smw", ema="refused", every_step=True),
    "newton": _of_one_batch(makers.NewtonGradientMaker, "newton"),
    "curve ball": _of_one_batch(
        makers.CurveBallGradientMaker, "curve ball", ema="refused", every_step=True
    ),
}
