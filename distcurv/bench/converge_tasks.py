"""The trainings of `bench converge` and `bench staleness`: model, batches and loss, no optimizer.

All methods of a task see the same initial weights and the same batches in the same order, as pure
functions of (seed, step, rows), and are judged on the same fixed set.  A new task is one
`ConvergeTask` and one line in `TASKS`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distcurv.bench.step_models import AUTOENCODER_WIDTHS
from distcurv.demo import tasks as demo
from distcurv.errors import ConfigError

Batch = tuple[Tensor, Tensor]  # inputs, targets

CONTEXT = demo.CHARLM_CONTEXT
_EVAL_WINDOWS = 256
_EVAL_IMAGES = 1024


@dataclass(frozen=True)
class ConvergeTask:
    """One training problem, complete but for the optimizer.

    Attributes:
        unit: of the loss.
        steps: of a training, if nothing else is asked for.
        rows: loss terms in a batch that are averaged over: images, or tokens.
        rows_per_sample: of which so many belong to one sample; 64 tokens to a window.
        eval_every: steps between two points of a curve.
        stretch: methods that have not reached the target loss after ``steps`` get so many times
            the steps for it.
        build: seed → model with its initial weights.
        batch: (step, seed, samples) → inputs and targets.
        loss: (output, targets, reduction="mean") → loss; ``mean`` is over rows.
        evaluation: the fixed set, inputs and targets.
        not_hidden: names of the matrices that Muon leaves to AdamW: embeddings and the head.
    """

    unit: str
    steps: int
    rows: int
    rows_per_sample: int
    eval_every: int
    stretch: int
    build: Callable[[int], nn.Module]
    batch: Callable[[int, int, int], Batch]
    loss: Callable[..., Tensor]
    evaluation: Callable[[], Batch]
    not_hidden: frozenset[str] = frozenset()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The loss on the fixed set, as it is reported."""
        inputs, targets = on_device(self.evaluation(), next(model.parameters()).device)
        return float(self.loss(model(inputs), targets))


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """All tasks make their batches on the CPU, so that every device sees the same ones."""
    return batch[0].to(device), batch[1].to(device)


def _generator(*numbers: int) -> torch.Generator:
    """As the demo draws its batches, so that both see the same ones."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def half_squared_error(output: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """½‖output − target‖², summed over pixels; averaged over (``mean``) or summed over images."""
    total = 0.5 * (output - targets).square().sum()
    return total / len(targets) if reduction == "mean" else total


def next_character(output: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats; output [n, length, vocabulary] or [n·length, vocabulary]."""
    return F.cross_entropy(
        output.reshape(-1, output.shape[-1]), targets.reshape(-1), reduction=reduction
    )


# ---- autoencoders on scikit-learn's digits ------------------------------------------------------


def _rows_of(step: int, seed: int, samples: int, n: int) -> Tensor:
    """Which of n images are in a batch: without replacement within an epoch."""
    epoch, position = divmod(step, n // samples)
    order = torch.randperm(n, generator=_generator(seed, epoch))
    return order[position * samples : (position + 1) * samples]


def _digits_batch(step: int, seed: int, samples: int) -> Batch:
    images = demo.digits()
    rows = images[_rows_of(step, seed, samples, len(images))]
    return rows, rows


def _all_digits() -> Batch:
    """All 1,797 images: what is compared is optimisation, hence the training objective."""
    return demo.digits(), demo.digits()


@functools.cache
def _padded_digits() -> Tensor:
    """[1797, 32, 32]: 24×24 by bilinear interpolation, with a margin for shifts."""
    small = demo.digits().view(-1, 1, 8, 8)
    large = F.interpolate(small, size=(24, 24), mode="bilinear", align_corners=False)
    return F.pad(large, (4, 4, 4, 4))[:, 0]


def _shifted(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Images as [n, 784], each at a random one of 25 places of its 28×28 pixels."""
    shift = torch.randint(5, (2, len(rows)), generator=generator)
    places = shift[:, :, None] + torch.arange(28)
    cut = _padded_digits()[rows[:, None, None], places[0][:, :, None], places[1][:, None, :]]
    return cut.reshape(len(rows), 784)


def _large_batch(step: int, seed: int, samples: int) -> Batch:
    rows = _rows_of(step, seed, samples, len(_padded_digits()))
    images = _shifted(rows, _generator(seed, step, 1))
    return images, images


@functools.cache
def _large_evaluation() -> Batch:
    images = _shifted(torch.arange(_EVAL_IMAGES), _generator(0))
    return images, images


def _build_large(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(AUTOENCODER_WIDTHS):
            layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])


# ---- character language models on the standard library's source text ----------------------------


def _build_charlm(width: int, seed: int) -> nn.Module:
    """Four layers, four heads; weights and embeddings N(0, 0.02²), biases 0, as the demo's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = demo.CharLM(demo.CHARLM_VOCABULARY, CONTEXT, width, 4, 4)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return model


def _windows(codes: Tensor, starts: Tensor) -> Batch:
    rows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def _text_batch(step: int, seed: int, samples: int) -> Batch:
    codes = demo.standard_library()[: -demo.CHARLM_HELD_OUT]
    last = len(codes) - CONTEXT
    return _windows(codes, torch.randint(last, (samples,), generator=_generator(seed, step)))


@functools.cache
def _held_out_text() -> Batch:
    """Evenly spaced windows of the text's tail, which no batch contains."""
    codes = demo.standard_library()[-demo.CHARLM_HELD_OUT :]
    return _windows(codes, torch.linspace(0, len(codes) - CONTEXT - 1, _EVAL_WINDOWS).long())


_NOT_HIDDEN = frozenset({"token.weight", "position.weight", "head.weight"})

TASKS: Mapping[str, ConvergeTask] = {
    "digits": ConvergeTask(
        unit="half squared error per image",
        steps=1000,
        rows=256,
        rows_per_sample=1,
        eval_every=20,
        stretch=1,
        build=demo.TASKS["autoencoder"].build,
        batch=_digits_batch,
        loss=half_squared_error,
        evaluation=_all_digits,
    ),
    "charlm": ConvergeTask(
        unit="nats per character",
        steps=500,
        rows=16 * CONTEXT,
        rows_per_sample=CONTEXT,
        eval_every=25,
        stretch=1,
        build=functools.partial(_build_charlm, 256),
        batch=_text_batch,
        loss=next_character,
        evaluation=_held_out_text,
        not_hidden=_NOT_HIDDEN,
    ),
    "charlm-small": ConvergeTask(
        unit="nats per character",
        steps=400,
        rows=32 * CONTEXT,
        rows_per_sample=CONTEXT,
        eval_every=20,
        stretch=1,
        build=functools.partial(_build_charlm, 128),
        batch=_text_batch,
        loss=next_character,
        evaluation=_held_out_text,
        not_hidden=_NOT_HIDDEN,
    ),
    "autoencoder-big": ConvergeTask(
        unit="half squared error per image",
        steps=500,
        rows=256,
        rows_per_sample=1,
        eval_every=20,
        stretch=2,
        build=_build_large,
        batch=_large_batch,
        loss=half_squared_error,
        evaluation=_large_evaluation,
    ),
}


def require_data(tasks: Iterable[str]) -> None:
    """Raise `ConfigError` when the package that brings a task's images is not installed."""
    pictures = [name for name in tasks if TASKS[name].rows_per_sample == 1]
    if pictures and importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            f"--tasks has {', '.join(pictures)}, which needs scikit-learn: pip install "
            "'distcurv[bench]', or leave it out"
        )
