"""The demo's two tasks: real data that every machine has once the package is installed.

Why this file exists: the comparison of distcurv with a tuned baseline is only worth something if
both see the same initial weights, the same batches in the same order and the same evaluation. So a
task is a value that makes all of these as pure functions of (seed, step, rank), and nothing here
knows which optimizer runs. The learning rates were tuned as `docs/decisions/0004` tells.

A new task is one `Task` and one line in `TASKS`.
"""

from __future__ import annotations

import functools
import itertools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One training problem, complete but for the optimizer.

    Attributes:
        name: the key in `TASKS`.
        unit: of the loss, as the demo prints it.
        default_steps: optimizer steps the learning rates were tuned for.
        global_batch: samples in a step, over all training ranks.
        baseline_lr: the best of `baseline_lr_grid` for AdamW with betas (0.9, 0.95).
        baseline_lr_grid: every learning rate that was tried for the baseline.
        distcurv_lr: learning rate of LowRankSOAP.
        weight_decay: decoupled, the same for both optimizers.
        build: seed → model with its initial weights.
        batches: (step, rank, world_size, seed) → this rank's share of the global batch.
        loss: (model, batch) → mean loss over the batch, a scalar with grad.
        evaluate: model → the loss as reported, on a fixed set, without grad.
    """

    name: str
    unit: str
    default_steps: int
    global_batch: int
    baseline_lr: float
    baseline_lr_grid: tuple[float, ...]
    distcurv_lr: float
    weight_decay: float
    build: Callable[[int], nn.Module]
    batches: Callable[[int, int, int, int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], float]


def shard(n: int, rank: int, world_size: int) -> slice:
    """This rank's part of a global batch of n samples; equal parts, a remainder is left out.

    Raises:
        ValueError: where a rank would get nothing, or the rank does not exist.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}: pass the training rank")
    if world_size > n:
        raise ValueError(f"{world_size} ranks cannot share a batch of {n}: start at most {n} ranks")
    size = n // world_size
    return slice(rank * size, (rank + 1) * size)


def _generator(*numbers: int) -> torch.Generator:
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


# ---- autoencoder: deep tanh autoencoder on scikit-learn's handwritten digits --------------------

AUTOENCODER_WIDTHS = (64, 128, 64, 32, 10, 32, 64, 128, 64)
AUTOENCODER_BATCH = 256


@functools.cache
def digits() -> Tensor:
    """The 1,797 images, [1797, 64] float32 in [0, 1].

    Raises:
        ImportError: without scikit-learn, naming the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the autoencoder task reads scikit-learn's digits, which is not installed: "
            "pip install 'distcurv[demo]', or choose --task charlm"
        ) from error
    return torch.from_numpy(load_digits().data).float() / 16.0


def _build_autoencoder(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for d_in, d_out in itertools.pairwise(AUTOENCODER_WIDTHS):
            layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def _autoencoder_batch(step: int, rank: int, world_size: int, seed: int) -> Batch:
    images = digits()
    epoch, position = divmod(step, len(images) // AUTOENCODER_BATCH)
    order = torch.randperm(len(images), generator=_generator(seed, epoch))
    rows = order[position * AUTOENCODER_BATCH : (position + 1) * AUTOENCODER_BATCH]
    return (images[rows[shard(AUTOENCODER_BATCH, rank, world_size)]],)


def pixel_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Sigmoid cross-entropy, summed over the pixels, averaged over the images."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def _autoencoder_loss(model: nn.Module, batch: Batch) -> Tensor:
    return pixel_loss(model(batch[0]), batch[0])


@torch.no_grad()
def _evaluate_autoencoder(model: nn.Module) -> float:
    """On all 1,797 images: what is compared is optimisation, hence the training objective."""
    return float(_autoencoder_loss(model, (digits(),)))


# ---- charlm: a small transformer on the source text of Python's standard library ----------------

CHARLM_BYTES = 2_000_000
CHARLM_HELD_OUT = 100_000
CHARLM_CONTEXT = 64
CHARLM_BATCH = 32
CHARLM_EVAL_WINDOWS = 512
# Printable ASCII, newline and one sign for everything else: the same vocabulary on every machine.
CHARLM_ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
CHARLM_VOCABULARY = len(CHARLM_ALPHABET) + 1
# Vocabulary, context, width, heads, layers.
CHARLM_SIZES = (CHARLM_VOCABULARY, CHARLM_CONTEXT, 128, 4, 4)


@functools.cache
def standard_library() -> Tensor:
    """Source text of this Python's own top-level modules as character codes, [n] int64.

    Files in the order of their names, cut at `CHARLM_BYTES` characters. The text (and so the loss,
    in its second digit) differs between Python versions, not between machines or runs.

    Raises:
        FileNotFoundError: where Python came without the sources of its standard library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = ""
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name):
        text += path.read_bytes().decode("utf-8", errors="replace").replace("\t", "    ")
        if len(text) >= CHARLM_BYTES:
            break
    if len(text) < 4 * CHARLM_HELD_OUT:
        raise FileNotFoundError(
            f"only {len(text)} characters of Python source under {folder}: the charlm task needs a "
            "Python with the sources of its standard library, or choose --task autoencoder"
        )
    code = {char: i for i, char in enumerate(CHARLM_ALPHABET)}
    other = len(CHARLM_ALPHABET)
    return torch.tensor([code.get(char, other) for char in text[:CHARLM_BYTES]])


