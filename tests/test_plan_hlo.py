"""The reader of compiled programs: a literal program of the TPU compiler, closed forms, and real
programs of eight CPU devices."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from st4vla_jax.chips import parse_slice
from st4vla_jax.plan_cost import _convolution_flops, step_cost
from st4vla_jax.plan_hlo import Instruction, groups_of, parse_hlo
from st4vla_jax.sharding import make_mesh

TPU = parse_slice("v5p:2x2x2")
CHIP = TPU.chip
DEVICES = [SimpleNamespace(coords=(i & 1, i >> 1 & 1, i >> 2)) for i in range(8)]

# Shortened by hand from what libtpu 0.0.42 printed for a scan over weights sharded two ways.
PROGRAM = (Path(__file__).parent / "golden" / "scan_v5p.hlo").read_text()


@pytest.fixture(scope="module")
def cost():
    return step_cost(parse_hlo(PROGRAM), TPU, DEVICES)


def test_loops_count_as_often_as_they_run(cost):
    module = parse_hlo(PROGRAM)
    assert module.runs == {"main.5_spmd": 1, "body.1": 36, "condition.1": 36}
    assert cost.products == pytest.approx(36 * 2 * 512 * 1024 * 2048 / CHIP.peak_flops)


def test_parts_of_one_collective_count_once(cost):
    gather, scatter = sorted(cost.collectives, key=lambda c: c.kind)
    whole = 1024 * 1024 * 2
    assert (gather.kind, gather.runs, gather.bytes) == ("all-gather", 36, whole)
    assert gather.asynchronous and gather.group == (0, 1)
    assert (
        gather.shapes == ("bf16[1024,1024]",)
        and gather.origin == "jit(step)/while/body/dot_general"
    )
    assert (scatter.kind, scatter.runs, scatter.bytes) == ("reduce-scatter", 36, whole)
    assert not scatter.asynchronous and scatter.exposed == scatter.seconds


def test_a_collective_that_goes_on_in_a_loop_is_counted_where_it_began():
    """Steps of an all-gather that began outside of the loop run in each of its rounds."""
    head, step, rest = PROGRAM.partition("%async_collective_fusion.61 (p.2")
    program = head + step + rest.replace("channel_id=12", "channel_id=77", 1)
    found = step_cost(parse_hlo(program), TPU, DEVICES).collectives
    assert sorted(c.kind for c in found) == ["all-gather", "reduce-scatter"]


def test_work_between_start_and_done_hides_what_it_can(cost):
    gather = next(c for c in cost.collectives if c.kind == "all-gather")
    transfer = 1024 * 1024 * 2 / 2 / CHIP.link_bandwidth  # half of it comes, over the one link
    product = 2 * 512 * 1024 * 2048 / CHIP.peak_flops
    assert gather.seconds == pytest.approx(transfer)
    assert gather.exposed == pytest.approx(transfer - product)


def test_memory_traffic_that_nothing_hides(cost):
    """The entry's negation; the loop's fusions have a collective's buffers among theirs."""
    assert cost.exposed_hbm == pytest.approx(2 * 4 * 2097152 / CHIP.hbm_bandwidth, rel=1e-4)


@pytest.mark.parametrize(
    "attribute,groups",
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [tuple(range(8))]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
         [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("channel_id=3", [tuple(range(8))]),
    ],
)  # fmt: skip
def test_groups(attribute, groups):
    assert groups_of(Instruction("x", "all-reduce", (), (), attribute), 8) == groups


def brute_force_taps(size_in, size_out, window, stride=1, low=0, dilate=1):
    return sum(
        0 <= (p := o * stride + k - low) <= (size_in - 1) * dilate and p % dilate == 0
        for o in range(size_out)
        for k in range(window)
    )


@pytest.mark.parametrize(
    "attributes,left,right,out,want",
    [
        ("dim_labels=bf_io->bf", (512, 1024), (1024, 256), (512, 256), 2 * 512 * 1024 * 256),
        ("dim_labels=fb_io->bf", (64, 32), (64, 16), (32, 16), 2 * 64 * 32 * 16),
        # An axis of a kernel [N,D] that is summed over as a window: [B,N,H] x [N,H,D].
        ("window={size=16}, dim_labels=b0f_0io->b0f", (8, 16, 4), (16, 4, 32), (8, 1, 32),
         2 * 8 * 16 * 4 * 32),
        # A batch axis, kept apart by stride and dilation: 16 products of [64,8] x [8,64].
        ("window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
         (16, 64, 8), (16, 8, 64), (16, 64, 64), 2 * 16 * 64 * 8 * 64),
    ],
)  # fmt: skip
def test_products_by_convolution(attributes, left, right, out, want):
    assert _convolution_flops(attributes, left, right, out) == want


