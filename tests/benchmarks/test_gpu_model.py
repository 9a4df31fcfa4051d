"""benchmarks/gpu/gpu_model.py: parsing of disassembled kernels, counts and predictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import gpu_counts, gpu_kernels, gpu_model, sass, sass_paths  # noqa: E402
from benchmarks.gpu.gpu_kernels import Config, Demand, Kernel, ModelError  # noqa: E402

# A tile loop as nvdisasm prints it: an inner loop over slices (two products and a copy that the last tile
# skips), then tiles of other classes (two exponentials) or mixed ones (two exponentials and more).
TILE_LOOP = """
.text.forward_streamed:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   CS2R R4, SRZ ;
.L_x_2:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/               @P0 BRA `(.L_x_3) ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R7+0x8000], desc[UR6][R2.64], P2 ;
.L_x_3:
        /*0060*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/              @!P1 BRA `(.L_x_2) ;
        /*00a0*/               @P2 BRA `(.L_x_4) ;
        /*00b0*/                   ISETP.GE.AND P2, PT, R14, 0x1, PT ;
.L_x_4:
        /*00c0*/              @!P3 BRA `(.L_x_5) ;
        /*00d0*/                   MUFU.EX2 R4, R4 ;
        /*00e0*/                   MUFU.EX2 R5, R5 ;
        /*00f0*/                   BRA `(.L_x_6) ;
.L_x_5:
        /*0100*/                   FSEL R4, R4, RZ, P4 ;
        /*0110*/                   FSEL R5, R5, RZ, P5 ;
        /*0120*/                   MUFU.EX2 R4, R4 ;
        /*0130*/                   MUFU.EX2 R5, R5 ;
.L_x_6:
        /*0140*/                   LDS.64 R6, [R21] ;
        /*0150*/               @P6 BRA `(.L_x_1) ;
        /*0160*/                   EXIT ;
.L_x_7:
        /*0170*/                   BRA `(.L_x_7);
"""
HMMA = 16 * 8 * 16
#: of the loop above with three slices: six products, two pairs a lane, 512 bytes copied in each slice
NEED = Demand(multiply_adds=6 * HMMA, pairs=2, copied=3 * 512, step=512, trips=3)


def function(text: str = TILE_LOOP) -> sass.Function:
    (found,) = sass.parse(text)
    return found


def test_instructions_are_read() -> None:
    found = function()
    assert found.name == "forward_streamed"
    assert len(found.instructions) == 24
    jump = found.instructions[9]
    assert (jump.address, jump.guard, jump.opcode, jump.targets) == (0x90, "!P1", "BRA", (0x20,))
    assert found.instructions[5].operands == "[R7+0x8000], desc[UR6][R2.64], P2"


def test_cuobjdump_is_read_alike() -> None:
    """It prints addresses instead of labels, and the encoding after each instruction."""
    text = (
        "\t\tFunction : f\n\t.headerflags\t@EF_CUDA_SM80\n"
        "        /*0000*/                   MUFU.EX2 R4, R4 ;      /* 0x0000000000087882 */\n"
        "                                                          /* 0x000fe20000000000 */\n"
        "        /*0010*/              @!P0 BRA 0x0 ;              /* 0x0000009000008947 */\n"
        "        /*0020*/                   EXIT ;                 /* 0x000000000000794d */\n"
    )
    found = function(text)
    assert (found.name, found.instructions[1].targets) == ("f", (0,))
    assert sass.control_flow(found).successors == {0x00: [0x00, 0x20], 0x20: []}


def test_loops_are_nested() -> None:
    graph = sass.control_flow(function())
    outer, endless = sass.loops(graph)
    assert (outer.header, endless.header) == (0x10, 0x170)
    (inner,) = outer.children
    assert (inner.header, inner.blocks) == (0x20, {0x20, 0x40, 0x60})
    assert [loop.header for loop in gpu_counts.tile_loops(graph)] == [0x10]


@pytest.mark.parametrize(
    ("jump", "conditional"),
    [
        ("BRA `(.L_x_1)", False),
        ("@P0 BRA `(.L_x_1)", True),
        ("@!UP0 BRA 0x40", True),
        ("BRA.U !UP0, `(.L_x_1)", True),
        ("BRA.DIV UR4, `(.L_x_1)", True),
        ("EXIT", False),
        ("@P0 EXIT", True),
    ],
)
def test_conditional_jumps(jump: str, conditional: bool) -> None:
    text = f".text.f:\n.L_x_1:\n        /*0000*/       {jump} ;\n        /*0010*/       NOP ;\n"
    assert function(text).instructions[0].is_conditional == conditional
    assert (0x10 in sass.control_flow(function(text)).successors[0]) == conditional


