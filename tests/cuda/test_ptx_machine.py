"""The machine that runs PTX, by itself: instructions with answers worked out by hand from the manual, and kernels that it must refuse."""

import numpy as np
import pytest
from ptx.machine import Program
from ptx.memory import Fault, Global
from ptx.text import PtxError

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
LANES = np.arange(32, dtype=np.uint32)


def run(body: str, *arrays: np.ndarray, threads: int = 32, blocks: int = 1, shared: int = 0) -> None:
    """A kernel whose %rd0, %rd1 .. are the arrays and whose %r0 is the thread."""
    params = ", ".join(f".param .u64 p{n}" for n in range(len(arrays)))
    loads = "".join(f"ld.param.u64 %rd{n}, [p{n}]; cvta.to.global.u64 %rd{n}, %rd{n};\n" for n in range(len(arrays)))
    memory_ = f".shared .align 16 .b8 tile[{shared}];\n" if shared else ""
    ptx = (f"{HEAD}{memory_}.visible .entry k({params})\n{{\n.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .f32 %f<20>; "
           f".reg .b64 %rd<20>; .reg .f64 %fd<8>;\n{loads}mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n")
    memory = Global()
    Program(ptx).only().launch(memory, (blocks,), (threads,), [np.uint64(memory.address(a, f"array {n}")).tobytes() for n, a in enumerate(arrays)])


def computed(body: str, dtype=np.uint32) -> np.ndarray:
    """%r1 of every lane, after instructions over %r0."""
    out = np.zeros(32, np.uint32)
    run(f"{body}\nmul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd0; st.global.u32 [%rd9], %r1;", out)
    return out.view(dtype)


