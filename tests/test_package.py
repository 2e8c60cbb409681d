"""What is installed, and who imports whom. Imports are checked in fresh interpreters."""

import ast
import importlib.metadata
import importlib.util
import inspect
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from llmdoctor.profile import load_profile

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]  # module -> folder
ENGINE = sorted(
    ".".join(path.relative_to(ROOT / "llmdoctor").with_suffix("").parts)
    for path in (ROOT / "llmdoctor").rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)
SCREEN = {"typer", "click", "rich", "textual"}


def sources() -> dict[str, Path]:
    """Every file of the folders, by the name under which it should be installed."""
    return {
        str(Path(*module.split("."), path.relative_to(ROOT / folder))): path
        for module, folder in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def names_imported(path: Path) -> set[str]:
    """Every name that the file imports, in full, also inside functions and for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_source_file_is_in_the_wheel_and_nothing_else(tmp_path):
    """Built by pip from a copy of the tree, as a user's ``pip install`` does: old build folders cannot lend a file."""
    tree = tmp_path / "tree"
    for source in [*sources().values(), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        target = tree / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    try:
        offline = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77  # pyproject's own requirement
    except importlib.metadata.PackageNotFoundError:
        offline = False
    if offline:
        build.append("--no-build-isolation")
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("llmdoctor_guided-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "llmdoctor = llmdoctor.__main__:run" in archive.read(entry_points).decode()
    expected = sources()
    assert set(held) == set(expected)
    assert [name for name, path in expected.items() if held[name] != path.read_bytes()] == []
    for name in (
        "llmdoctor/py.typed",
        "llmdoctor/cli/main.py",
        "llmdoctor/show/rewards.html",
        "llmdoctor/tui/__init__.py",
    ):
        assert name in held
    assert {"clinic", "paper", "qwen2.5-7b"} <= {Path(name).stem for name in held if name.endswith(".yaml")}


def test_the_clinic_is_there_and_small():
    """Everything the default profile names comes with the package, in at most 12 MB and without a pickle."""
    clinic = [path for path in (ROOT / "profiles" / "clinic").rglob("*") if path.is_file()]
    profile = load_profile("clinic")
    named = [profile.patient.model, profile.train.doctor, profile.data.source]
    named += [doctor.checkpoint for doctor in profile.doctors.values()]
    assert [path for path in named if not Path(path).exists()] == [], "the clinic is not complete: make clinic"
    assert {"helpful", "safe"} <= set(profile.doctors)
    assert sum(path.stat().st_size for path in clinic) <= 12_000_000
    assert {path.suffix for path in clinic} & {".bin", ".pt", ".pth", ".pkl", ".pickle"} == set()


def test_the_packages_listed_are_the_folders_on_disk():
    """A subpackage that is missing from the list is silently absent from the wheel."""
    found = {
        ".".join([module, *path.parent.relative_to(ROOT / folder).parts])
        for module, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize(
    "code",
    [
        "import llmdoctor; llmdoctor.PreferencePair, llmdoctor.Guidance, llmdoctor.__version__, dir(llmdoctor)",
        "import llmdoctor.cli.main",
        "import sys; sys.argv = ['llmdoctor', '--help']\n"
        "from llmdoctor.cli.main import run\n"
        "try: run()\nexcept SystemExit as end: assert not end.code, end.code",
        "import sys; sys.argv = ['llmdoctor', 'chat', '--help']\n"
        "from llmdoctor.cli.main import run\n"
        "try: run()\nexcept SystemExit as end: assert not end.code, end.code",
    ],
    ids=["import llmdoctor", "import cli", "--help", "chat --help"],
)
def test_the_start_is_free_of_torch(code: str):
    heavy = ("torch", "transformers", "peft", "accelerate", "datasets", "textual", "pyarrow")
    out = python(f"{code}\nimport sys; print('LOADED', [m for m in {heavy} if m in sys.modules])")
    assert out.splitlines()[-1] == "LOADED []"
    if "--help" in code:
        assert "Usage" in out


def test_the_engine_loads_no_user_interface_and_every_public_name():
    """All engine modules in one interpreter. Not asserted for rich: a library below may load it for its own bars.

    (None does with the versions tried.) That the engine itself does not is the next test.
    """
    without = set() if importlib.util.find_spec("starlette") else {"serving.api"}  # which is an extra
    without |= {"serving.vllm_v1", "serving.vllm_v2"}  # which vLLM alone loads
    imports = "\n".join(f"import llmdoctor.{name}" for name in ENGINE if name not in without)
    ui = ("typer", "textual", "llmdoctor.cli", "llmdoctor.show", "llmdoctor.tui")
    out = python(
        f"import sys, llmdoctor\n{imports}\nfrom llmdoctor import *\n"
        f"print([m for m in {ui} if m in sys.modules], 'torch' in sys.modules)\n"
        "print([n for n in llmdoctor.__all__ if n not in globals()], set(llmdoctor.__all__) - set(dir(llmdoctor)))\n"
        "try: llmdoctor.nothing\nexcept AttributeError as e: print(e)"
    )
    assert out.splitlines() == ["[] True", "[] set()", "module 'llmdoctor' has no attribute 'nothing'"]


@pytest.mark.parametrize("module", ENGINE)
def test_an_engine_source_names_no_user_interface(module: str):
    """Also not inside a function, where no import above would show it; and nothing is printed."""
    path = (ROOT / "llmdoctor" / Path(*module.split("."))).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "input"}
    imported = names_imported(path)
    assert {name for name in imported if name.split(".")[0] in SCREEN} == set()
    assert {name for name in imported if name.startswith(("llmdoctor.cli", "llmdoctor.show", "llmdoctor.tui"))} == set()


@pytest.mark.parametrize(
    ("folder", "forbidden", "door"),
    [
        ("show", {"typer", "click", "textual", "torch", "transformers", "llmdoctor.cli", "llmdoctor.tui"}, None),
        ("tui", {"typer", "click", "llmdoctor.cli"}, None),
        ("cli", {"textual", "llmdoctor.tui"}, "llmdoctor.tui.launch"),
    ],
)
def test_the_command_line_and_the_app_meet_in_show_and_at_one_door(folder: str, forbidden: set[str], door: str | None):
    """Neither knows the other's insides, also not inside functions; ``show``, which both use, knows neither."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    crossed = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in names_imported(path)
        if any(f"{name}.".startswith(f"{module}.") for module in forbidden)
        if door is None or not f"{name}.".startswith(f"{door}.")
    }
    assert crossed == set()


def test_show_loads_no_torch_and_no_other_user_interface():
    modules = [f"llmdoctor.show.{path.stem}" for path in (ROOT / "show").glob("*.py") if path.stem != "__init__"]
    heavy = ("torch", "transformers", "typer", "textual", "jinja2", "llmdoctor.cli", "llmdoctor.tui")
    imports = "\n".join(f"import {module}" for module in modules)
    out = python(f"{imports}\nimport sys; print(len(sys.argv), [m for m in {heavy} if m in sys.modules])")
    assert out.splitlines() == ["1 []"]


def test_the_texts_module_exports_all_its_functions():
    from llmdoctor.show import text

    own = {name for name, held in vars(text).items() if inspect.isfunction(held) and held.__module__ == text.__name__}
    assert {name for name in own if not name.startswith("_")} <= set(text.__all__)
