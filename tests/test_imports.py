"""The import arrows between the parts of the package, and house rules that can be counted.

Everything is read from the source by AST; the checkers are tested on planted violations.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "distcurv"
MAX_LINES = 300

# What an area may import beside itself and `errors`.  ALL: the places where everything meets.
ALL = frozenset({"*"})
TRAIN = frozenset({"curvature", "layers", "wire", "config"})
ARROWS: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "curvature": frozenset(),
    "wire": frozenset(),
    "observe": frozenset(),
    "config": frozenset({"curvature"}),
    "layers": frozenset({"curvature"}),
    "worker": frozenset({"curvature", "wire", "config"}),
    "train": TRAIN,
    "makers": TRAIN | {"train", "optim"},
    "optim": TRAIN | {"train"},
    "demo": ALL,
    "bench": ALL,
    "wiring": ALL,
    "launcher": ALL,
    "inspection": ALL,
    "cli": ALL,
    "__main__": ALL,
    "__init__": ALL,
}
# Areas that nothing may import but the ones named here.
ONLY_FROM: dict[str, frozenset[str]] = {"bench": frozenset({"cli"})}


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), path.read_text(encoding="utf-8")


def area_of(relative: Path) -> str:
    return relative.parts[0].removesuffix(".py")


def imported_areas(relative: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(area, line) of each import of ours; a name taken from the package itself that is not an
    area counts as ``__init__``."""
    package = ("distcurv", *relative.parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                words = alias.name.split(".")
                if words[0] == "distcurv":
                    yield (words[1] if len(words) > 1 else "__init__"), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            words = [*base, *(node.module.split(".") if node.module else [])]
            if words[:1] != ["distcurv"]:
                continue
            if len(words) > 1:
                yield words[1], node.lineno
            else:
                for alias in node.names:
                    yield (alias.name if alias.name in ARROWS else "__init__"), node.lineno


def arrow_violations(relative: Path, source: str) -> list[str]:
    area = area_of(relative)
    if area not in ARROWS:
        return [f"{relative}: area {area!r} is not in the table of arrows"]
    allowed = ARROWS[area]
    return [
        f"{relative}:{line}: {area} must not import {target}"
        for target, line in imported_areas(relative, ast.parse(source))
        if (allowed != ALL and target not in allowed | {area, "errors"})
        or (area != target and area not in ONLY_FROM.get(target, {area}))
    ]


def rule_violations(relative: Path, source: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"{relative}: {len(source.splitlines())} lines, at most {MAX_LINES}")
    if not ast.get_docstring(tree):
        found.append(f"{relative}: no docstring")
    for node in ast.walk(tree):
        what = _forbidden(node, relative)
        if what:
            found.append(f"{relative}:{getattr(node, 'lineno', 0)}: {what}")
    return found


def _forbidden(node: ast.AST, relative: Path) -> str | None:
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names]
        roots = {name.split(".")[0] for name in names}
        if isinstance(node, ast.ImportFrom):
            roots = {(node.module or "").split(".")[0]}
        if roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}:
            return f"import of {', '.join(sorted(roots))}"
        if "importlib" in roots and ARROWS.get(area_of(relative)) != ALL:
            return "import by name, which hides an arrow"
        if any(_is_object_collective(name) for name in names):
            return "an object collective"
    if isinstance(node, ast.Attribute) and _is_object_collective(node.attr):
        return f"object collective {node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, first = node.func.id, node.args[0] if node.args else None
        if name in ("eval", "exec", "__import__"):
            return f"call of {name}"
        if name == "getattr" and isinstance(first, ast.Name) and first.id == "torch":
            return "getattr(torch, ...)"
    return None


def _is_object_collective(name: str) -> bool:
    stems = ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
    return any(name in (f"{stem}_object", f"{stem}_object_list") for stem in stems)


def test_imports_run_downwards() -> None:
    found = [text for path, source in modules() for text in arrow_violations(path, source)]
    assert not found, "\n".join(found)


def test_house_rules() -> None:
    found = [text for path, source in modules() for text in rule_violations(path, source)]
    assert not found, "\n".join(found)


def test_there_is_something_to_check_and_no_utils() -> None:
    names = [path.name for path, _ in modules()]
    assert len(names) > 20
    assert not {"utils.py", "util.py", "helpers.py", "common.py"} & set(names)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("curvature/a.py", "import distcurv.wire.link"),
        ("curvature/kinds/a.py", "from ...wire import link"),
        ("wire/a.py", "from distcurv.curvature.spec import BlockSpec"),
        ("layers/a.py", "from distcurv.config import KfacConfig"),
        ("worker/a.py", "def f():\n    from distcurv.train import capture"),
        ("train/a.py", "from distcurv import worker"),
        ("train/a.py", "from distcurv import Preconditioner"),
        ("train/a.py", "if TYPE_CHECKING:\n    from ..worker.service import Service"),
        ("optim/a.py", "import distcurv.makers"),
        ("makers/a.py", "import distcurv"),
        ("observe/a.py", "from distcurv.config import KfacConfig"),
        ("errors.py", "from distcurv.wire import link"),
        ("newcomer/a.py", "import os"),
        ("demo/a.py", "from distcurv.bench.clock import now"),
        ("wiring.py", "from distcurv import bench"),
    ],
)
def test_a_planted_arrow_is_found(path: str, source: str) -> None:
    assert len(arrow_violations(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("curvature/a.py", "from distcurv.errors import ShapeError\nfrom .spec import Layout"),
        ("train/a.py", "from distcurv import config, errors\nimport distcurv.layers.linear"),
        ("train/sub/a.py", "from ..capture import Capture\nfrom ...wire import link"),
        ("optim/a.py", "from distcurv.train.preconditioner import Preconditioner"),
        ("wiring.py", "from distcurv import train, worker\nfrom distcurv import Preconditioner"),
        ("wire/a.py", "import distcurvature"),
        ("cli.py", "import distcurv.bench.command"),
        ("bench/a.py", "from distcurv.bench.clock import now\nimport distcurv.demo.tasks"),
    ],
)
def test_an_allowed_arrow_is_not(path: str, source: str) -> None:
    assert arrow_violations(Path(path), source) == []


@pytest.mark.parametrize(
    "line",
    [
        "try:\n    pass\nexcept:\n    pass",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "getattr(torch, name)",
        "dist.broadcast_object_list([], src=0)",
        "from torch.distributed import all_gather_object",
        "import importlib",
        "\n" * MAX_LINES,
    ],
)
def test_a_broken_rule_is_found(line: str) -> None:
    assert len(rule_violations(Path("train/a.py"), f'"""Why."""\n{line}\n')) == 1


def test_a_missing_docstring_is_found_and_a_clean_file_is_clean() -> None:
    assert len(rule_violations(Path("train/a.py"), "x = 1\n")) == 1
    clean = '"""Why."""\ntry:\n    x = getattr(obj, "name")\nexcept KeyError:\n    gather(x)\n'
    assert rule_violations(Path("train/a.py"), clean) == []
