"""Which parameters of the off-the-shelf models are covered, and that capture really sees them."""

from __future__ import annotations

import pytest
import torch
from model_zoo import MAKERS, covered, loss_of, make

from distcurv import KfacConfig, Preconditioner
from distcurv.train.discover import find_layer_blocks

# All that is left to the base optimizer, by model; None is.
UNCOVERED: dict[str, set[str]] = {name: set() for name in MAKERS}

# Whose statistics come from the gradient alone: parameters of arithmetic, and one that two modules
# hold, of which only one is known.
BY_GRADIENT: dict[str, set[str]] = {
    **{name: set() for name in MAKERS},
    "bert": {"cls.predictions.bias"},
    "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
    "convnext": {
        f"convnext.encoder.stages.{stage}.layers.0.layer_scale_parameter" for stage in (0, 1)
    },
    "whisper": {"layer_weights"},
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_every_trainable_parameter_is_in_one_block(name: str) -> None:
    model = make(name).model
    found, uncovered = find_layer_blocks(model)
    numbers = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    in_blocks = covered(found, model)
    assert set(numbers) - set(in_blocks) == UNCOVERED[name]
    assert {n: numbers[n] for n in in_blocks} == in_blocks  # whole, and once
    assert sum(in_blocks.values()) >= 0.95 * sum(numbers.values())
    assert not uncovered
    by_gradient = [(f.name, f.layer) for f in found if f.source == "gradient"]
    assert {block for block, _ in by_gradient} == BY_GRADIENT[name]
    assert all(layer.one_sided == "diagonal" for _, layer in by_gradient)


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_step_shows_every_block(name: str) -> None:
    """Of which a forward and backward delivers no statistic, that the gradient must make it."""
    entry = make(name)
    config = KfacConfig(rank=4, early_steps=100)
    with Preconditioner(entry.model, config, workers="inline") as precond:
        summary = precond.summary()
        assert summary.coverage >= 0.95
        left = {row.parameter for row in summary.rows if row.trainable and row.block is None}
        assert left == UNCOVERED[name]
        loss_of(entry.model, entry.batch).backward()
        assert precond._source.capture.finish() == frozenset()
        assert len(precond._source.capture.blocks) == len(precond.block_names) - len(
            BY_GRADIENT[name]
        )


@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_in_evaluation_mode_the_same_blocks_are_found(name: str) -> None:
    model = make(name).model
    names = [found.name for found in find_layer_blocks(model)[0]]
    assert [found.name for found in find_layer_blocks(model.eval())[0]] == names


def test_heads_tied_by_the_library_are_one_block_with_their_embedding() -> None:
    model = make("gpt2").model
    blocks = {found.name: found for found in find_layer_blocks(model)[0]}
    assert blocks["lm_head"].tied == (model.get_submodule("transformer.wte"),)
    assert "transformer.wte" not in blocks


def test_positions_that_are_frozen_are_no_block() -> None:
    model = make("whisper").model
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.embed_positions.weight"]
    assert "encoder.embed_positions" not in {f.name for f in find_layer_blocks(model)[0]}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_the_library_changes_nothing(use_reentrant: bool) -> None:
    """Tolerance: float32 sums in another order."""
    after = []
    for checkpointing in (False, True):
        model, batch = make("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = KfacConfig(rank=4, early_steps=100, damping=0.1, kl_clip=1e-3, lr=0.1)
        with Preconditioner(model, config, workers="inline") as precond:
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                precond.step()
                optimizer.step()
            assert {record[1] for record in precond.install_log} == set(
                range(len(precond.block_names))
            )
        after.append([p.detach() for p in model.parameters()])
    for plain, checkpointed in zip(*after, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-3, atol=1e-5)
