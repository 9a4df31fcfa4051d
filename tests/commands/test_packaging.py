"""Source distribution, wheel, editable installation, and the package without its compiled extension.

One source distribution is unpacked into a folder whose name has a space, and compiled there once. Each
installation goes into a virtual environment of its own, which sees the packages of this one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

import pysupcon

ROOT = Path(__file__).resolve().parents[2]
TOP = ["csrc", "configs", "pysupcon"]
PURE = {"PYSUPCON_EXTENSION": "0", "CXX": "no-such-compiler"}
# Two classes of two equal rows: an anchor has one positive, of similarity 1, and two negatives, of 0.
PROGRAM = """
import math, torch, pysupcon
from pysupcon import named_configs
from pysupcon.pairs import extension
loss = pysupcon.SupConLoss(temperature=1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
assert abs(loss.item() - math.log1p(2 / math.e)) < 1e-6, loss
assert len(named_configs.names()) > 100
library = extension._find()
backend = pysupcon.backends()["cpu"]
assert backend["available"] == (library is not None), backend
assert library is None or extension.built_with(library) == torch.__version__
print(pysupcon.__version__, library is not None, pysupcon.__file__)
"""


def environment(**variables: str) -> dict[str, str]:
    """Without PYTHONPATH, which may lead to another copy of the package."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYSUPCON_CUDA": "0", **variables}


def run(*command: object, folder: Path, status: int = 0, **variables: str) -> str:
    """Standard output of a command; with another status than 0, standard error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment(**variables), capture_output=True, text=True)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr if status else done.stdout


class Venv:
    """A virtual environment with the packages of this one, except for its installation of pysupcon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
        self.python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        self.site = site
        # Files *.pth in these folders, such as that of an editable installation, have no effect.
        paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (site / "others.pth").write_text("\n".join(paths))

    def install(self, *what: object, **variables: str) -> str:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "-v"]
        pip += ["--no-build-isolation", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
        return run(*pip, *what, folder=self.folder, **variables)

    def use(self) -> tuple[bool, Path]:
        """Whether the compiled extension is there, and the package's file."""
        output = run(self.python, "-W", "ignore", "-c", PROGRAM, folder=self.folder)
        version, compiled, file = output.strip().splitlines()[-1].split(maxsplit=2)
        assert version == pysupcon.__version__
        return compiled == "True", Path(file)


@pytest.fixture
def venv(tmp_path: Path) -> Venv:
    return Venv(tmp_path / "venv")


def copy_of_the_tree(folder: Path) -> Path:
    folder.mkdir()
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, folder)
    for name in TOP:
        keep_data = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=keep_data)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution."""
    folder = tmp_path_factory.mktemp("with space")
    tree = copy_of_the_tree(folder / "tree")
    build = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    name = run(sys.executable, "-c", build, folder=tree, **PURE).strip().splitlines()[-1]
    with tarfile.open(tree / "dist" / name) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    for file in [path for name in ("csrc", "configs") for path in (tree / name).rglob("*") if path.is_file()]:
        assert (unpacked / file.relative_to(tree)).is_file(), file
    return unpacked


@pytest.fixture(scope="module")
def compiled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """An environment into which the source distribution was compiled, without CUDA."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made = Venv(tmp_path_factory.mktemp("compiled") / "venv")
    made.install(source, CXX="g++")
    return made


@pytest.mark.slow
def test_a_pure_wheel_works_without_a_compiler(source: Path, venv: Venv) -> None:
    venv.install(source, **PURE)
    assert venv.use() == (False, venv.site / "pysupcon" / "__init__.py")
    (info,) = venv.site.glob("pysupcon-*.dist-info")
    assert info.name == f"pysupcon-{pysupcon.__version__}.dist-info"
    assert (info / "licenses/LICENSE").is_file()
    assert "Root-Is-Purelib: true" in (info / "WHEEL").read_text()
    assert (venv.site / "pysupcon/py.typed").is_file()
    assert not list(venv.site.glob("pysupcon/**/*.so"))


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution(compiled: Venv) -> None:
    assert compiled.use() == (True, compiled.site / "pysupcon" / "__init__.py")
    (info,) = compiled.site.glob("pysupcon-*.dist-info")
    files = {line.partition(",")[0] for line in (info / "RECORD").read_text().splitlines()}
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"..", "pysupcon", info.name}  # ../../../bin/pysupcon
    assert len([name for name in files if name.endswith(".so")]) == 1
    for file in (ROOT / "configs").rglob("*.yaml"):
        name = f"pysupcon/{file.relative_to(ROOT).as_posix()}"
        assert name in files
        assert (compiled.site / name).read_bytes() == file.read_bytes()
    for module in (ROOT / "pysupcon").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in files


