"""The house: which part may import which, read from the source, imports inside functions included."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest

from utils import ROOT

METHOD = {"trainer", "losses", "metric", "networks", "reIDmodel", "backbones", "optim", "precision", "frozen", "fast"}
COMMANDS = {"train", "test", "generate", "search", "export", "prepare", "prepare-market", "demo"}
ON_DISK = {f"data.{name}" for name in ("archives", "prepare", "folders", "images", "loader", "cache", "generated")}
# Who never imports whom: a package or module stands for all below it.
NEVER = [
    (METHOD, {"runs", "files", "parallel", "visual_tools", "reid_eval", "gen_eval", "mannequins", *ON_DISK}),
    ({"data"}, {"parallel", "runs", "trainer"}),
    ({"parallel"}, {"runs"}),
    ({"reid_eval"}, {"trainer"}),
    ({"gen_eval"}, {"visual_tools"}),
    ({"visual_tools"}, {"benchmarks", "studies"}),
    ({"runs"}, {"visual_tools"}),
]
MOST_INSIDE_FUNCTIONS = 40


@cache
def modules() -> dict[str, Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(line) for line in listed.split() if not line.startswith("tests/")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): ROOT / file for file in files}


@cache
def imports(name: str) -> list[tuple[str, bool]]:
    """What a module imports, and whether it does so inside a function; imports for types alone do not count."""
    tree = ast.parse(modules()[name].read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_types = {id(inner) for node in typing for inner in ast.walk(node)}
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    inside = {id(inner) for function in functions for inner in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in for_types:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [full if full in modules() else node.module for full in names]
            found += [(imported, id(node) in inside) for imported in dict.fromkeys(names)]
    return found


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("who,whom", NEVER, ids=[f"{min(who)} -> {min(whom)}" for who, whom in NEVER])
def test_who_never_imports_whom(who: set[str], whom: set[str]) -> None:
    pairs = [(name, imported) for name in modules() if within(name, who) for imported, _ in imports(name)]
    assert pairs
    assert not [pair for pair in pairs if within(pair[1], whom)]


def test_nobody_imports_a_command() -> None:
    assert not [(name, to) for name in modules() for to, _ in imports(name) if to in COMMANDS]


def test_no_circles() -> None:
    graph = {name: {to for to, _ in imports(name) if to in modules()} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for to in sorted(graph[name]):
                visit(to, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_imports_inside_functions_are_few() -> None:
    inside = [(name, to) for name in modules() for to, in_function in imports(name) if in_function]
    assert len(inside) <= MOST_INSIDE_FUNCTIONS, inside