@pytest.mark.parametrize("body, expected", [
    ("dp4a.s32.s32 %r1, 0x01FF8002, 0x7F02FF03, 10;", 10 + 6 + 128 - 2 + 127),          # bytes 2 -128 -1 1 and 3 -1 2 127
    ("dp4a.u32.s32 %r1, 0x000000FF, 0x000000FF, 0;", -255),
    ("prmt.b32 %r1, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
    ("prmt.b32 %r1, 0x00008000, 0, 0x000D; prmt.b32 %r1, %r1, 0x00008000, 0x9D10;", 0x00FF_0000),
    ("prmt.b32 %r1, 0x0000F000, 0, 0x9009;", -0x00FF_FF01),
    ("mov.f32 %f1, 0f40200000; cvt.rni.s32.f32 %r1, %f1;", 2),                          # 2.5 goes to the even neighbour
    ("mov.f32 %f1, 0fC0200000; cvt.rzi.s32.f32 %r1, %f1;", -2),
    ("mov.f32 %f1, 0f7F800000; cvt.rni.s32.f32 %r1, %f1;", 0x7FFFFFFF),
    ("mov.f32 %f1, 0f3F803000; cvt.rn.f16.f32 %h1, %f1; mov.b32 %r1, {%h1, 0};", 0x3C02),   # half-way between 0x3C01 and 0x3C02
    ("mov.b32 {%h1, %h2}, 0x3C00C000; cvt.f32.f16 %f1, %h1; mov.b32 %r1, %f1;", -0x40000000),
    ("mov.f32 %f1, 0f00400000; add.ftz.f32 %f1, %f1, 0f00000000; mov.b32 %r1, %f1;", 0),
    ("mov.f32 %f1, 0f41200000; ex2.approx.ftz.f32 %f1, %f1; cvt.rzi.s32.f32 %r1, %f1;", 1024),
    ("shr.s32 %r1, 0x80000000, 40;", -1),
    ("shl.b32 %r1, 1, 32;", 0),
    ("mov.u64 %rd9, 0x1FFFFFFFF; bfi.b64 %rd9, %rd9, 0, 4, 8; cvt.u32.u64 %r1, %rd9;", 0xFF0),
    ("mul.hi.u32 %r1, 0xFFFFFFFF, 0xFFFFFFFF;", -2),
    ("mov.u32 %r2, -7; div.s32 %r1, %r2, 2;", -3),
    ("mov.u32 %r2, -7; rem.s32 %r1, %r2, 2;", -1),
    ("mov.u32 %r2, 0xFFFFFFFF; add.cc.u32 %r3, %r2, 1; addc.u32 %r1, 5, 0;", 6),
    ("{ .reg .b32 %r1x; mov.u32 %r1x, 3; mov.u32 %r1, %r1x; } { .reg .b32 %r1x; mov.u32 %r1x, 4; }", 3),
])
def test_an_instruction(body, expected):
    assert (computed(body, np.int32) == np.uint32(expected & 0xFFFFFFFF).view(np.int32)).all()


@pytest.mark.parametrize("body, expected", [
    ("shfl.sync.bfly.b32 %r1, %r0, 5, 0x1f, -1;", LANES ^ 5),
    ("shfl.sync.idx.b32 %r1, %r0, 7, 0x1f, -1;", np.full(32, 7)),
    ("shfl.sync.down.b32 %r1, %r0, 3, 0x1f, -1;", np.where(LANES + 3 < 32, LANES + 3, LANES)),
    ("shfl.sync.up.b32 %r1, %r0, 1, 0x1800, -1;", np.where(LANES % 8 == 0, LANES, LANES - 1)),     # segments of eight lanes
    ("setp.eq.u32 %p1, %r0, 9; vote.sync.any.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;", np.ones(32)),
    ("setp.lt.u32 %p1, %r0, 4; vote.sync.ballot.b32 %r1, %p1, -1;", np.full(32, 15)),
    # lanes part, and meet again before they show each other what they made
    ("setp.lt.u32 %p1, %r0, 9; @%p1 bra A; mov.u32 %r2, 100; bra B; A: mov.u32 %r2, %r0; B: shfl.sync.bfly.b32 %r1, %r2, 16, 0x1f, -1;",
     np.where((LANES ^ 16) < 9, LANES ^ 16, 100)),
    ("mov.u32 %r1, 0; L: add.u32 %r1, %r1, 2; setp.lt.u32 %p1, %r1, %r0; @%p1 bra L;", np.maximum(2, (LANES + 1) // 2 * 2)),
    ("atom.global.add.u32 %r2, [%rd0+128], 3; mov.u32 %r1, %r0;", None),
])
def test_lanes(body, expected):
    if expected is None:
        with pytest.raises(Fault, match="out of bounds"):
            computed(body)
    else:
        assert (computed(body) == expected).all()


def fragments(matrix: np.ndarray, rows: bool) -> np.ndarray:
    """The words of each lane for A (16, 16), or B (16, 8) by its columns: index by index as the manual lists a0 .. a7 and b0 .. b3."""
    out = np.zeros((32, 8 if rows else 4), np.float16)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(out.shape[1]):
            if rows:
                row = group if i < 2 or 4 <= i < 6 else group + 8
                out[lane, i] = matrix[row, member * 2 + (i & 1) + (0 if i < 4 else 8)]
            else:
                out[lane, i] = matrix[member * 2 + (i & 1) + (0 if i < 2 else 8), group]
    return np.ascontiguousarray(out).view(np.uint32)


def test_a_product_of_a_warp():
    rng = np.random.default_rng(1)
    a, b, c = rng.integers(-4, 5, (16, 16)), rng.integers(-4, 5, (16, 8)), rng.integers(-9, 10, (16, 8))
    words_a, words_b = fragments(a.astype(np.float16), True), fragments(b.astype(np.float16), False)
    c_by_lane = np.array([[c[(lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)] for i in range(4)] for lane in range(32)], np.float32)
    loads = "".join(f"ld.global.u32 %r{1 + n}, [%rd8+{4 * n}];" for n in range(4)) + "ld.global.v2.u32 {%r5, %r6}, [%rd9];"
    run(f"""mul.wide.u32 %rd8, %r0, 16; add.s64 %rd10, %rd8, %rd2; add.s64 %rd8, %rd8, %rd0; mul.wide.u32 %rd9, %r0, 8; add.s64 %rd9, %rd9, %rd1;
        {loads} ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd10];
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
        st.global.v4.f32 [%rd10], {{%f1, %f2, %f3, %f4}};""", words_a, words_b, c_by_lane)
    want = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert c_by_lane[lane, i] == want[(lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)]


FILL = "shl.b32 %r2, %r0, 4; mov.u32 %r9, tile; add.u32 %r2, %r2, %r9; "
COPY = FILL + "cvt.u64.u32 %rd9, %r2; mul.wide.u32 %rd8, %r0, 16; add.s64 %rd8, %rd8, %rd0; cp.async.cg.shared.global [%rd9], [%rd8], 16; "
SHOW = "ld.shared.u32 %r3, [%r2]; mul.wide.u32 %rd7, %r0, 4; add.s64 %rd7, %rd7, %rd1; st.global.u32 [%rd7], %r3;"


def test_matrices_from_shared_memory():
    source, out = np.arange(128, dtype=np.uint32), np.zeros((32, 4), np.uint32)
    run(COPY + "cp.async.wait_all; bar.sync 0; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];"
        "mul.wide.u32 %rd7, %r0, 16; add.s64 %rd7, %rd7, %rd1; st.global.v4.u32 [%rd7], {%r4, %r5, %r6, %r7};", source, out, shared=512)
    assert (out == [[32 * m + 4 * (lane // 4) + lane % 4 for m in range(4)] for lane in range(32)]).all()


@pytest.mark.parametrize("body, what", [
    (COPY + "cp.async.commit_group; bar.sync 0; " + SHOW, "nobody wrote"),                                  # nobody waited for the copy
    (COPY + "cp.async.commit_group; cp.async.wait_group 1; " + SHOW, "nobody wrote"),
    (COPY + "cp.async.wait_all; xor.b32 %r2, %r2, 512; " + SHOW, "race"),                                   # another warp's copy, and no barrier
    (FILL + "st.shared.u32 [%r2], %r0; xor.b32 %r2, %r2, 16; " + SHOW, "race.*no barrier between"),
    (FILL + "mov.u32 %r4, 0; st.shared.u32 [tile], %r4; bar.sync 0; ld.shared.u32 %r5, [tile]; st.shared.u32 [tile], 1;", "race"),
    (FILL + "st.shared.u32 [tile], %r0;", "two threads write different values"),
    (FILL + SHOW, "nobody wrote"),
    (FILL + "ld.shared.u32 %r3, [%r2+2048];", "out of bounds.*shared memory"),
    ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+8];", "misaligned"),
    ("ld.global.u32 %r1, [%rd0+1024];", "out of bounds.*array 0"),
    ("st.global.u32 [%rd1+-4], %r0;", "no memory|out of bounds"),
    ("st.global.u32 [%rd1], %r0;", "two threads write different values"),
    ("ld.global.nc.u32 %r1, [%rd1]; add.u32 %r1, %r1, 1; st.global.u32 [%rd1], %r1;", "read as constant"),
    ("setp.eq.u32 %p1, %r0, 3; @%p1 bra A; shfl.sync.bfly.b32 %r1, %r0, 1, 0x1f, -1; A: ret;", "lanes 0x"),
    ("setp.eq.u32 %p1, %r0, 3; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B: ret;", "wait for others"),
    ("trap;", "trap"),
])
def test_what_a_gpu_would_do_wrong(body, what):
    with pytest.raises(Fault, match=what):
        run(body, np.zeros(256, np.uint32), np.zeros(64, np.uint32), threads=64, shared=1024)


def test_blocks_that_write_one_place():
    with pytest.raises(Fault, match="write different values"):
        run("mov.u32 %r1, %ctaid.x; add.u32 %r1, %r1, %r0; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.u32 [%rd1], %r1;",
            np.zeros(32, np.uint32), blocks=2)


def test_barriers_and_copies_in_order_pass():
    out = np.zeros(64, np.uint32)
    run(COPY + "cp.async.wait_all; bar.sync 0; xor.b32 %r2, %r2, 512; " + SHOW, np.arange(256, dtype=np.uint32), out, threads=64, shared=1024)
    assert (out == 4 * (np.arange(64) ^ 32)).all()


@pytest.mark.parametrize("body", ["tanh.approx.f32 %f1, %f1;", "add.sat.f32 %f1, %f1, %f1;", "ld.weak.global.u32 %r1, [%rd0];",
                                  "wgmma.fence.sync.aligned;"])
def test_an_unknown_instruction_is_named(body):
    with pytest.raises(PtxError, match=body.split()[0].rstrip(";").replace(".", r"\.")):
        run(body, np.zeros(4, np.uint32))


def test_what_a_warp_does_together_is_not_moved_into_branches():
    """Instructions of a whole warp are `convergent` to the compiler, which else may compute them where only some lanes need the result."""
    import numba.cuda.compiler as compiler
    from numba import cuda, types

    from pyggml.backends.cuda.prims import ldmatrix, mma

    def some_lanes_want_it(out):
        tile = cuda.shared.array(256, np.float16, 16)
        a = ldmatrix(tile, 16 * cuda.threadIdx.x)
        c = mma(np.float32(0), np.float32(0), np.float32(0), np.float32(0), a[0], a[1], a[2], a[3], a[0], a[1])
        if cuda.threadIdx.x < 7:
            out[cuda.threadIdx.x] = c[0]

    library, _ = compiler._compile_pyfunc_with_fixup(some_lanes_want_it, (types.float32[::1],), device=False, abi="numba", cc=(8, 0))
    calls = [line for line in library.get_llvm_str().splitlines() if "call" in line and ("mma.sync" in line or "ldmatrix.sync" in line)]
    assert len(calls) == 2 and all("convergent" in line for line in calls)
