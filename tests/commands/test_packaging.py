"""Source distribution, wheel and the package without its compiled extension."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ["csrc", "configs", "pysupcon"]


def run(code: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYSUPCON_CUDA": "0", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def copy_of_the_tree(folder: Path) -> Path:
    folder.mkdir()
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, folder)
    for name in TOP:
        keep_data = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=keep_data)
    return folder


@pytest.mark.slow
def test_sdist_builds_a_pure_wheel_that_works_without_a_compiler(tmp_path):
    tree = copy_of_the_tree(tmp_path / "with space")
    build = "import setuptools.build_meta as b; print(b.build_{}('dist'))"
    pure = {"PYSUPCON_EXTENSION": "0", "CXX": "no-such-compiler"}
    with tarfile.open(tree / "dist" / run(build.format("sdist"), tree, **pure)) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    for file in [path for name in ("csrc", "configs") for path in (tree / name).rglob("*") if path.is_file()]:
        assert (source / file.relative_to(tree)).is_file(), file

    installed = tmp_path / "installed"
    with zipfile.ZipFile(source / "dist" / run(build.format("wheel"), source, **pure)) as wheel:
        wheel.extractall(installed)
    (info,) = installed.glob("*.dist-info")
    assert (installed / "pysupcon/py.typed").is_file()
    assert (info / "licenses/LICENSE").is_file()
    assert "pysupcon.__main__:main" in (info / "entry_points.txt").read_text()
    code = (
        "import sys; sys.modules['pysupcon._C'] = None\n"  # an editable installation may provide it
        "import pysupcon, torch\n"
        "x = torch.nn.functional.normalize(torch.randn(8, 2, 4), dim=-1)\n"
        "loss = pysupcon.SupConLoss()(x, torch.arange(8) % 2)\n"
        "assert loss.isfinite() and not pysupcon.backends()['cpu']['available']\n"
        "print(pysupcon.__version__, pysupcon.__file__)"
    )
    for file in (tree / "configs").rglob("*.yaml"):
        assert (installed / "pysupcon" / file.relative_to(tree)).read_bytes() == file.read_bytes()
    version, path = run(code, installed, PYTHONPATH=str(installed)).split(maxsplit=1)
    assert Path(path).is_relative_to(installed)
    assert info.name == f"pysupcon-{version}.dist-info"
    started = subprocess.run(
        [sys.executable, "-m", "pysupcon.train", "--config", "digits_smoke", "--trainer.dry_run", "true"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr


@pytest.mark.slow
def test_missing_compiler_names_the_variable(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out")],
        cwd=copy_of_the_tree(tmp_path / "tree"),
        env={**os.environ, "PYSUPCON_CUDA": "0", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "'no-such-compiler' was not found" in done.stderr
    assert "PYSUPCON_EXTENSION=0" in done.stderr
