"""Settings of single blocks: rules that say which blocks they are for and what differs there.

A rule is a pair.  Its first part chooses blocks: a regular expression that is searched in the
block's name, or a function of the block's name and module that returns True or False.  Its second
part is a mapping of `KfacConfig` fields, and of ``precondition``, which is True by default and
leaves a block to the base optimizer where it is False.  Where several rules choose one block, the
later one wins, field by field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from distcurv.config.schedule import description
from distcurv.errors import ConfigError

Chooser = str | re.Pattern[str] | Callable[[str, object], bool]

# What a block may have of its own.  The rest belongs to the exchange or to all blocks together.
PER_BLOCK = (
    "rank",
    "kind",
    "damping",
    "damping_form",
    "tail_in",
    "tail_out",
    "max_itr",
    "tolerance",
    "factor_decay",
    "encoding",
    "weight_sharing",
    "graft",
    "max_rows",
)
LEAVE_OUT = "precondition"


class BlockRule(NamedTuple):
    """A checked rule."""

    chooser: Chooser
    settings: dict[str, object]

    def chooses(self, name: str, module: object) -> bool:
        """Whether the rule is for a block.

        Raises `ConfigError` where a function returns anything but True or False."""
        if isinstance(self.chooser, str | re.Pattern):
            return re.search(self.chooser, name) is not None
        answer = self.chooser(name, module)
        if not isinstance(answer, bool):
            raise ConfigError(
                f"KfacConfig.overrides: {description(self.chooser)} returned {answer!r} for block "
                f"{name}: it must return True or False"
            )
        return answer


def checked_rules(rules: object, known: Sequence[object]) -> tuple[BlockRule, ...]:
    """Rules as the user gives them, in one form.

    Args:
        rules: a sequence of pairs.
        known: the fields of the config, to tell a field of all blocks from a misspelt one.

    Raises `ConfigError` for another form, a bad regular expression, or a field that no block can
    have of its own.  The values are the caller's to check."""
    where = "KfacConfig.overrides"
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise ConfigError(f"{where} is {rules!r}: give a list of (regex or function, fields)")
    checked = []
    for index, rule in enumerate(rules):
        if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
            raise ConfigError(
                f"{where}[{index}] is {rule!r}: give a pair of a regex or function and a mapping "
                "of fields"
            )
        chooser, settings = rule
        here = f"{where}[{index}] ({description(chooser)})"
        if not isinstance(chooser, str | re.Pattern) and not callable(chooser):
            raise ConfigError(
                f"{here}: choose blocks by a regular expression or by a function of (name, module)"
            )
        if isinstance(chooser, str):
            try:
                re.compile(chooser)
            except re.error as error:
                raise ConfigError(f"{here} is no regular expression: {error}") from error
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{here} gives {settings!r}: give a mapping of fields to values")
        for field in settings:
            _check_field(here, field, known)
        if not isinstance(settings.get(LEAVE_OUT, True), bool):
            raise ConfigError(f"{here}: {LEAVE_OUT} is {settings[LEAVE_OUT]!r}: give True or False")
        checked.append(BlockRule(chooser, dict(settings)))
    return tuple(checked)


def _check_field(here: str, field: object, known: Sequence[object]) -> None:
    if field in PER_BLOCK or field == LEAVE_OUT:
        return
    what = "is one for all blocks" if field in known else "is no field of KfacConfig"
    raise ConfigError(
        f"{here} sets {field!r}, which {what}: a block may have its own "
        f"{', '.join(PER_BLOCK)}, or {LEAVE_OUT}=False"
    )


def settings_of(rules: Iterable[BlockRule], name: str, module: object) -> dict[str, object]:
    """What the rules together say of a block; later ones win."""
    settings: dict[str, object] = {}
    for rule in rules:
        if rule.chooses(name, module):
            settings |= rule.settings
    return settings


def check_each_matches(rules: Iterable[BlockRule], names: Sequence[str]) -> None:
    """Raise `ConfigError` where a regular expression is found in none of the blocks' names."""
    for index, rule in enumerate(rules):
        chooser = rule.chooser
        if isinstance(chooser, str | re.Pattern) and not any(re.search(chooser, n) for n in names):
            raise ConfigError(
                f"KfacConfig.overrides[{index}] ({description(chooser)}) matches no block: the "
                f"blocks are {', '.join(names)}"
            )
