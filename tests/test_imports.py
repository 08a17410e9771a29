"""The house stays in order: imports run one way, in no circle, and packages are light to import."""

import ast
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "zoo", "callbacks", "benchmarks")  # each may import those before it


def _modules() -> dict[str, Path]:
    modules = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules()


def _imports(tree: ast.AST, everywhere: bool) -> set[str]:
    """Our modules that a file imports: at import time only, or also in functions and for types."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
        elif everywhere or not _is_deferred(node):
            found |= _imports(node, everywhere)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def _is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _tree(name: str) -> ast.AST:
    return ast.parse(MODULES[name].read_text())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str) -> None:
    allowed = PACKAGES[: PACKAGES.index(name.split(".")[0]) + 1]
    wrong = {i for i in _imports(_tree(name), everywhere=True) if i.split(".")[0] not in allowed}
    assert not wrong, f"{name} may import only {allowed}"


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = {name: _imports(_tree(name), everywhere=False) & set(MODULES) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_would_be_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    source = "import zoo.registry\ndef f():\n    from callbacks.budget import Budget"
    assert _imports(ast.parse(source), everywhere=False) == {"zoo.registry"}
    assert _imports(ast.parse(source), everywhere=True) == {"zoo.registry", "callbacks.budget"}


def test_packages_import_neither_torch_nor_lightning() -> None:
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    code = (
        f"import sys, {', '.join(packages)}\n"
        "print(sorted({'torch', 'pytorch_lightning', 'gymnasium'} & set(sys.modules)))"
    )
    assert _python("-c", code).strip() == "[]"


def test_zoo_list_answers_in_half_a_second() -> None:
    times = []
    for _ in range(3):  # the best of three: another process may hold the core
        start = time.perf_counter()
        assert "dreamer-v3" in _python("-m", "zoo", "list")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_the_command_waits_passively_before_torch_is_imported() -> None:
    code = (
        "import os, sys, zoo.__main__ as m\n"
        "m.main(['list', '--json'])\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'], 'torch' in sys.modules)"
    )
    assert _python("-c", code).splitlines()[-1] == "passive 0 False"


def _python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout
