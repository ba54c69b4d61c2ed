"""The arrows between the parts, and sizes that keep files and functions readable."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sead.models.family import FOLDERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_sead"
LEAVES = {"errors", "boxed", "config", "files", "wording"}  # anyone may import them, distillation excepted
PARTS = {"distillation", "models", "parallel", "checkpoints", "rollouts", "prompts", "grading", "reporting"}

# What a part may import of the package, beside itself and the leaves
ALLOWED: dict[str, set[str]] = {part: set() for part in PARTS | LEAVES} | {
    "config": {"distillation"},  # names, defaults and rules, of the modules there that need no torch
    "models": {"parallel"},
    "checkpoints": {"models", "parallel"},
    "rollouts": {"models"},
    "prompts": {"models"},
    "evaluation": {"rollouts", "grading", "prompts", "parallel", "checkpoints", "models"},
    "preparation": {"grading", "prompts"},
    "training": PARTS | {"evaluation", "launch", "planning", "html_report"},
    "tracing": PARTS | {"training", "planning"},
    "planning": {"models", "prompts"},
    "scaling": {"models", "parallel", "prompts", "rollouts", "reporting", "launch", "training", "planning", "tracing"},
    "launch": set(),
    "reporting": {"distillation"},
    "html_report": {"reporting", "distillation", "evaluation"},
    "commands": PARTS - {"distillation"}
    | {"evaluation", "preparation", "training", "planning", "launch", "html_report"}
    | {"tracing", "scaling"},
    "train": {"commands"},
}
# Modules that start at once: neither they nor what they import at the top brings torch, Megatron or transformers
INSTANT = (
    "config",
    "files",
    "planning",
    "train",
    "commands",
    "models.hf_config",
    "models.family",
    "models.weights",
    "models.weight_tables",
    *sorted({f"models.{folder}.family" for folder in FOLDERS}),
    "models.layout",
    "models.slabs",
    "models.weight_files",
    "html_report",
    "prompts.rows",
    "prompts.token_tables",
    "launch.ownership",
)
SLOW = {"torch", "megatron", "transformers", "datasets"}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 70


def imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Full names of all modules that a file imports, wherever in the file; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def faults(part: str, imported: set[str]) -> set[str]:
    """Names among `imported` that `part` may not import."""
    wrong = set()
    for name in imported:
        package, _, inner = name.partition(".")
        if package == "tools" or package == "tests":
            wrong.add(name)
        if package == "megatron_sead" and inner:
            target = inner.split(".")[0]
            leaves = set() if part == "distillation" else LEAVES
            if target != part and target not in ALLOWED[part] | leaves | {"__version__"}:
                wrong.add(name)
        if part == "distillation" and package in ("megatron", "transformers", "datasets", "pydantic"):
            wrong.add(name)
        if part in LEAVES and package in SLOW:
            wrong.add(name)
    return wrong


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def modules(name: str) -> list[str]:
    """Full names of a module, or of all modules of a folder."""
    place = PACKAGE / name.replace(".", "/")
    files = sources(place) if place.is_dir() else [place.with_suffix(".py")]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_go_downward_only(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert not faults(part_of(path), set(imports(ast.parse(path.read_text()), module)))


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("distillation", "from megatron_sead.errors import UserError"),
        ("distillation", "import megatron.core"),
        ("models", "from ..training import loop"),
        ("rollouts", "def f():\n    import megatron_sead.grading"),
        ("reporting", "from megatron_sead import training"),
        ("config", "import torch"),
        ("files", "from megatron_sead.models.token_ids import NAMED_TOKENS"),
        ("checkpoints", "from megatron_sead.rollouts.engine import Rollout"),
        ("prompts", "from tools import plan"),
        ("training", "from megatron_sead.commands.cli import told"),
    ],
)
def test_a_wrong_arrow_is_seen(part: str, code: str) -> None:
    assert faults(part, set(imports(ast.parse(code), f"megatron_sead.{part}.module")))


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("checkpoints", "from megatron_sead.models.builder import build_model"),
        ("training", "from megatron_sead.distillation.zones import assign_zones"),
        ("models", "from megatron_sead.errors import UserError\nfrom .builder import build_model\nimport torch"),
    ],
)
def test_a_right_arrow_passes(part: str, code: str) -> None:
    assert not faults(part, set(imports(ast.parse(code), f"megatron_sead.{part}.module")))


def test_every_part_has_its_arrows_declared() -> None:
    assert {part_of(path) for path in sources(PACKAGE)} - {"__init__"} <= ALLOWED.keys()


def at_the_top(module: str) -> Iterator[str]:
    """Names that a module imports as soon as it is imported itself, what only a type checker reads left out."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.exists():  # a function or a class of a module
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([node], []), module)


