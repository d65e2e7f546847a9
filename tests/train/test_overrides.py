"""Settings of single blocks: which rules are taken, which are refused, and what they do.

Oracle of the steps: the dense Kronecker inverse in float64 of each block with its own settings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from capture_harness import TokenNet
from oracles import relative_error
from test_preconditioner import AT_ONCE, backward, covered, factors, kfac, matrix_of, solved
from torch import nn

from distcurv.config import KfacConfig
from distcurv.errors import ConfigError
from distcurv.train.planning import plan_blocks


class Deep(nn.Module):
    """Three Linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)


def specs(*overrides: Any, **settings: Any) -> dict[str, Any]:
    blocks, _ = plan_blocks(Deep(), KfacConfig(rank=2, overrides=overrides, **settings))
    return {block.spec.name: block.spec for block in blocks}


def test_a_regex_is_searched_and_later_rules_win_field_by_field() -> None:
    blocks, _ = plan_blocks(
        Deep(),
        KfacConfig(
            rank=2,
            overrides=[
                ("body", {"rank": 3, "damping": 0.5}),
                (re.compile(r"\.1$"), {"rank": 1, "tail_in": "none"}),
                ("body", {"factor_decay": 0.5}),
            ],
        ),
    )
    own = {block.spec.name: block for block in blocks}
    assert [own[f"body.{i}"].spec.sides[0].rank for i in (0, 1)] == [3, 1]
    assert [own[f"body.{i}"].spec.sides[0].tail for i in (0, 1)] == ["isotropic", "none"]
    assert [own[f"body.{i}"].spec.damping for i in (0, 1)] == [0.5, 0.5]
    assert [own[f"body.{i}"].spec.decay for i in (0, 1)] == [0.5, 0.5]
    assert [own[f"body.{i}"].own_damping for i in (0, 1)] == [True, True]
    assert (own["head"].spec.sides[0].rank, own["head"].spec.decay) == (2, 0.95)
    assert not own["head"].own_damping


def test_a_function_sees_name_and_module() -> None:
    seen = []

    def wide(name: str, module: nn.Module) -> bool:
        seen.append((name, type(module)))
        return isinstance(module, nn.Linear) and module.out_features == 3

    own = specs((wide, {"kind": "dense"}))
    assert {name: spec.kind for name, spec in own.items()}["head"] == "dense"
    assert own["body.0"].kind == "lowrank"
    assert ("head", nn.Linear) in seen
    assert ("embed", nn.Embedding) in seen


def test_every_field_that_a_block_may_have_reaches_it() -> None:
    fields: dict[str, Any] = {
        "rank": 1,
        "damping_form": "relative",
        "tail_in": "none",
        "tail_out": "isotropic",
        "factor_decay": 0.25,
        "encoding": "dense",
        "weight_sharing": "reduce",
        "graft": True,
        "max_rows": 17,
        "damping": 0.125,
    }
    blocks, _ = plan_blocks(Deep(), KfacConfig(overrides=[("head", fields)]))
    head = next(block for block in blocks if block.spec.name == "head")
    for field, value in fields.items():
        assert getattr(head.config, field) == value, field
    assert [(s.rank, s.tail, s.encoding) for s in head.spec.sides] == [
        (1, "none", "dense"),
        (1, "isotropic", "dense"),
    ]
    assert (head.spec.decay, head.spec.damping, head.spec.relative_damping) == (0.25, 0.125, True)


