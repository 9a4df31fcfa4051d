"""The CPU kernels compiled by other compilers, and for aarch64, give the numbers of the native g++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("driver", "select", "kernels")]
PROGRAM = ROOT / "tests" / "kernels" / "cpu_sanitizers" / "values.cpp"
FLAGS = [
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
    "-DPYSUPCON_ISA=generic", "-I", str(ROOT / "csrc"),
]  # fmt: skip
ARM = "aarch64-linux-gnu-"
QEMU = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), None)

pytestmark = pytest.mark.slow


def build(folder: Path, compiler: str, *more: str) -> Path:
    program = folder / "values"
    sources = map(str, (*SOURCES, PROGRAM))
    subprocess.run([compiler, *FLAGS, *more, *sources, "-o", str(program), "-lpthread"], check=True)
    return program


def values(*command: str) -> dict[str, np.ndarray]:
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    found: dict[str, list[float]] = {}
    for line in output.splitlines():
        name, number = line.split()
        found.setdefault(name, []).append(float(number))
    return {name: np.array(numbers) for name, numbers in found.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    found = values(str(build(tmp_path_factory.mktemp("native"), "g++")))
    assert {name: len(numbers) for name, numbers in found.items()}.keys() == {"f32", "f64", "bf16", "f16"}
    return found


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """A number is a sum of 150 terms, each of which is rounded, to the largest number of its kind."""
    for name, numbers in expected.items():
        assert np.isfinite(numbers).all()
        tolerance = 150 * 2.0 ** (-53 if name == "f64" else -24) * np.abs(numbers).max()
        np.testing.assert_allclose(found[name], numbers, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("compiler", ["g++-11", "g++-13", *(f"clang++-{n}" for n in (14, 15, 16, 19))])
def test_another_compiler(tmp_path: Path, expected: dict[str, np.ndarray], compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    compare(values(str(build(tmp_path, compiler))), expected)


@pytest.mark.skipif(shutil.which(f"{ARM}g++") is None, reason=f"needs {ARM}g++")
class TestArm:
    def test_values(self, tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
        if QEMU is None:
            pytest.skip("needs qemu-user-static")
        compare(values(QEMU, str(build(tmp_path, f"{ARM}g++", "-static"))), expected)

    def test_dot_products_and_exponentials_use_vectors(self, tmp_path: Path) -> None:
        """Multiply-adds of four floats and of two doubles, and the integer operations of exp2 on vectors."""
        kernels, text = tmp_path / "kernels.o", tmp_path / "kernels.s"
        subprocess.run([f"{ARM}g++", *FLAGS, "-c", str(SOURCES[2]), "-o", str(kernels)], check=True)
        with text.open("w") as file:
            subprocess.run([f"{ARM}objdump", "-d", str(kernels)], check=True, stdout=file)
        lines = text.read_text().splitlines()
        for name in ("fmla", "shl", "fadd"):
            for lanes in ("4s", "2d"):
                assert any(f"\t{name}\t" in line and f".{lanes}" in line for line in lines), (name, lanes)