def test_a_call_that_never_returns_is_a_jump() -> None:
    """ptxas uses CALL if a branch would be too far; a subroutine ends with RET."""
    text = (
        ".text.f:\n.L_x_1:\n"
        "        /*0000*/               CALL.REL.NOINC `($sub) ;\n"
        "        /*0010*/           @P0 CALL.REL.NOINC `(.L_x_2) ;\n"
        "        /*0020*/               BRA `(.L_x_1) ;\n.L_x_2:\n"
        "        /*0030*/               EXIT ;\n$sub:\n"
        "        /*0040*/               RET.REL.NODEC R2 `(f) ;\n"
    )
    assert sass.control_flow(function(text)).successors == {0x00: [0x30, 0x20], 0x20: [0], 0x30: [], 0x40: []}


def test_a_jump_table_leads_to_all_its_targets() -> None:
    """nvcc generates one for the kinds of a tile: different, same or mixed."""
    text = (
        ".text.f:\n.L_x_1:\n"
        '        /*0000*/               BRX R36 -0x10   (*"BRANCH_TARGETS .L_x_2,.L_x_3"*) ;\n.L_x_2:\n'
        "        /*0010*/               BRA `(.L_x_1) ;\n.L_x_3:\n"
        "        /*0020*/               BRA `(.L_x_1) ;\n"
        "        /*0030*/               EXIT ;\n"
    )
    graph = sass.control_flow(function(text))
    assert graph.successors == {0x00: [0x10, 0x20], 0x10: [0], 0x20: [0], 0x30: []}
    assert [loop.blocks for loop in sass.loops(graph)] == [{0x00, 0x10, 0x20}]


def test_the_path_of_uniform_tiles_is_counted() -> None:
    (counts,) = gpu_counts.count(function(), 8, NEED)
    assert counts.exponentials == 1
    assert counts.even
    each = {name: number / 8 for name, number in counts.instructions.items()}
    # three times the inner loop, in which "@!PT LDS" is never executed; the masks (FSEL) are not on the path
    assert each == {
        "HMMA": 6,
        "LDSM": 3,
        "LDGSTS": 3,
        "MUFU.EX2": 2,
        "LDS.64": 1,
        "integer": 1,
        "control": 3 * 4 + 4,
    }
    # at most: the comparison at 0xb0 is executed, too
    assert counts.issued == (8 * 32, 8 * 33)
    assert counts.multiply_adds == 8 * NEED.multiply_adds
    assert counts.copied == 8 * NEED.copied
    # ldmatrix.x4 and a copy of 16 bytes a thread: 4 each; 8 bytes a thread: 1 or 2
    assert counts.wavefronts == (8 * (3 * 4 + 3 * 4 + 1), 8 * (3 * 4 + 3 * 4 + 2))


def test_two_exponentials_a_pair_are_a_path_of_their_own() -> None:
    """A branch on the device: one of its sides computes each exponential twice."""
    text = TILE_LOOP.replace("FSEL", "MUFU.EX2")
    one, two = gpu_counts.count(function(text), 8, NEED)
    assert (one.exponentials, two.exponentials) == (1, 2)
    assert (one.instructions["MUFU.EX2"], two.instructions["MUFU.EX2"]) == (8 * 2, 8 * 4)


def test_an_unrolled_loop_is_divided() -> None:
    half = NEED._replace(multiply_adds=3 * HMMA, pairs=1, copied=768, step=0)
    (counts,) = gpu_counts.count(function(), 8, half)
    (whole,) = gpu_counts.count(function(), 8, NEED)
    assert counts.issued == (whole.issued[0] / 2, whole.issued[1] / 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"multiply_adds": 5 * HMMA},  # no number of slices makes it
        {"multiply_adds": 8 * HMMA},  # more slices than there are
        {"pairs": 3},  # fewer exponentials than pairs
        {"copied": 4 * 512},
    ],
)
def test_a_loop_that_cannot_be_the_tile_loop_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="no path through a tile loop does what a warp must"):
        gpu_counts.count(function(), 8, NEED._replace(**wrong))


def test_a_function_without_products_is_refused() -> None:
    with pytest.raises(ModelError, match="no loop with both products and exponentials"):
        gpu_counts.count(function(TILE_LOOP.replace("HMMA", "FFMA")), 8, NEED)


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown shape.*HMMA\.16832"):
        sass_paths.multiply_adds("HMMA.16832.F32.BF16")


