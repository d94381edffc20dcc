"""Rules of the house that a linter does not hold: sizes, names, and where things are."""

from __future__ import annotations

import ast
import statistics
from collections import defaultdict
from pathlib import Path

import kvdistill

PACKAGE = Path(kvdistill.__file__).parent
FILES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
MAX_FILES, MAX_LINES, MAX_FILE_LINES, MAX_FUNCTION_P90 = 194, 34_800, 450, 40


def test_the_package_can_be_held_in_mind():
    lengths = [len(text.splitlines()) for text in FILES.values()]
    assert len(FILES) <= MAX_FILES
    assert sum(lengths) <= MAX_LINES
    assert max(lengths) <= MAX_FILE_LINES
    assert 100 <= statistics.median(lengths) <= 250


def test_functions_are_short():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    )
    assert lengths[int(0.9 * len(lengths))] <= MAX_FUNCTION_P90


def test_no_class_or_function_name_is_defined_twice():
    places = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    places.pop("__getattr__", None)  # the hook by which a package loads lazily
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_a_file_name_occurs_twice_only_in_sibling_folders():
    folders = defaultdict(list)
    for path in FILES:
        if path.name != "__init__.py":
            folders[path.name].append(path.parent)
    for name, found in folders.items():
        assert len({folder.parent for folder in found}) == 1, (name, found)


def test_no_module_imports_itself_through_others():
    """Imports inside functions and for type checking count as well."""
    names = {_module(path): path for path in FILES}
    imported = {name: _imports(TREES[path], names) - {name} for name, path in names.items()}
    settled: set[str] = set()
    while settled != names.keys():
        free = {name for name in names.keys() - settled if imported[name] <= settled}
        assert free, f"a circle among {sorted(names.keys() - settled)}"
        settled |= free


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, names: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in names else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & names.keys()


NOT_FOR_STAGES = {
    "matplotlib", "scipy", "tensorboard", "dask", "xarray", "submitit", "jinja2", "click", "peft",
}  # fmt: skip
"""What reports, plots, inspection and the command line need. A GPU node can do without."""


def test_extraction_and_training_import_no_package_of_reports_and_plots():
    """Of kvdistill's own modules that ``benchmarks/device.py`` imports, one through another."""
    names = {_module(path): path for path in FILES}
    kit = [ast.parse(p.read_text()) for p in PACKAGE.parent.glob("benchmarks/device*.py")]
    pending = {name for tree in kit for name in _imports(tree, names)}
    assert {"kvdistill.pipelines.extract", "kvdistill.distill.train.trainer"} <= pending
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        reached.add(name)
        tree = ast.Module([x for x in ast.walk(TREES[names[name]]) if _runs_at_import(x)], [])
        found = {
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not {imported.split(".")[0] for imported in found} & NOT_FOR_STAGES, name
        pending |= _imports(tree, names) - reached


def _runs_at_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0


def test_every_file_with_a_branch_for_gpus_is_listed_with_its_check():
    page = (PACKAGE.parent / "docs/gpu.md").read_text(encoding="utf-8")
    for path, text in FILES.items():
        if "torch.cuda" in text or '"cuda"' in text:
            assert f"`{path.relative_to(PACKAGE)}`" in page
