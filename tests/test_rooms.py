"""The house rules of docs/architecture.md: who may import whom, and what may be imported before it is needed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_mup"

BELOW = ("config", "parametrization", "parallel", "kernels", "layers", "models", "optim", "data", "checkpoint")
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "kernels": set(),
    "parametrization": {"config"},
    "parallel": {"config", "parametrization", "kernels"},
    "layers": {"config", "parametrization", "parallel", "kernels"},
    "models": {"config", "parametrization", "parallel", "layers"},
    "optim": {"config", "parametrization", "parallel", "kernels"},
    "data": {"config"},
    "checkpoint": {"config", "parametrization", "parallel", "models"},
    "inference": {"config", "parametrization", "parallel", "layers", "models", "data", "checkpoint"},
    "training": set(BELOW),
    "transfer": {*BELOW, "training", "inference"},
    "planning": {"config", "parametrization", "parallel", "models", "optim", "data", "training"},
}
"""The table of docs/architecture.md."""

NARROW = {("parallel", "parametrization"): {"megatron_mup.parametrization.meta"}}
"""Rooms of which another may import some modules only."""

ALWAYS_THERE = {"torch", "numpy", "yaml", "tyro", "rich", "megatron_mup"}
"""Packages that a module may import at its top."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path, top_level: bool = False) -> set[str]:
    """Modules that a file imports, those for annotations alone left out; outside functions only, if asked."""

    def walk(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from megatron_mup import data` names a room, not something inside a module.
            inner = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == PACKAGE.name else set()
            return {str(node.module)} | inner
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return set()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            children = list(node.orelse)
        return set().union(*map(walk, children))

    return walk(ast.parse(file.read_text(encoding="utf-8")))


def room_of(module: str) -> str | None:
    """The room that a dotted module name lies in; None outside the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in ROOMS else None


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_they_may(room):
    for file in sorted((PACKAGE / room).rglob("*.py")):
        for module in imports(file):
            other = room_of(module)
            if other is None or other == room:
                continue
            assert other in ROOMS[room], f"{file.relative_to(ROOT)} imports {module}"
            narrow = NARROW.get((room, other))
            assert narrow is None or module in narrow, f"{file.relative_to(ROOT)} imports {module}"


def test_the_table_has_no_circle():
    open_rooms = {room: set(allowed) for room, allowed in ROOMS.items()}
    while open_rooms:
        free = [room for room, allowed in open_rooms.items() if not allowed & open_rooms.keys()]
        assert free, f"a circle among {sorted(open_rooms)}"
        for room in free:
            del open_rooms[room]


def test_the_table_is_the_documented_one():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `megatron_mup/")]
    documented = {row[0].strip(" `/").removeprefix("megatron_mup/"): row[2].strip() for row in rows}
    assert set(documented) == set(ROOMS)
    for room, allowed in ROOMS.items():
        if documented[room].startswith("all of the above"):
            continue
        names = documented[room].replace("`", "").replace(".meta", "").split(", ")
        assert {name for name in names if name != "nothing"} == allowed, room


def late_package(file: Path) -> str | None:
    """The optional package around which a module is written; such a module is itself imported late."""
    if file in (PACKAGE / "training" / "plot.py", PACKAGE / "transfer" / "plots.py"):
        return "matplotlib"
    return "triton" if file.parent.name == "kernels" and file.stem.endswith("_triton") else None


@pytest.mark.parametrize("file", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_when_needed(file):
    found = imports(file, top_level=True)
    allowed = ALWAYS_THERE | set(sys.stdlib_module_names) | {late_package(file)}
    assert {module.split(".")[0] for module in found} <= allowed
    if late_package(file) is None:
        late = {".".join(m.relative_to(ROOT).with_suffix("").parts) for m in MODULES if late_package(m)}
        assert not found & late


def test_import_finder_sees_all_kinds(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from __future__ import annotations\n"
        "import a.b\n"
        "from megatron_mup import data\n"
        "if TYPE_CHECKING:\n    import annotation\n"
        "try:\n    import optional\nexcept ImportError:\n    pass\n"
        "class C:\n    import inner\n"
        "def f():\n    from late import x\n"
    )
    top = {"__future__", "a.b", "megatron_mup", "megatron_mup.data", "optional", "inner"}
    assert imports(file, top_level=True) == top
    assert imports(file) == top | {"late"}