def test_every_step_copies() -> None:
    """Two barriers per slice: no path has a copy between each two of them, and the count reports it."""
    text = TILE_LOOP.replace(
        "        /*0090*/", "        /*0088*/                   BAR.SYNC 0x0 ;\n        /*0090*/"
    )
    (counts,) = gpu_counts.count(function(text), 8, NEED)
    assert not counts.even


RESIDENT_FORWARD = Config(BM=128, BN=64, CH=8, PARTS=1, THREADS=128, BLOCKS=2, SLICES=2)
STREAMED_FORWARD = Config(BM=128, BN=128, CH=8, PARTS=1, THREADS=256, BLOCKS=1, SLICES=4)
RESIDENT_BACKWARD = Config(BM=128, BN=64, CH=8, PARTS=1, THREADS=128, BLOCKS=2, SLICES=2)
STREAMED_BACKWARD = Config(BM=128, BN=64, CH=8, PARTS=1, THREADS=256, BLOCKS=1, SLICES=4)


def test_what_the_arithmetic_demands() -> None:
    need = gpu_kernels.demand("forward_resident", RESIDENT_FORWARD, 100)  # padded to slices of 64
    assert need.multiply_adds * 4 == 128 * 64 * 128
    assert (need.pairs, need.copied * 4, need.step, need.trips) == (64, 64 * 256, 0, 2)
    short = gpu_kernels.demand("forward_streamed", STREAMED_FORWARD, 256)
    assert short.multiply_adds * 8 == 128 * 128 * 256
    assert (short.pairs, short.copied * 8, short.step * 8, short.trips) == (64, 128 * 512, 128 * 128, 4)
    long = gpu_kernels.demand("forward_streamed", STREAMED_FORWARD, 768)  # the rows are loaded with each tile
    assert (long.multiply_adds * 8, long.copied * 8) == (128 * 128 * 768, (128 + 128) * 1536)
    resident = gpu_kernels.demand("backward_resident", RESIDENT_BACKWARD, 100)
    assert (resident.multiply_adds * 4, resident.copied * 4) == (2 * 128 * 64 * 128, 64 * 256)
    streamed = gpu_kernels.demand("backward_streamed", STREAMED_BACKWARD, 768)  # a share of 256 columns
    assert streamed.multiply_adds * 8 == 128 * 64 * (768 + 256)
    assert streamed.copied * 8 == (128 + 64) * 1536 + 64 * 512
    three = Config(BM=128, BN=32, CH=4, PARTS=3, THREADS=256, BLOCKS=1, SLICES=4)
    assert gpu_kernels.demand("backward_streamed", three, 128).multiply_adds * 8 == 6 * 128 * 32 * (128 + 128)


def test_names() -> None:
    base, arguments = gpu_kernels.split_name(
        "void pysupcon::cuda::forward_streamed<pysupcon::cuda::StreamedForward<gpu::Bf16, 1>, "
        "pysupcon::cuda::Statistics>(pysupcon::cuda::Pairs, pysupcon::cuda::Runs, "
        "pysupcon::cuda::Statistics::Args)"
    )
    assert (base, arguments) == ("forward_streamed", ["StreamedForward<gpu::Bf16, 1>", "Statistics"])
    assert gpu_kernels.short_name(base, arguments) == "forward_streamed<Bf16, 1, Statistics>"
    assert gpu_kernels.short_name("f", ["ResidentForward<gpu::F16>", "Statistics"]) == "f<F16, Statistics>"


def test_the_width_of_resident_kernels_is_that_of_the_plan() -> None:
    text = (ROOT / "csrc" / "cuda" / "plan.h").read_text()
    assert f"kResidentWidth = {gpu_kernels.RESIDENT_WIDTH};" in text


def kernel(base: str, config: Config) -> Kernel:
    return Kernel(base, base, config, function(), registers=255, spilled=0, stack=0)


def test_which_kernel_runs() -> None:
    resident = kernel("backward_resident", RESIDENT_BACKWARD)
    streamed = kernel("backward_streamed", STREAMED_BACKWARD)
    assert [resident.runs_at(d) for d in (64, 128, 129)] == [True, True, False]
    assert [streamed.runs_at(d) for d in (128, 129)] == [False, True]
    assert kernel("forward_streamed", STREAMED_FORWARD._replace(PARTS=2)).runs_at(64)
    assert [streamed.shares(d) for d in (256, 768)] == [1, 3]
    assert resident.shares(128) == 1