def test_padded_windows():
    got = _convolution_flops(
        "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (2, 10, 4), (3, 4, 5), (2, 10, 5)
    )
    assert got == 2 * 2 * 5 * 4 * brute_force_taps(10, 10, 3, low=1)


def compiled_scan(mesh, layers=5):
    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    def array(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    args = (array((layers, 64, 64), None, "fsdp"), array((32, 64), ("data", "fsdp")))
    with jax.set_mesh(mesh):
        return jax.jit(loss).lower(*args).compile().as_text()


def test_a_real_program_gathers_each_layers_weights():
    """Eight CPU devices; the sum over the batch is one all-reduce of a number."""
    module = parse_hlo(compiled_scan(make_mesh(2, 4, 1)))
    found = step_cost(module, TPU, DEVICES).collectives
    gathers = [c for c in found if c.kind == "all-gather" and c.runs == 5]
    assert [c.bytes for c in gathers] == [64 * 64 * 4]
    assert gathers[0].group == (0, 1, 2, 3)
    assert {c.bytes for c in found if c.kind == "all-reduce"} <= {4.0}
    assert any(c.kind == "all-reduce" for c in found)


def test_links_of_a_group():
    """Two axes of a 2x2x2 are lines of one link each; a whole ring has two ways round."""
    program = PROGRAM.replace("{{0,1},{2,3},{4,5},{6,7}}", "{{0,1,2,3},{4,5,6,7}}")
    scatter = next(
        c for c in step_cost(parse_hlo(program), TPU, DEVICES).collectives if c.kind[0] == "r"
    )
    assert scatter.seconds == pytest.approx(1024 * 1024 * 2 * 3 / 4 / (2 * CHIP.link_bandwidth))
    ring = parse_slice("v5p:4x4x4")
    devices = [SimpleNamespace(coords=c) for c in np.ndindex(4, 4, 4)]
    program = PROGRAM.replace("{{0,1},{2,3},{4,5},{6,7}}", "[16,4]<=[64]")
    scatter = next(
        c for c in step_cost(parse_hlo(program), ring, devices).collectives if c.kind[0] == "r"
    )
    assert scatter.seconds == pytest.approx(1024 * 1024 * 2 * 3 / 4 / (2 * CHIP.link_bandwidth))


NESTED = """HloModule slices, is_scheduled=true

%inner (p: f32[8,128], i: s32[]) -> f32[1,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,128}
}

%outer (q: f32[8,128], j: s32[], r: f32[1,128]) -> f32[1,128] {
  %q = f32[8,128]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %r = f32[1,128]{1,0} parameter(2)
  %row = f32[1,128]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner
  ROOT %sum = f32[1,128]{1,0} add(%row, %r)
}

ENTRY %main (a: f32[8,128], k: s32[], b: f32[1,128]) -> f32[1,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %b = f32[1,128]{1,0} parameter(2)
  ROOT %out = f32[1,128]{1,0} fusion(%a, %k, %b), kind=kLoop, calls=%outer
}
"""


def test_slices_in_nested_fusions_are_all_that_is_read():
    """One row of eight, the other operand, the index, and the result."""
    found = step_cost(parse_hlo(NESTED), TPU, DEVICES)
    assert found.exposed_hbm == pytest.approx((3 * 128 * 4 + 4) / CHIP.hbm_bandwidth)


STACKED = """HloModule kept, is_scheduled=true

%update (p: f32[8,128], q: f32[128], i: s32[]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[128]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,128]{1,0} bitcast(%q)
  ROOT %put = f32[8,128]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

%keep (a: f32[8,128], b: f32[128], j: s32[]) -> (f32[8,128], f32[128], f32[128]) {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[128]{0} parameter(1)
  %j = s32[] parameter(2)
  %negated = f32[128]{0} negate(%b)
  %stack = f32[8,128]{1,0} fusion(%a, %negated, %j), kind=kLoop, calls=%update
  ROOT %both = (f32[8,128]{1,0}, f32[128]{0}, f32[128]{0}) tuple(%stack, %negated, %negated)
}

ENTRY %main (x: f32[128], k: s32[]) -> f32[8,128] {
  %x = f32[128]{0} parameter(0)
  %k = s32[] parameter(1)
  %empty = f32[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %both.1 = (f32[8,128]{1,0}, f32[128]{0}, f32[128]{0:T(128)S(1)}) fusion(%empty, %x, %k), \
kind=kLoop, calls=%keep
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%both.1), index=0
}
""".replace("\\\n", "")


def test_a_row_of_a_stack_is_all_that_is_written():
    """The operand, the index, the row and its copy; not the third result, which is on the chip."""
    found = step_cost(parse_hlo(STACKED), TPU, DEVICES)
    assert found.exposed_hbm == pytest.approx((3 * 128 * 4 + 4) / CHIP.hbm_bandwidth)


# In the form of what libtpu 0.0.42 prints where SparseCores move the data.
ASYNCHRONOUS = (Path(__file__).parent / "golden" / "sparsecore_v5p.hlo").read_text()


def test_what_sparse_cores_do_goes_on_beside_the_work():
    """The negation hides the gather; sums of the same channel are two; a slice moves once."""
    found = step_cost(parse_hlo(ASYNCHRONOUS), TPU, DEVICES)
    gather, *sums = found.collectives
    work = 2 * 4 * 8 * 1024 / CHIP.hbm_bandwidth
    assert gather.kind == "all-gather" and gather.asynchronous and gather.bytes == 128 * 128 * 2
    assert gather.exposed == pytest.approx(max(0, gather.seconds - work))
    assert [(c.kind, c.asynchronous) for c in sums] == [("all-reduce", False)] * 2
    assert found.exposed_hbm == pytest.approx(work + 4 * 1024 / CHIP.hbm_bandwidth)


RING = """HloModule ring, is_scheduled=true

%body (arg: (s32[], f32[256,256])) -> (s32[], f32[256,256]) {
  %arg = (s32[], f32[256,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[256,256]{1,0} get-tuple-element(%arg), index=1
  %two = s32[] constant(2)
  %up = (f32[256,256]{1,0}, f32[256,256]{1,0}) collective-permute-start(%x), UP
  %down = (f32[256,256]{1,0}, f32[256,256]{1,0}) collective-permute-start(%x), DOWN
  %work = f32[256,256]{1,0} negate(%x)
  %up.done = f32[256,256]{1,0} collective-permute-done(%up)
  %down.done = f32[256,256]{1,0} collective-permute-done(%down)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], f32[256,256]{1,0}) tuple(%next, %down.done)
}

%condition (arg.1: (s32[], f32[256,256])) -> pred[] {
  %arg.1 = (s32[], f32[256,256]{1,0}) parameter(0)
  %rounds = s32[] constant(8)
  %j = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%j, %rounds), direction=LT
}

ENTRY %main (a: (s32[], f32[256,256])) -> (s32[], f32[256,256]) {
  %a = (s32[], f32[256,256]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[256,256]{1,0}) while(%a), condition=%condition, body=%body
}
"""
UP = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
DOWN = "source_target_pairs={{0,3},{1,0},{2,1},{3,2}}"


def permutations(up, down):
    program = RING.replace("UP", up).replace("DOWN", down)
    return step_cost(parse_hlo(program), TPU, DEVICES).collectives


def test_unrolled_loops_run_less_often():
    assert [c.runs for c in permutations(UP, DOWN)] == [4, 4]


def test_permutations_in_opposite_ways_go_on_at_once():
    """One way takes a second one's time where nothing else is done, too."""
    work = 2 * 4 * 256 * 256 / CHIP.hbm_bandwidth
    seconds = 4 * 256 * 256 / CHIP.link_bandwidth
    for up, down, second in ((UP, DOWN, seconds), (UP, UP, 0.0), (DOWN, DOWN, 0.0)):
        found = permutations(up, down)
        assert all(c.seconds == seconds for c in found)
        hidden = [c.seconds - c.exposed for c in found]
        assert hidden == pytest.approx([work, second])


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        parse_hlo("error")