@pytest.mark.slow
def test_commands_of_an_installation_take_names_of_configs(compiled: Venv, tmp_path: Path) -> None:
    command = [compiled.folder / "bin" / "pysupcon", "train", "--config"]
    error = run(*command, "digits_smok", folder=tmp_path, status=2)
    assert "digits_smok cannot be read: " in error
    assert "similar names: digits_smoke" in error
    module = [compiled.python, "-m", "pysupcon.train"]
    run(*module, "--config", "digits_smoke", "--trainer.dry_run", "true", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_editable_installation_compiles_nothing_again(source: Path, compiled: Venv, venv: Venv) -> None:
    objects = {path: path.stat().st_mtime_ns for path in source.glob("build/ninja-*/*.o")}
    assert len(objects) > 5
    venv.install("-e", source, CXX="g++")
    assert {path: path.stat().st_mtime_ns for path in objects} == objects
    assert venv.use() == (True, source / "pysupcon" / "__init__.py")
    assert list(source.glob("pysupcon/_C*.so"))


def read_only(folder: Path) -> list[str]:
    """A command that runs its arguments while ``folder`` is mounted without permission to write, or skips."""
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/file" && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare --mount")
    return command


@pytest.mark.slow
def test_a_checkout_that_is_read_only(venv: Venv, tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    pip = [sys.executable, "-m", "pip", "--python", venv.python, "install", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--ignore-installed", tree]
    run(*read_only(tree), *pip, folder=tmp_path, TMPDIR=str(temporary), **PURE)
    assert venv.use() == (False, venv.site / "pysupcon" / "__init__.py")
    assert list(temporary.iterdir()) == []
    assert {path.name for path in tree.iterdir()}.isdisjoint(("build", "pysupcon.egg-info"))


@pytest.fixture
def setup_program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; its call of setuptools.setup does nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_program", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_each_variant_has_a_folder_of_its_own(setup_program: ModuleType) -> None:
    """Otherwise a build without CUDA would take the library of an earlier build with CUDA, or the reverse."""
    name: Callable[[str, list[str]], str] = setup_program.variant
    variants = [("2.14.1", []), ("2.14.1", ["80"]), ("2.14.1", ["80", "90"]), ("2.14.1", ["80", "90a"])]
    variants += [("2.14.1+cpu", []), ("2.11.0", [])]
    folders = [name(*variant) for variant in variants]
    assert len(set(folders)) == len(variants)
    assert folders[0] == f"ninja-{sys.implementation.cache_tag}-torch2.14.1-cpu"
    assert folders[2] == f"ninja-{sys.implementation.cache_tag}-torch2.14.1-cuda80-90"


def test_the_folder_of_the_build(
    setup_program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_program, "ROOT", tmp_path)
    assert setup_program.build_folder() == tmp_path / "build"
    assert setup_program.options_of_setuptools() == {}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert setup_program.build_folder() == tmp_path / "cache" / "pysupcon"
    options = setup_program.options_of_setuptools()
    assert Path(options["build"]["build_base"]).is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert setup_program.build_folder() == tmp_path / "home" / ".cache" / "pysupcon"
    (tmp_path / "build").mkdir()  # writable, in a checkout that is not
    assert setup_program.build_folder() == tmp_path / "build"


@pytest.mark.parametrize("variable", ["PYSUPCON_EXTENSION", "PYSUPCON_CUDA"])
def test_a_variable_that_is_neither_0_nor_1(variable: str, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    error = run(*command, folder=ROOT, status=1, **{variable: "no"})
    assert f"\npysupcon: {variable} must be 0, 1 or unset, got 'no'\n" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_missing_compiler_names_the_variable(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "out"]
    tree = copy_of_the_tree(tmp_path / "tree")
    error = run(*command, folder=tree, status=1, CXX="no-such-compiler")
    assert "'no-such-compiler' was not found" in error
    assert "PYSUPCON_EXTENSION=0" in error


def test_every_file_that_the_build_reads_is_an_input_of_make_setup() -> None:
    rule = re.search(r"^\$\(EXTENSION\): (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    assert {"setup.py", "$(wildcard", "csrc/*.py)", "$(SOURCES)"} <= set(rule[1].split())