CARD = gpu_model.Card("sm_90", "X", 100, 2.0, multiply_adds=1024, fp32=128, l2_bytes=32)


def test_the_formula() -> None:
    counts = gpu_counts.Counts(
        {"MUFU.EX2": 90, "MUFU other": 10, "FP32": 300, "IMAD": 100, "integer": 60, "FMNMX, F2FP": 40},
        issued=(4000, 4400),
        multiply_adds=2048 * 1000,
        wavefronts=(500, 600),
        copied=3200,
        exponentials=1,
        even=True,
    )
    clocks = gpu_model.pipes(counts, CARD)
    assert clocks == {
        "tensor": (2000, 2000),
        "shared": (500, 600),
        "issue": (1000, 1100),
        "ex2": (200, 200),
        "fp32": (100, 100),
        "alu": (50, 50),
        "l2": (100, 100),
    }
    assert gpu_model.binding(clocks) == "tensor"
    low, high = gpu_model.tile_clocks(clocks)
    assert low == pytest.approx(2000 + 0.10 * (500 + 1000 + 200))
    assert high == pytest.approx(2000 + 0.22 * (600 + 1100 + 200))


@pytest.mark.parametrize(
    ("base", "config", "dim", "n", "tiles"),
    [
        # 400 row blocks on 100 multiprocessors, two at a time: four each
        ("backward_resident", RESIDENT_BACKWARD, 128, 400 * 128, 4 * 800),
        # one more would take another round of two: equal runs
        ("backward_resident", RESIDENT_BACKWARD, 128, 401 * 128, 4.01 * 802),
        # 1,999 of 2,000 places taken: rounds, of which the last is not full
        ("backward_resident", RESIDENT_BACKWARD, 128, 1999 * 128, 20 * 3998),
        # three blocks for each row block: its gradient's width is shared
        ("backward_streamed", STREAMED_BACKWARD, 768, 100 * 128, 3 * 200),
    ],
)
def test_the_time_of_a_batch(base: str, config: Config, dim: int, n: int, tiles: float) -> None:
    first, last = gpu_model.seconds((1000, 1500), kernel(base, config), CARD, n, dim)
    assert first == pytest.approx(tiles * 1000 / 2e9)
    assert last == pytest.approx(tiles * 1500 / 2e9)


def test_a_pipe_outside_the_sum_can_bind() -> None:
    clocks = dict.fromkeys(gpu_model.OVERLAPPING, (100.0, 100.0)) | {"l2": (1000.0, 1000.0)}
    assert gpu_model.binding(clocks) == "l2"
    assert gpu_model.tile_clocks(clocks) == pytest.approx((1040, 1088))


def line(config: Config, name: str, exponentials: int) -> gpu_model.Line:
    counts = gpu_counts.Counts({"HMMA": 8.0 * exponentials}, (8, 8), 1, (1, 1), 1, exponentials, True)
    return gpu_model.Line(
        kernel("backward_resident", config)._replace(name=name), 128, counts, {}, (1, 1), {}
    )


def test_counts_before_and_after() -> None:
    """A kernel is compared with its earlier version even if its template arguments have changed."""
    before = [line(RESIDENT_BACKWARD, "old", 2)]
    after = [line(RESIDENT_BACKWARD._replace(THREADS=256), "new", exponentials) for exponentials in (1, 2)]
    rows = gpu_model.count_table(after, before)
    assert rows[0][1:] == ["old, D=128, 2 exp -> new, D=128, 1 exp", "old, D=128, 2 exp -> new, D=128, 2 exp"]
    assert rows[2] == ["HMMA", "16 -> 8", "16 -> 16"]
    same = gpu_model.count_table(before, before)
    assert (same[0][1], same[2]) == ("old, D=128, 2 exp", ["HMMA", "16 -> 16"])
    assert gpu_model.count_table(before)[2] == ["HMMA", "16"]
    two = [line(RESIDENT_BACKWARD, "old", 1), *before]
    assert gpu_model.counterpart(before[0], two) is two[1]
    assert gpu_model.counterpart(before[0]._replace(dim=64), two) is None