class Attention(nn.Module):
    """Causal self-attention with four plain Linear projections, so that each is one block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(n, length, self.heads, -1).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), is_causal=True
        )
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return joined


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        fed: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + fed


class CharLM(nn.Module):
    """Character codes [n, length] → logits [n, length, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, codes: Tensor) -> Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        x = self.token(codes) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _build_charlm(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharLM(*CHARLM_SIZES)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return model


def _windows(codes: Tensor, starts: Tensor) -> Batch:
    rows = codes[starts[:, None] + torch.arange(CHARLM_CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def _charlm_batch(step: int, rank: int, world_size: int, seed: int) -> Batch:
    codes = standard_library()[:-CHARLM_HELD_OUT]
    draw = _generator(seed, step)
    starts = torch.randint(len(codes) - CHARLM_CONTEXT, (CHARLM_BATCH,), generator=draw)
    return _windows(codes, starts[shard(CHARLM_BATCH, rank, world_size)])


def _charlm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next character, averaged over characters, in nats."""
    codes, following = batch
    return F.cross_entropy(model(codes).flatten(0, 1), following.flatten())


@torch.no_grad()
def _evaluate_charlm(model: nn.Module) -> float:
    """On evenly spaced windows of the text's tail, which no batch contains."""
    codes = standard_library()[-CHARLM_HELD_OUT:]
    starts = torch.linspace(0, len(codes) - CHARLM_CONTEXT - 1, CHARLM_EVAL_WINDOWS).long()
    return float(_charlm_loss(model, _windows(codes, starts)))


TASKS: dict[str, Task] = {
    "autoencoder": Task(
        name="autoencoder",
        unit="nats per image",
        default_steps=200,
        global_batch=AUTOENCODER_BATCH,
        baseline_lr=1.6e-2,
        baseline_lr_grid=(2e-3, 3e-3, 5e-3, 8e-3, 1.2e-2, 1.6e-2, 2e-2, 2.5e-2, 3e-2, 4e-2),
        distcurv_lr=1.5e-2,
        weight_decay=0.0,
        build=_build_autoencoder,
        batches=_autoencoder_batch,
        loss=_autoencoder_loss,
        evaluate=_evaluate_autoencoder,
    ),
    "charlm": Task(
        name="charlm",
        unit="nats per character",
        default_steps=400,
        global_batch=CHARLM_BATCH,
        baseline_lr=1e-3,
        baseline_lr_grid=(5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3),
        distcurv_lr=3e-3,
        weight_decay=0.0,
        build=_build_charlm,
        batches=_charlm_batch,
        loss=_charlm_loss,
        evaluate=_evaluate_charlm,
    ),
}