def test_a_block_can_be_left_out_and_taken_in_again() -> None:
    out: Any = ("body", {"precondition": False})
    assert "body.0" not in specs(out) and "head" in specs(out)
    again = specs(out, (r"\.1$", {"precondition": True}))
    assert "body.0" not in again and "body.1" in again
    _, uncovered = plan_blocks(Deep(), KfacConfig(overrides=[out]))
    assert ("body.0", "left out by KfacConfig.overrides") in [tuple(one) for one in uncovered]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("head", r"overrides\[0\] is 'head': give a pair"),
        (("head",), r"overrides\[0\] is \('head',\): give a pair"),
        ((3, {"rank": 2}), r"overrides\[0\] \(3\): choose blocks by"),
        (("(", {"rank": 2}), r"overrides\[0\] \('\('\) is no regular expression"),
        (("head", 3), r"overrides\[0\] \('head'\) gives 3: give a mapping"),
        (("head", {"rnak": 3}), r"\('head'\) sets 'rnak', which is no field of KfacConfig"),
        (("head", {"seed": 3}), r"\('head'\) sets 'seed', which is one for all blocks: .* rank,"),
        (("head", {"install_delay": 3}), r"sets 'install_delay', which is one for all"),
        (("head", {"preconditioner_upd_interval": 3}), "upd_interval', which is one for all"),
        (("head", {"overrides": []}), "sets 'overrides', which is one for all"),
        (("head", {"rank": 0}), r"\('head'\): KfacConfig.rank is 0: give an integer >= 1"),
        (("head", {"kind": "qr"}), r"\('head'\): KfacConfig.kind is 'qr': use one of"),
        (("head", {"damping": -1.0}), r"\('head'\): KfacConfig.damping is -1.0: give a number"),
        (("head", {"precondition": "no"}), r"precondition is 'no': give True or False"),
    ],
)
def test_a_bad_rule_is_told_when_the_config_is_made(rule: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KfacConfig(overrides=[rule])


def test_settings_that_exclude_each_other_are_told_with_their_rule_or_block() -> None:
    with pytest.raises(ConfigError, match=r"\('head'\): KfacConfig.graft is True: kl_clip and"):
        KfacConfig(kl_clip=1.0, overrides=[("head", {"graft": True})])
    with pytest.raises(ConfigError, match=r"\('head'\): KfacConfig.damping is .*fixed when"):
        KfacConfig(damping=lambda step: 1.0, overrides=[("head", {"kind": "dense"})])
    config = KfacConfig(
        overrides=[("head", {"kind": "dense"}), ("h", {"damping": lambda step: 1.0})]
    )
    with pytest.raises(ConfigError, match=r"block head, by KfacConfig.overrides: .*damping"):
        plan_blocks(Deep(), config)


def test_a_regex_that_matches_no_block_is_told_with_the_names() -> None:
    with pytest.raises(
        ConfigError, match=r"overrides\[1\] \('heads'\) matches no block: .*embed.*body.0.*head"
    ):
        specs(("head", {"rank": 1}), ("heads", {"rank": 1}))
    specs((lambda name, module: False, {"rank": 1}))  # a function may say no to all


def test_a_function_must_say_yes_or_no() -> None:
    with pytest.raises(ConfigError, match=r"returned {'rank': 3} for block embed: it must"):
        specs((lambda name, module: {"rank": 3}, {"rank": 1}))


def chosen(names: tuple[str, ...], name: str, module: object) -> bool:
    return name in names


class Chooser:
    def __call__(self, name: str, module: object) -> bool:
        return True


def test_the_description_of_a_config_has_no_addresses() -> None:
    def config() -> KfacConfig:
        return KfacConfig(
            damping=lambda step: 1e-3,
            overrides=[
                (partial(chosen, ("head",)), {"rank": 3}),
                (Chooser(), {"damping": lambda step: 1.0}),
                (re.compile("x"), {}),
            ],
            ignore_modules=(nn.LayerNorm, nn.Linear(2, 2)),
        )

    assert config().description() == config().description()
    assert "0x" not in config().description()
    assert "('head')" in config().description().replace("'head',", "'head'")
    assert KfacConfig(rank=3).description() != KfacConfig(rank=4).description()


@dataclass(frozen=True)
class Named:
    names: frozenset[str]

    def __call__(self, name: str, module: object) -> bool:
        return name in self.names


def test_the_description_of_a_set_has_one_order() -> None:
    """Strings are hashed otherwise in every process, and sets go by that."""
    names = [f"layer{i}" for i in range(8)]
    text = KfacConfig(overrides=[(Named(frozenset(names)), {"rank": 3})]).description()
    assert "Named(names={" + ", ".join(repr(name) for name in names) + "})" in text


# -- what they do to a step ---------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_every_block_steps_with_its_own_settings(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    overrides: list[Any] = [
        ("1", {"damping": 0.7}),
        ("2", {"damping_form": "relative"}),
        ("3", {"kind": "dense", "damping": 0.03}),
        ("4", {"graft": True}),
    ]
    with kfac(model, overrides=overrides, **AT_ONCE) as precond:
        if grouped:  # as on an accelerator
            rewriter = precond._rewriter
            remade = type(rewriter)(
                precond._pipeline.table.specs,
                precond.config,
                precond._pipeline.device,
                True,
                [block.config.graft for block in precond._blocks],
            )
            precond._rewriter = remade
        for damping in (0.1, 0.4):
            precond.damping = damping
            model.zero_grad()
            inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
            acts = [inputs]
            for layer in model:
                acts.append(layer(acts[-1]))
                acts[-1].retain_grad()
            acts[-1].square().mean().backward()
            before = [matrix_of(layer) for layer in model]
            precond.step()
            for i, layer in enumerate(model):
                a = torch.cat([acts[i].detach(), torch.ones(9, 1)], 1).double()
                g = acts[i + 1].grad.double() * 9  # type: ignore[union-attr]
                form = "relative" if i == 2 else "absolute"
                own = {1: 0.7, 3: 0.03}.get(i, damping)
                expected = solved(before[i], a.T @ a / 9, g.T @ g / 9, own, form)
                if i == 4:
                    expected *= before[i].norm() / expected.norm()
                if damping == 0.1:  # later steps average over batches that are alike
                    assert relative_error(matrix_of(layer), expected) < 2e-4, i
                else:
                    assert relative_error(matrix_of(layer), expected) < 5e-3, i