@pytest.mark.parametrize(
    ("gpu", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),  # 114 multiprocessors
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("Tesla T4", None),
    ],
)
def test_measured_times_are_those_of_the_card(gpu: str, card: str | None, tmp_path: Path) -> None:
    point = {"implementation": "pysupcon", "loss": "supcon", "n": 65_536, "dim": 128, "dtype": "bfloat16"}
    row = point | {"forward_s": 0.003, "backward_s": 0.007, "both_s": 0.0101}
    others = [
        row | {"implementation": "tiled", "both_s": 0.001},
        row | {"loss": "sincere", "both_s": 0.001},
        row | {"dtype": "float32", "both_s": 0.001},
        row | {"failed": "gradient error", "both_s": 0.001},
        row | {"both_s": 0.0109, "forward_s": 0.0031},  # of another case
        point | {"skipped": "needs 96 GiB"},
    ]
    results = {"machine": {"device": "cuda", "gpu": gpu}, "rows": [row, *others]}
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": {"device": "cpu"}, "rows": [row]}))
    (tmp_path / "other.json").write_text("[]")
    expected = {
        ("forward", 128, 65_536): 0.003,
        ("backward", 128, 65_536): 0.007,
        ("both", 128, 65_536): 0.0101,
    }
    found = {name: gpu_model.measured(tmp_path, known, "bfloat16") for name, known in gpu_model.CARDS.items()}
    assert {name: times for name, times in found.items() if times} == ({card: expected} if card else {})


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_kernels, "find_cuda", lambda: (None, "no nvcc was found"))
    assert gpu_model.main([]) == 2
    assert "no nvcc was found" in capsys.readouterr().err
    toolkit = gpu_kernels.Toolkit("nvcc", "13.0", [], ROOT)
    monkeypatch.setattr(gpu_kernels, "find_cuda", lambda: (toolkit, "nvcc 13.0"))
    monkeypatch.setattr(gpu_kernels, "find_programs", lambda name, homes: [])
    assert gpu_model.main([]) == 2
    assert "neither nvdisasm nor cuobjdump was found" in capsys.readouterr().err


def test_the_real_forward() -> None:
    """The current csrc/cuda: counts that follow from the size of the tile, and the tables."""
    try:
        gpu_kernels.tools()
    except ModelError as error:
        pytest.skip(str(error))
    kernels = gpu_kernels.compile_kernels(ROOT / "csrc" / "cuda", "sm_80", only="forward")
    lines = gpu_model.model(kernels, gpu_model.CARDS["a100"], [128], [65_536])
    assert lines
    for line in lines:
        config = line.kernel.config
        assert line.kernel.name.startswith(("forward_resident<Bf16", "forward_triangular<Bf16"))
        assert line.kernel.spilled == line.kernel.stack == 0
        assert line.counts.multiply_adds == config.BM * config.BN * 128
        assert line.counts.copied == config.BN * 256
        assert line.counts.even
        assert line.counts.instructions.get("other", 0) == 0  # classify() knows every opcode
        # an exponential a pair, and a rescaling or two a row and thread
        pairs = config.BM * config.BN / 32
        assert pairs <= line.counts.instructions["MUFU.EX2"] <= 1.5 * pairs
        low, high = line.times[65_536]
        least = 65_536**2 * 128 / (1024 * 108 * 1.41e9)  # the products alone
        least /= 2 if "triangular" in line.kernel.name else 1
        assert least < low < high < 10 * least
    known = {("forward", 128, 65_536): 0.0123}
    assert "12.3 ms" in gpu_model._markdown(gpu_model.time_table(lines, known))
    products = f"{lines[0].counts.multiply_adds:,.0f}"
    assert f"| {products} -> {products} |" in gpu_model._markdown(gpu_model.count_table(lines, lines))
    assert json.loads(json.dumps(gpu_model.to_json(lines)))[0]["dim"] == 128


@pytest.mark.slow
def test_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel of a format, short and long rows, on two architectures: counted, not only compiled."""
    try:
        gpu_kernels.tools()
    except ModelError as error:
        pytest.skip(str(error))
    for card, number_format in (("h100", "bf16"), ("rtx4090", "f32x3")):
        path = tmp_path / f"{card}.json"
        assert gpu_model.main(["--card", card, "--format", number_format, "--json", str(path)]) == 0
        text = capsys.readouterr().out
        assert "Predicted, not measured" in text
        assert "copies not followed" not in text
        results = json.loads(path.read_text())
        found = {(line["kernel"].partition("<")[0], line["dim"]) for line in results["now"]}
        short = "resident" if number_format == "bf16" else "streamed"
        triangular = {("forward_triangular", 128)} if number_format == "bf16" else set()
        assert found == triangular | {
            (f"forward_{short}", 128),
            ("forward_streamed", 768),
            (f"backward_{short}", 128),
            ("backward_streamed", 768),
        }
