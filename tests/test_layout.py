"""The house rules that tools do not know: packaging, the direction of imports, what may be imported when."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import bismooth

ROOT = Path(__file__).parents[1]
FOLDERS = ("export", "passes", "engines", "calibrators", "tools")
"""Lowest first: a folder imports from itself and from those before it."""

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGE_DIR: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
MODULES = sorted(module for folder in FOLDERS for module in (ROOT / folder).rglob("*.py"))
DATA = sorted(
    file
    for folder in FOLDERS
    for kind in ("json", "yaml", "html", "css", "js", "md")
    for file in (ROOT / folder).rglob(f"*.{kind}")
)

ENGINES = ["onnxruntime", "tensorrt", "tensorrt_rtx"]
GRAPHS = ["gguf", "onnx", "onnx_graphsurgeon", "onnx_ir", "onnxscript", "safetensors"]
HEAVY = ["numpy", "tokenizers", "torch", "transformers", "jinja2", "plotly", *GRAPHS, *ENGINES]


def test_every_package_on_disk_is_packaged() -> None:
    on_disk = {f"bismooth.{'.'.join(file.parent.relative_to(ROOT).parts)}" for file in [*MODULES, *DATA]} | {"bismooth"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_package_has_an_init() -> None:
    assert all((module.parent / "__init__.py").is_file() for module in MODULES)


def test_the_package_map_and_the_links_agree() -> None:
    links = {f"bismooth.{link.name}": link for link in (ROOT / "src/bismooth").iterdir() if link.is_symlink()}
    folders = {name: folder for name, folder in PACKAGE_DIR.items() if name.count(".") == 1}
    assert set(links) == set(folders) == {f"bismooth.{folder}" for folder in FOLDERS}
    for name, link in links.items():
        assert link.readlink() == Path("../..") / folders[name]


def test_the_wheel_holds_every_module_and_data_file_under_one_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in (*FOLDERS, "src"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"bismooth/{file.relative_to(ROOT).as_posix()}" for file in [*MODULES, *DATA]}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == expected | {f"bismooth/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that ``module`` imports from this project."""
    package = ("bismooth", *module.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            path = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{path}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_imports_go_one_way(module: Path) -> None:
    """``export <- passes <- engines <- calibrators <- tools``."""
    level = FOLDERS.index(module.relative_to(ROOT).parts[0])
    for line, name in imports(module):
        first, _, rest = name.partition(".")
        where = f"{module.relative_to(ROOT)}:{line}"
        assert first not in FOLDERS, f"{where} imports {name}. Import relatively: from ..{name} import …"
        if first == "bismooth" and rest:
            folder = rest.partition(".")[0]
            assert folder in FOLDERS[: level + 1], f"{where} imports {name}, but {FOLDERS[level]} is below {folder}."


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(module: Path) -> None:
    tree = ast.parse(module.read_text("utf-8"))
    absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names = [str(node.module) for node in absolute]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.partition(".")[0] == "bismooth"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compile", "--help"], ["--version"], ["recipes", "w8a8"]])
def test_the_command_line_starts_with_the_base_dependencies(arguments: list[str]) -> None:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY}));"  # None: importing it raises ModuleNotFoundError
        f"from bismooth.tools.cli import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_command_line_starts_well_under_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bismooth"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1


@pytest.mark.parametrize("stage", ["calibrators.run", "passes.quantize", "engines.tensorrt", "tools.stages"])
def test_stages_behind_the_export_do_without_its_libraries(stage: str) -> None:
    """Each of these takes as long to import as such a stage takes on a small model."""
    script = (
        f"import sys, bismooth.{stage}; print({{'torch', 'transformers', 'onnx_ir', 'onnxscript'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_generating_takes_no_library_but_numpy_and_tokenizers() -> None:
    others = [name for name in HEAVY if name not in ("numpy", "tokenizers")]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({others})); import bismooth.tools.chat, "
        "bismooth.tools.generate, bismooth.tools.bench_engines, bismooth.tools.bench_worker"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    script = "import sys; before = set(sys.modules); import bismooth; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    new = done.stdout.split()
    assert [name for name in new if name.partition(".")[0] not in sys.stdlib_module_names] == ["bismooth"]


def test_the_public_names_are_declared_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "src/bismooth/__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported | {"__version__"} == set(bismooth.__all__) == set(dir(bismooth))


def test_the_public_names_load_when_used() -> None:
    assert bismooth.Recipe is import_module("bismooth.passes.recipe").Recipe
    assert bismooth.BismoothError is import_module("bismooth.export.errors").BismoothError
    assert bismooth.__version__ == PROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="module 'bismooth' has no attribute 'exprot'"):
        bismooth.exprot  # noqa: B018