def test_a_dense_block_of_a_low_rank_model_is_exact() -> None:
    model = TokenNet()
    expected_factors = factors(model)
    with kfac(model, rank=1, overrides=[("head", {"kind": "dense"})]) as precond:
        backward(model)
        before = {name: matrix_of(module) for name, module in covered(model).items()}
        precond.step()
        with pytest.raises(ConfigError, match=r"kind 'dense' is fixed .*\(blocks head\)"):
            precond.damping = 0.3
    errors = {
        name: relative_error(
            matrix_of(module),
            solved(before[name], expected_factors[name, "A"], expected_factors[name, "G"], 0.1),
        )
        for name, module in covered(model).items()
    }
    assert errors["head"] < 1e-4 < errors["first"]


def test_rows_and_sharing_are_those_of_the_block() -> None:
    model = TokenNet()
    own = {"max_rows": 5, "weight_sharing": "reduce"}
    with kfac(model, overrides=[("head", own)]) as precond:
        backward(model, samples=12)  # 36 tokens
        capture = precond._source.capture
        assert capture.blocks["head"].weight_sharing == "reduce"
        assert capture.blocks["first"].weight_sharing == "expand"
        rows = capture.arming.rows  # type: ignore[union-attr]
        assert rows["head"].of_call(0).max_rows == 5  # type: ignore[union-attr]
        assert rows["first"].of_call(0).max_rows == 4000  # type: ignore[union-attr]
        precond.step()


def test_a_block_that_is_left_out_keeps_its_gradient() -> None:
    model = TokenNet()
    with kfac(model, overrides=[("first", {"precondition": False})]) as precond:
        backward(model)
        before = matrix_of(model.first), matrix_of(model.head)
        precond.step()
        assert torch.equal(matrix_of(model.first), before[0])
        assert not torch.equal(matrix_of(model.head), before[1])