@pytest.mark.parametrize("module", [m for name in INSTANT for m in modules(name)])
def test_what_a_dry_run_imports_brings_no_torch(module: str) -> None:
    seen, left = set(), [module]
    while left:
        name = left.pop()
        assert name.split(".")[0] not in SLOW, f"{module} imports {name}"
        if name not in seen and name.split(".")[0] == "megatron_sead":
            seen.add(name)
            left += [*at_the_top(name), *(name.rpartition(".")[:1] if "." in name else ())]


@pytest.mark.parametrize(
    "path",
    [*sources(PACKAGE), *sources(ROOT / "tools"), *sources(ROOT / "tests")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < MOST_LINES_OF_A_FILE
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 >= MOST_LINES_OF_A_FUNCTION
    }
    assert not long


def import_graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Which of the modules each one imports, at the top, in functions and for type checkers alike."""
    graph: dict[str, set[str]] = {module: set() for module in texts}
    for module, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = set(imports(ast.Module([node], []), module)) & texts.keys()
                # from a.b import c, where c is a module, uses nothing of a.b itself
                graph[module] |= {name for name in named if not any(n.startswith(f"{name}.") for n in named)}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which reaches all others of its set."""

    def reached(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    beyond = {module: reached(module) for module in graph}
    found = [{m for m in beyond[module] if module in beyond[m]} for module in graph if module in beyond[module]]
    return [circle for number, circle in enumerate(found) if circle not in found[:number]]


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources(PACKAGE)}
    assert not circles(import_graph({module: path.read_text() for module, path in files.items()}))


@pytest.mark.parametrize(
    "second",
    [
        "import p.a",
        "from p import a",
        "from p.a import f",
        "def g():\n    from p.a import f",
        "if TYPE_CHECKING:\n    from p.a import f",
        "from p.c import h",
    ],
)
def test_a_circle_is_seen_wherever_the_import_stands(second: str) -> None:
    texts = {"p": "", "p.a": "from p.b import g", "p.b": second, "p.c": "from p.a import f", "p.d": "import p.a"}
    (circle,) = circles(import_graph(texts))
    assert circle == {"p.a", "p.b"} | ({"p.c"} if "p.c" in second else set())


def test_the_files_of_a_step_are_where_the_list_says() -> None:
    listed = re.findall(
        r"\w+/\w+\.py", ast.get_docstring(ast.parse((PACKAGE / "training/__init__.py").read_text())) or ""
    )
    assert len(listed) >= 10 and [name for name in listed if not (PACKAGE / name).is_file()] == []


def options_named(path: Path) -> list[str]:
    """Texts of a file, docstrings left out, that name an option of a command."""
    tree = ast.parse(path.read_text())
    parts = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(n.body[0].value) for n in parts if n.body and isinstance(n.body[0], ast.Expr)}
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [str(n.value) for n in texts if id(n) not in docstrings and re.search(r"(?<!\w)--[a-z]", str(n.value))]


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_options_are_named_where_they_are_parsed(path: Path) -> None:
    if part_of(path) != "commands" and path != PACKAGE / "launch" / "torchrun.py":
        assert not options_named(path)


def test_nothing_is_kept_in_a_utils_file() -> None:
    assert not [path for path in sources(PACKAGE) if path.stem in ("utils", "util", "helpers", "common")]


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("examples/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"]), ids=str
)
def test_scripts_are_valid_and_executable_unless_sourced(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    is_command = path.read_text().startswith("#!")
    assert os.access(path, os.X_OK) == is_command
