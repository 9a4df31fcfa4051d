"""csrc/find_cuda.py: which nvcc is used, and the messages about those that cannot be used."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import find_cuda  # noqa: E402
from find_cuda import PARTS, PIP_LINE  # noqa: E402

# A fake nvcc. It compiles only if its folder has a file named compiles; else it prints an error.
NVCC = """#!/bin/sh
top=$(dirname "$0")/..
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --dryrun*) echo "#$ TOP=$top" >&2 ;;
  *) test -e $top/compiles || {{ echo "In file x:" >&2; echo "error: old gcc" >&2; echo bye >&2; exit 1; }} ;;
esac
"""


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def put_nvcc(top: Path, version: str = "13.0") -> str:
    nvcc = top / "bin" / "nvcc"
    touch(nvcc, NVCC.format(version=version))
    nvcc.chmod(0o755)
    touch(top / "compiles")
    return str(nvcc)


def toolkit(top: Path, version: str = "13.0") -> str:
    """Create an ordinary toolkit in ``top``. Returns its nvcc."""
    touch(top / "lib64" / "libcudart_static.a")
    return put_nvcc(top, version)


def pip_packages(site: Path, names: list[str], runtime: int = 13000) -> Path:
    """Create the files of pip packages of CUDA 13 in a site-packages. Returns their common folder."""
    top = site / "nvidia" / "cu13"
    for name in names:
        if name == "nvidia-cuda-nvcc":
            put_nvcc(top)
            continue
        touch(top / PARTS[name][0])
        if name == "nvidia-cuda-runtime":
            touch(top / "include/cuda_runtime_api.h", f"#define CUDART_VERSION  {runtime}\n")
            touch(top / "lib/libcudart_static.a")
    return top


ALL = ["nvidia-cuda-nvcc", *PARTS]


@pytest.fixture(autouse=True)
def _no_nvcc_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if find_cuda.find_programs("nvcc", (), ()):
        pytest.skip("an nvcc lies in /usr/bin or /bin, where it cannot be hidden")


def test_packages_of_cuda_13_are_a_toolkit(tmp_path: Path) -> None:
    top = pip_packages(tmp_path, ALL)
    found, detail = find_cuda.find_cuda((), [str(tmp_path / "none"), str(tmp_path)])
    assert found == (str(top / "bin/nvcc"), "13.0", [], top / "lib")
    assert detail == "nvcc 13.0"


def test_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVCC, PATH, CUDA_HOME, /usr/local/cuda, pip: each is used if those before it do not exist."""
    tops = {name: tmp_path / name for name in ("named", "path", "home", "usual")}
    nvccs = {name: toolkit(top) for name, top in tops.items()}
    nvccs["pip"] = str(pip_packages(tmp_path, ALL) / "bin/nvcc")
    monkeypatch.setenv("NVCC", nvccs["named"])
    monkeypatch.setenv("PATH", f"{tops['path'] / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tops["home"]))
    taken = []
    for forget in ("NVCC", "PATH", "CUDA_HOME", "usual", "pip"):
        found, _ = find_cuda.find_cuda([str(tops["usual"])], [str(tmp_path)])
        assert found is not None
        taken.append(found.nvcc)
        if forget == "PATH":
            monkeypatch.setenv("PATH", "/usr/bin:/bin")
        elif forget == "usual":
            (tops["usual"] / "bin" / "nvcc").unlink()
        else:
            monkeypatch.delenv(forget, raising=False)
    assert taken == list(nvccs.values())


def test_the_first_site_and_its_newest_cuda_come_first(tmp_path: Path) -> None:
    for folder in ("a/nvidia/cu9", "a/nvidia/cu13", "b/nvidia/cu14", "b/nvidia/cudnn"):
        put_nvcc(tmp_path / folder)
    sites = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = [Path(path).parts[-4:-2] for path in find_cuda.find_programs("nvcc", (), sites)]
    assert found == [("nvidia", "cu13"), ("nvidia", "cu9"), ("nvidia", "cu14")]


@pytest.mark.parametrize("missing", list(PARTS))
def test_a_missing_package_is_named(missing: str, tmp_path: Path) -> None:
    pip_packages(tmp_path, [name for name in ALL if name != missing])
    found, detail = find_cuda.find_cuda((), [str(tmp_path)])
    assert found is None
    assert f"pip's {missing} is missing" in detail
    assert PIP_LINE in detail


def test_packages_in_two_sites_complete_each_other(tmp_path: Path) -> None:
    """A virtual environment with nvcc that extends an installation with torch and its CUDA runtime."""
    nvcc = pip_packages(tmp_path / "venv", [name for name in ALL if name != "nvidia-cuda-runtime"])
    runtime = pip_packages(tmp_path / "base", ["nvidia-cuda-runtime"])
    found, _ = find_cuda.find_cuda((), [str(tmp_path / "venv"), str(tmp_path / "base")])
    flags = [f"-isystem={runtime / 'include'}"]
    assert found == (str(nvcc / "bin/nvcc"), "13.0", flags, runtime / "lib")


def test_nvcc_uses_no_compiler_of_another_site(tmp_path: Path) -> None:
    """Flags can name headers and libraries, but nvcc finds cicc only in its own toolkit folder."""
    pip_packages(tmp_path / "venv", [name for name in ALL if name != "nvidia-nvvm"])
    pip_packages(tmp_path / "base", ["nvidia-nvvm"])
    found, detail = find_cuda.find_cuda((), [str(tmp_path / "venv"), str(tmp_path / "base")])
    assert found is None
    assert "nvidia-nvvm" in detail


def test_a_runtime_of_another_version_is_refused(tmp_path: Path) -> None:
    pip_packages(tmp_path, ALL, runtime=13020)
    found, detail = find_cuda.find_cuda((), [str(tmp_path)])
    assert found is None
    assert "nvcc is 13.0, but pip's nvidia-cuda-runtime is 13.2" in detail
    assert PIP_LINE in detail


def test_packages_of_cuda_12_have_no_nvcc(tmp_path: Path) -> None:
    touch(tmp_path / "nvidia/cuda_nvcc/bin/ptxas")
    touch(tmp_path / "nvidia/cuda_runtime/lib/libcudart_static.a")
    found, detail = find_cuda.find_cuda(("/nowhere",), [str(tmp_path)])
    assert found is None
    assert detail == (
        "no nvcc was found (NVCC, PATH, CUDA_HOME, /nowhere, pip's packages); to install one: " + PIP_LINE
    )


def test_an_nvcc_that_does_not_work_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old nvcc on PATH does not hide the one that pip installed; without that one, all are reported."""
    old = toolkit(tmp_path / "old", version="11.8")
    monkeypatch.setenv("PATH", f"{Path(old).parent}:/usr/bin:/bin")
    top = pip_packages(tmp_path, ALL)
    found, detail = find_cuda.find_cuda((), [str(tmp_path)])
    assert found is not None
    assert (found.nvcc, detail) == (str(top / "bin/nvcc"), "nvcc 13.0")

    (top / "compiles").unlink()
    found, detail = find_cuda.find_cuda((), [str(tmp_path)])
    assert found is None
    assert f"{old} is of CUDA 11.8, older than 12.0; " in detail
    assert (
        f"does not compile a small kernel: error: old gcc; to install matching packages: {PIP_LINE}" in detail
    )


def test_nvcc_of_the_environment_decides_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_packages(tmp_path, ALL)
    monkeypatch.setenv("NVCC", str(tmp_path / "gone"))
    assert find_cuda.find_cuda((), [str(tmp_path)]) == (None, f"NVCC={tmp_path / 'gone'} is not a program")


def test_a_toolkit_needs_the_static_runtime(tmp_path: Path) -> None:
    """The shared runtime would be needed at import, possibly without a toolkit."""
    nvcc = toolkit(tmp_path)
    (tmp_path / "lib64/libcudart_static.a").rename(tmp_path / "lib64/libcudart.so.13")
    assert find_cuda.find_cuda([str(tmp_path)], ()) == (None, f"{nvcc} has no libcudart_static.a with it")


def test_the_source_distribution_has_the_sources(tmp_path: Path) -> None:
    """It also needs find_cuda.py, which setup.py imports."""
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(
        [*command, "sdist", f"--dist-dir={tmp_path}", "--formats=tar"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(["git", "ls-files", "csrc"], cwd=ROOT, capture_output=True, text=True)
    wanted = tracked.stdout.split() or ["csrc/find_cuda.py", "csrc/bindings.cpp"]
    assert "csrc/find_cuda.py" in wanted
    assert not set(wanted) - names


@pytest.mark.slow
def test_packages_of_pip_compile_a_kernel_file(tmp_path: Path) -> None:
    """Compiles one kernel file and links it into a library that needs no CUDA library."""
    programs = find_cuda.find_programs("nvcc", ())
    if not programs:
        pytest.skip(f"pip has installed no nvcc here: {PIP_LINE}")
    found, detail = find_cuda.find_cuda(())
    assert found is not None, detail
    source, library = ROOT / "csrc/cuda/operations.cu", tmp_path / "operations.so"
    flags = [
        "-std=c++17",
        "-arch=sm_80",
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fPIC",
        f"-I{ROOT / 'csrc'}",
    ]
    command = [found.nvcc, *flags, *found.include_flags, "-shared", f"-L{found.cudart}", str(source)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed
    assert "libcudart" not in needed
