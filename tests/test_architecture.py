"""The house, as docs/architecture.md draws it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "orchestrator").rglob("*.py"))
MAY_IMPORT_RAY = {"schedulers.py", "session.py", "submit.py"}
"""And those whose name ends with on_ray.py."""


def imported_names(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_ray_files_import_ray(path: Path) -> None:
    uses_ray = any(name == "ray" or name.startswith("ray.") for name in imported_names(path))
    assert not uses_ray or path.name in MAY_IMPORT_RAY or path.name.endswith("on_ray.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    assert not imported_names(path) & {"pickle", "cloudpickle", "joblib", "dill", "shelve"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a module starts with its docstring"
    assert len(text.splitlines()) <= 450, "is it still one room?"


def test_the_recipe_parses_without_torch_or_ray() -> None:
    code = (
        "import sys, orchestrator.recipe, orchestrator.records, orchestrator.errors, orchestrator.cli\n"
        "print([m for m in ('ray', 'torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


def test_the_stages_come_without_plots() -> None:
    """A command that draws nothing does not wait for matplotlib."""
    code = "import sys, orchestrator.pipeline, orchestrator.evaluate; print('matplotlib' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "False"


def test_every_verb_is_a_command_and_a_job() -> None:
    from orchestrator.cli import VERBS, app

    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert set(VERBS) <= commands
    assert set(VERBS) <= jobs


def test_the_readme_tree_names_every_file_of_the_rooms() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in MODULES:
        if path.name != "__init__.py":
            assert path.name in readme, f"{path.relative_to(ROOT)} is missing in the README's tree"
