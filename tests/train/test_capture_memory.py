"""What capture keeps between forward and backward: drawn rows and statistics, no activation.

Checkpoints free the activations inside them; a capture that held an input, or a view of one, would
take that away.  Storages are watched, not tensors: a view keeps its storage.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from capture_harness import cross_entropy
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from distcurv import KfacConfig, Preconditioner

SAMPLES, WIDTH = 12, 8


class Body(nn.Module):
    """Images [N, 3, 6, 6] to logits [N, 4], through a layer of each family."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.GroupNorm(2, WIDTH)
        self.middle = nn.Linear(36, WIDTH)
        self.scale = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(self.middle(self.norm(self.conv(x)).flatten(2)).tanh())
        x, _ = self.attention(x, x, x)
        return self.head(x.mean(1))


def run_plain(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)


def run_checkpointed(body: nn.Module, x: Tensor) -> Tensor:
    out = checkpoint(body, x, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out


def run_reentrant(body: nn.Module, x: Tensor) -> Tensor:
    out = checkpoint(body, x, use_reentrant=True)
    assert isinstance(out, Tensor)
    return out


def alive(
    body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[list[str], list[str]]:
    """Which modules' inputs and outputs are in memory after the forward, and after the backward."""
    seen: list[tuple[str, StorageWeakRef]] = []

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: object) -> None:
            tensors = [*args, *(out if isinstance(out, tuple) else (out,))]
            for place, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor):
                    seen.append((f"{name} {place}", StorageWeakRef(tensor.untyped_storage())))

        return hook

    handles = [
        module.register_forward_hook(remember(name))
        for name, module in body.named_modules()
        if name
    ]
    x = torch.randn(SAMPLES, 3, 6, 6, requires_grad=True)
    logits = run(body, x)
    gc.collect()
    after_forward = [name for name, storage in seen if not storage.expired()]
    cross_entropy("mean")(logits, torch.randint(4, (SAMPLES,))).backward()
    for handle in handles:
        handle.remove()
    gc.collect()
    after_backward = [name for name, storage in seen if not storage.expired()]
    return after_forward, after_backward


@pytest.mark.parametrize("max_rows", [2, 1000, None])
@pytest.mark.parametrize("run", [run_plain, run_checkpointed, run_reentrant])
def test_no_activation_outlives_what_the_model_itself_keeps(
    run: Callable[[nn.Module, Tensor], Tensor], max_rows: int | None
) -> None:
    torch.manual_seed(0)
    body = Body()
    expected = alive(body, run)
    config = KfacConfig(rank=2, max_rows=max_rows)
    with Preconditioner(body, config, "inline") as precond:
        assert precond._source.capture.is_armed
        found = alive(body, run)
        assert not precond._source.capture.finish()
    if max_rows is None:
        # Norms pair inputs with output gradients: all rows of both means the whole input.
        assert set(found[0]) - set(expected[0]) <= {"conv 1", "norm 0", "middle 1", "scale 0"}
        assert found[1] == expected[1]
    else:
        assert found == expected
    if max_rows is not None and run is not run_plain:
        assert "middle 1" not in found[0]
    # Beside the logits and the input, which `alive` holds.
    assert {name.split()[0] for name in found[1]} <= {"head", "conv"}


def test_what_a_call_keeps_is_as_large_as_its_drawn_rows() -> None:
    torch.manual_seed(0)
    body = Body()
    sizes = []
    with Preconditioner(body, KfacConfig(rank=2, max_rows=4), "inline") as precond:
        observe = type(precond._source.capture).observe
        kept_of = []

        def watch(self, arming, block, use, input, out):  # type: ignore[no-untyped-def]
            before = {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor)}
            observe(self, arming, block, use, input, out)
            new = [
                o for o in gc.get_objects() if issubclass(type(o), Tensor) and id(o) not in before
            ]
            kept_of.append(block.name)
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in new))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(precond._source.capture), "observe", watch)
            body(torch.randn(SAMPLES, 3, 6, 6))
    assert {"conv", "middle", "head"} <= set(kept_of)
    # Of 432 positions of 27 inputs, 4 or a few more: far below a tenth of any activation.
    assert max(sizes) <= 4 * 4 * 4 * 36
