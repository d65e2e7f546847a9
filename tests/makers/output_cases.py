"""The five documented forms of a model's output, each as plain PyTorch and as set up in a maker.

N = 6 samples of 5 features, 3 classes; the last case has T = 4 tokens in each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distcurv.makers import GradientMaker

N, T = 6, 4


@dataclass
class Output:
    loss: Tensor
    logits: Tensor
    hidden: Tensor


class Network(nn.Module):
    """A small MLP with one of several forms of output; its loss is inside where it gets targets."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.fc1 = nn.Linear(5, 4)
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Any:
        hidden = torch.tanh(self.fc1(x))
        logits = self.fc2(hidden)
        if t is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, -2), t.flatten())
        match self.form:
            case "tuple":
                return logits, loss
            case "list":
                return [logits, loss]
            case "mapping":
                return {"loss": loss, "logits": logits, "hidden": hidden}
            case _:
                return Output(loss=loss, logits=logits, hidden=hidden)

    def score(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        """A method that is not forward."""
        out: Tensor = self(x) * factor
        return out


class Case(NamedTuple):
    """``setup(gm, call, x, t)`` sets a maker up; ``loss(output, t)`` is the plain loss of what
    ``call`` of a model returns."""

    form: str
    inside: bool
    targets: Callable[[], Tensor]
    tokens: bool
    setup: Callable[[GradientMaker, Any, Tensor, Tensor], None]
    loss: Callable[[Any, Tensor], Tensor]
    mean: bool = True


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 1, 0, 2])


def token_classes() -> Tensor:
    return (torch.arange(N * T) * 7 % 3).reshape(N, T)


def values() -> Tensor:
    return torch.linspace(-1, 1, N * 3).reshape(N, 3).to(torch.get_default_dtype())


def _tensor(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(call, x), t)


def _squared(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_call(nn.MSELoss(), gm.setup_model_call(call, x), target=t)


def _summed(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(call, x), t, reduction="sum")


def _sequence(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_repr(gm.setup_model_call(call, x, t)[1])


def _mapping(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_repr(gm.setup_model_call(call, x, t=t)["loss"])


def _dataclass(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_repr(gm.setup_model_call(call, x, t).loss)


def _operations(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    y = gm.setup_model_call(call, x)
    gm.setup_loss_call(F.cross_entropy, y.view(-1, y.size(-1)), t.view(-1), ignore_index=-1)
    gm.setup_logits_repr(y.view(-1, y.size(-1)))


def _arithmetic(gm: GradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    y = gm.setup_model_call(call, x, t)
    gm.setup_loss_repr(2 * y.loss + 0.1 * y.hidden.square().mean() + F.relu(y.logits).mean())


CASES = {
    "tensor": Case("tensor", False, classes, False, _tensor, F.cross_entropy),
    "tensor-mse": Case("tensor", False, values, False, _squared, F.mse_loss),
    "tensor-sum": Case(
        "tensor",
        False,
        classes,
        False,
        _summed,
        lambda y, t: F.cross_entropy(y, t, reduction="sum"),
        mean=False,
    ),
    "sequence": Case("tuple", True, classes, False, _sequence, lambda y, t: y[1]),
    "list": Case("list", True, classes, False, _sequence, lambda y, t: y[1]),
    "mapping": Case("mapping", True, classes, False, _mapping, lambda y, t: y["loss"]),
    "dataclass": Case("dataclass", True, classes, False, _dataclass, lambda y, t: y.loss),
    "operations": Case(
        "tensor",
        False,
        token_classes,
        True,
        _operations,
        lambda y, t: F.cross_entropy(y.view(-1, 3), t.view(-1), ignore_index=-1),
    ),
    "arithmetic": Case(
        "dataclass",
        True,
        classes,
        False,
        _arithmetic,
        lambda y, t: 2 * y.loss + 0.1 * y.hidden.square().mean() + F.relu(y.logits).mean(),
    ),
}


def make(case: Case, seed: int = 0) -> tuple[Network, Tensor, Tensor]:
    """(model, inputs, targets) in the default dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network(case.form)
        x = torch.randn(N, T, 5) if case.tokens else torch.randn(N, 5)
    return model, x, case.targets()


def plain_output(case: Case, model: nn.Module, x: Tensor, t: Tensor) -> Any:
    return model(x, t) if case.inside else model(x)


def plain_loss(case: Case, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return case.loss(plain_output(case, model, x, t), t)


def logits_of(output: Any) -> Tensor:
    """The logits of any of the outputs, [.., C] flattened to [N*T, C]."""
    if isinstance(output, dict):
        output = output["logits"]
    elif isinstance(output, tuple | list):
        output = output[0]
    elif isinstance(output, Output):
        output = output.logits
    return output.reshape(-1, output.shape[-1])
