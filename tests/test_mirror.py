"""The tests mirror the package: a test file is named after the module that it tests, and every module has one.

The tests of `devguard/<path>` lie in `tests/<path>`, and those that need simulated GPUs in `tests/placement/<path>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "devguard"
TREES = (ROOT / "tests", ROOT / "tests" / "placement")

# Folders that mirror nothing: tests of whole programs, of the documentation or in another environment; and helpers.
NOT_MIRRORED = {"docs", "examples", "helpers", "matrix", "others", "placement", "process", "sglang", "testing/planted"}
# Tests of the whole package, at the top.
SYSTEM_TESTS = {"test_imports.py", "test_mirror.py", "test_prose.py"}

# Modules, and packages, without test files of their own -> where they are tested instead.
TESTED_ELSEWHERE = {
    "__init__": "test_imports.py",
    "__main__": "test_imports.py runs `python -m devguard`",
    "_version": "it holds one constant",
    "demo/__init__": "it holds one exception class",
    "integrations/sglang": "tests/sglang, in an environment with SGLang",
}


def has_code(path: Path) -> bool:
    """Return whether a module holds more than a docstring."""
    return re.sub(r'\A"""[^"]*"""\s*', "", path.read_text()) != ""


def module_names(folder: str) -> dict[str, str]:
    """Return the names by which test files may call the modules of one package, and their paths inside devguard.

    A C source counts as a module of its package. The code of an ``__init__.py`` goes by the name of its package.
    """
    package = PACKAGE / folder
    found = {path.stem: path.stem for path in (*package.glob("csrc/*.c"), *package.glob("*.py"))}
    if found.pop("__init__", None) and has_code(package / "__init__.py"):
        found.setdefault(package.name, "__init__")
    return {name: (Path(folder) / stem).as_posix() for name, stem in found.items()}


def files_and_modules() -> Iterator[tuple[Path, str, str | None]]:
    """Return each mirrored test file with its package and its module; None for a file that names no module."""
    for tree in TREES:
        for path in sorted(tree.rglob("test_*.py")):
            inside = path.relative_to(tree)
            if {parent.as_posix() for parent in inside.parents} & NOT_MIRRORED or inside.as_posix() in SYSTEM_TESTS:
                continue
            folder = inside.parent.as_posix()
            known = module_names(folder)
            words = path.stem.split("_")[1:]
            names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]  # the longest name counts
            yield path, folder, next((known[name] for name in names if name in known), None)


def test_every_test_file_is_named_after_a_module() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: no module of devguard/{folder} has that name. Call it test_<module>.py or "
        f"test_<module>_<aspect>.py, after one of: {', '.join(sorted(module_names(folder))) or 'none'}."
        for path, folder, module in files_and_modules()
        if module is None
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_test_file() -> None:
    tested = {module for path, _, module in files_and_modules() if module and "def test_" in path.read_text()}
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py") if has_code(path)}
    elsewhere = {module for module in modules if {module, module.rpartition("/")[0]} & TESTED_ELSEWHERE.keys()}
    missing = []
    for module in sorted(modules - tested - elsewhere):
        folder, _, name = module.rpartition("/")
        name = Path(folder).name if name == "__init__" else name
        twin = (Path("tests") / folder / f"test_{name}.py").as_posix()
        missing.append(f"devguard/{module}.py: add {twin}, or the same below tests/placement for simulated GPUs.")
    assert not missing, "\n".join(missing)
    outdated = sorted(elsewhere & tested)
    assert not outdated, f"{', '.join(outdated)}: has a test file now, so remove it from TESTED_ELSEWHERE."
