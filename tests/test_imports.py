"""The house's floors: imports go down only, and `import bitnet_ext` is light and silent."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest

# The top name of each module and the floor it stands on (CONTRIBUTING.md).
FLOORS = {
    "arguments": 0,
    "config": 0,
    "errors": 0,
    "_core": 1,
    "_sampling": 1,
    "cython_api": 1,
    "gpu": 1,
    "runtime": 2,
    "ops": 2,
    "masks": 2,
    "memory": 2,
    "checkpoint": 3,
    "model": 3,
    "generate": 4,
    "score": 4,
    "api": 5,
    "cli": 6,
}
MODULES = sorted(fresh.PACKAGE.rglob("*.py"))
CSRC = Path(__file__).parents[1] / "csrc"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports at run time, inside functions too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, line {node.lineno}"
            assert node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        if is_type_checking(node):
            assert isinstance(node, ast.If)
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def top_name(module: str) -> str | None:
    """The part of bitnet_ext that a dotted name stands in; None for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "bitnet_ext" and len(parts) > 1 else None


def name_of(path: Path) -> str:
    return path.relative_to(fresh.PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(fresh.PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = name_of(path)
    if own in ("__init__", "__main__"):
        return
    assert own in FLOORS, f"{own} has no floor: give it one here and in CONTRIBUTING.md"
    for module in imports(path):
        other = top_name(module)
        if other in FLOORS:
            assert FLOORS[other] <= FLOORS[own], f"{path} imports {module}, which stands above it"
        else:
            assert other is None or own == "cli", f"{path} imports {module}, which has no floor"


def test_no_two_parts_import_each_other() -> None:
    edges: dict[str, set[str]] = {name: set() for name in FLOORS}
    for path in MODULES:
        own = name_of(path)
        if own in FLOORS:
            edges[own] |= {n for m in imports(path) if (n := top_name(m)) in FLOORS and n != own}
    while edges:
        leaves = {name for name, below in edges.items() if not below}
        assert leaves, f"import cycle among {sorted(edges)}"
        edges = {name: below - leaves for name, below in edges.items() if name not in leaves}


def test_cupy_is_imported_only_by_gpu_and_memory() -> None:
    users = {name_of(p) for p in MODULES if any(m.split(".")[0] == "cupy" for m in imports(p))}
    assert users <= {"gpu", "memory"}
    assert "gpu" in users


def test_import_is_light_and_silent() -> None:
    done = fresh.run(
        "import sys\n"
        "before = set(sys.modules)\n"
        "import bitnet_ext\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before\n"
        "       if getattr(sys.modules[name], '__file__', None)}\n"
        "sys.stderr.write(' '.join(sorted(new - set(sys.stdlib_module_names))))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == "bitnet_ext numpy"


def test_star_import_gives_every_public_name() -> None:
    fresh.output(
        "import bitnet_ext\n"
        "from bitnet_ext import *\n"
        "assert all(name in globals() for name in bitnet_ext.__all__)\n"
    )


@pytest.mark.parametrize(
    ("header", "folder"),
    [
        (r"Python\.h|pybind11/", "bind"),
        (r"immintrin\.h", "base rowwise vocab attention ternary mask"),
        (r"sys/|unistd\.h|sched\.h|pthread\.h|fcntl\.h", "base"),
    ],
)
def test_headers_stay_in_their_folders(header: str, folder: str) -> None:
    include = re.compile(rf'#include\s*[<"]({header})')
    users = {
        path.relative_to(CSRC).parts[0]
        for path in CSRC.rglob("*.[ch]*")
        if include.search(path.read_text())
    }
    assert users <= set(folder.split())
