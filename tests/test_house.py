"""The house: which file may import which, what stays light, how long a function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "padconvert"

# A file imports only from lines above its own, or from its own line.
ORDER = [
    ["errors"],
    ["words", "allow"],
    ["results", "progress", "paired", "checksum", "walk.spec"],
    ["walk.info", "layers.facts"],
    ["gates"],
    ["policy"],
    ["options"],
    ["surroundings"],
    ["walk"],
    ["layers"],
    ["plan"],
    ["rewrite", "precision"],
    ["partition"],
    ["finetune"],
    ["fold"],
    ["checkpoint"],
    ["export", "hf"],
    ["load"],
    ["account", "task"],
    ["kinds"],
    ["contenders"],
    ["layer_times"],
    ["verify", "verify_hf", "bench", "inspection", "listing", "doctor"],
    ["neighbours", "stream"],
    ["seal"],
    ["convert", "api"],
    ["report"],
    ["cli"],
    ["__main__"],
]

# Who may import what at all, and whether at the top of a file. Everything not named here is free.
THIRD_PARTY_HOMES = {
    "typer": ["cli"],
    "rich": ["report"],
    "pydantic": ["policy", "checkpoint"],
    "matplotlib": ["report"],
    "onnx": ["export"],
    "onnxruntime": ["export"],
}
NEVER_AT_THE_TOP = {"transformers", "datasets", "matplotlib", "PIL", "sklearn", "onnx", "onnxruntime"}
# importing this file is what registers it with transformers
AT_THE_TOP_BY_DESIGN = {"hf": {"transformers"}}
NEVER = {"click"}  # typer vendors it: an exception of click's raised in a command ends in silence


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def place(name: str) -> int | None:
    """The line of ORDER with the longest entry that `name` is or lies under."""
    found = [
        (len(entry), line) for line, row in enumerate(ORDER) for entry in row if f"{name}.".startswith(f"{entry}.")
    ]
    return max(found)[1] if found else None


def imports(tree: ast.AST, *, typing: bool = True) -> Iterator[str]:
    """Dotted names that the code under `tree` imports; without `typing`, not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield from imports(node, typing=typing)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str, *, typing: bool = True) -> set[str]:
    """The modules of padconvert, relative to it, that file `name` imports anywhere."""
    found = set()
    for dotted in imports(tree(name), typing=typing):
        top, _, rest = dotted.partition(".")
        if top == "padconvert":
            found.add(rest if rest in FILES else rest.rpartition(".")[0])
    return found


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_a_file_imports_only_from_lines_above_its_own(name: str) -> None:
    here = place(name)
    assert here is not None, f"give {name} a line in ORDER"
    below = {imported for imported in own_imports(name) if (place(imported) or 0) > here}
    assert not below, f"{name} imports from below: {sorted(below)}"


def test_there_is_no_import_cycle() -> None:
    graph = {name: own_imports(name, typing=False) & set(FILES) - {name, ""} for name in FILES if name}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("name", list(FILES))
def test_third_parties_stay_where_they_belong(name: str) -> None:
    everywhere = {dotted.partition(".")[0] for dotted in imports(tree(name))}
    at_the_top = {
        dotted.partition(".")[0]
        for node in tree(name).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for dotted in imports(ast.Module([node], []))
    }
    assert not everywhere & NEVER
    assert not at_the_top & NEVER_AT_THE_TOP - AT_THE_TOP_BY_DESIGN.get(name, set())
    for party, homes in THIRD_PARTY_HOMES.items():
        at_home = any(f"{name}.".startswith(f"{home}.") for home in homes)
        assert at_home or party not in everywhere, f"{party} belongs to {homes}"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and decorators."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        total -= first.end_lineno - first.lineno + 1
    return total


def function_lengths() -> dict[str, int]:
    return {
        f"{name}:{node.name}": code_lines(node)
        for name in FILES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_functions_stay_short() -> None:
    lengths = function_lengths()
    assert median(lengths.values()) <= 12
    assert quantiles(lengths.values(), n=10)[-1] <= 35
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def test_files_stay_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: lines for name, lines in lengths.items() if lines > 400}


def modules_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running `code`."""
    tail = "\nimport sys as _s; print('|', *sorted({name.partition('.')[0] for name in _s.modules}))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("|")[2].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import padconvert", {"torch", "numpy", "typer", "rich", "transformers"}),
        ("import padconvert.plan, padconvert.options, padconvert.walk.info", {"torch", "typer", "rich"}),
        ("from padconvert.__main__ import main; assert main(['--help']) == 0", {"torch", "numpy", "transformers"}),
        ("from padconvert.__main__ import main; assert main(['convert', '--help']) == 0", {"torch", "numpy"}),
        ("from padconvert.__main__ import main; assert main(['policy', 'schema']) == 0", {"torch", "numpy"}),
    ],
)
def test_light_commands_import_no_torch(code: str, absent: set[str]) -> None:
    loaded = modules_after(code)
    assert "padconvert" in loaded
    assert not loaded & absent


def test_policy_check_imports_no_torch(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nextends: paper\ndefaults: {dynamic_ratio: 0.3}\n", encoding="utf-8")
    loaded = modules_after(
        f"from padconvert.__main__ import main; assert main(['policy', 'check', {str(policy)!r}]) == 0"
    )
    assert not loaded & {"torch", "numpy"}


def test_reading_a_manifest_needs_no_torch() -> None:
    """So that `inspect` of an artefact can start at once."""
    code = (
        "import sys; import padconvert.checkpoint.manifest, padconvert.checkpoint.header; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
