"""The wheel: what is in it, what is not, and that it works on its own."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email.message import Message
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import vtok

ROOT = Path(__file__).parent.parent
PACKAGES = {"vtok": "vtok", "vtok_adapters": "adapters", "vtok_kernels": "kernels", "vtok_eval": "eval"}
"""Import name -> top-level folder (the parent of the package, except for vtok itself)."""
EXTRAS = {"all", "assemble", "dev", "eval", "export", "lmms", "lora", "tokenizers", "vllm", "xformers"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built offline from a copy, so that no build folder is left in the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vtok", "adapters", "kernels", "eval", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stderr, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_string(_dist_info(wheel, "METADATA"))


def _dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def _modules(wheel: zipfile.ZipFile) -> list[str]:
    return [path for path in wheel.namelist() if ".dist-info/" not in path]


DATA = {
    "vtok_eval": ("data/**/*", "lmms_tasks/*.yaml", "lmms_tasks/*.jsonl", "render/page.*"),
    "vtok_kernels": ("csrc/*.cu",),
}
"""What is no Python: sprites, tasks, weights, the report's style and script, CUDA C++."""


def test_every_import_name_begins_with_vtok(wheel: zipfile.ZipFile) -> None:
    assert {path.split("/")[0] for path in _modules(wheel)} == set(PACKAGES)
    assert all(name.startswith("vtok") for name in PACKAGES)


def test_every_source_file_is_in_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for name, folder in PACKAGES.items():
        package = ROOT / name if name == folder else ROOT / folder / name
        files = [*package.rglob("*.py"), *package.rglob("py.typed")]
        files += [file for pattern in DATA.get(name, ()) for file in package.glob(pattern) if file.is_file()]
        expected |= {f"{name}/{file.relative_to(package).as_posix()}" for file in files}
    assert set(_modules(wheel)) == expected
    parts = {part for path in wheel.namelist() for part in path.split("/")}
    assert not {part for part in parts if part.startswith(("test", "conftest"))}


def test_typed_and_licensed(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert {f"{name}/py.typed" for name in PACKAGES} <= set(wheel.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in _dist_info(wheel, "licenses/LICENSE")
    # a licence classifier beside a licence expression is an error for setuptools and for package indexes
    assert not [line for line in metadata.get_all("Classifier", []) if line.startswith("License")]


def test_metadata(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("vtok", vtok.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    required = " ".join(line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line)
    for name in ("torch>=2.11", "transformers>=5.17", "timm", "open-clip-torch", "pillow", "rich", "typer"):
        assert name in required
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_entry_points_lead_somewhere(wheel: zipfile.ZipFile) -> None:
    parser = ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # names are case-sensitive
    parser.read_string(_dist_info(wheel, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == {"vtok": "vtok.cli:main"}
    built_in = {name: cls for name, cls in parser["vtok.adapters"].items() if cls.startswith("vtok_adapters.")}
    for name, target in built_in.items():
        assert _loaded(target).family == name
    assert callable(_loaded("vtok.cli:main"))
    # every family of this installation comes from an entry point: nothing is listed by hand anywhere else
    assert set(built_in) <= set(vtok.families())


def _loaded(target: str) -> Any:
    module, name = target.split(":")
    return getattr(import_module(module), name)


def test_the_wheel_works_on_its_own(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked far from the sources it finds its methods, its families and its command."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import vtok, vtok.cli, vtok_adapters, vtok_eval, vtok_kernels, pathlib;"
        "site = pathlib.Path('site').resolve();"
        "assert all(site in pathlib.Path(m.__file__).parents for m in (vtok, vtok_adapters, vtok_eval, vtok_kernels));"
        "print(*vtok.methods()); print(*vtok.families())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    methods, families = (line.split() for line in done.stdout.splitlines()[-2:])
    built_in = {name for name in vtok.methods() if vtok.method.registry()[name].__module__.startswith("vtok.")}
    assert set(methods) >= built_in
    assert set(families) >= {"llava", "qwen2_5_vl", "timm_vit"}


def test_arrows_go_one_way() -> None:
    """kernels <- vtok <- adapters, eval: nobody imports what stands above it."""
    may_import = {
        "vtok_kernels": set(),
        "vtok": {"vtok_kernels"},
        "vtok_adapters": {"vtok"},
        "vtok_eval": {"vtok", "vtok_kernels"},
    }
    for name, folder in PACKAGES.items():
        package = ROOT / name if name == folder else ROOT / folder / name
        for file in package.rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]) and len(words) > 1:
                    top = words[1].split(".")[0].rstrip(",")
                    assert top not in set(PACKAGES) - {name} - may_import[name], f"{file}: {line.strip()}"
    for file in (ROOT / "adapters").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(("from vtok.", "from vtok ")):
                assert line.split()[1] in ("vtok.protocol", "vtok.errors"), f"{file}: {line}"


def test_the_settings_file_is_in_order() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == vtok.__version__
    assert set(project["optional-dependencies"]) == EXTRAS
