"""The train step compiled ahead of time for a TPU slice, and the arithmetic about it."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import stage2_action
from configs.common import tiny
from st4vla_jax import plan_compile, plan_report
from st4vla_jax.chips import CHIPS, TopologyError, parse_slice, slice_devices
from st4vla_jax.config import model_config
from st4vla_jax.data.packing import Capacity
from st4vla_jax.flops import jaxpr_flops
from st4vla_jax.models import attention_splash
from st4vla_jax.plan_advice import advice
from st4vla_jax.plan_compile import (
    CompileError,
    OutOfMemoryError,
    compile_for,
    compile_plan,
    launch_flags,
    masked_scores,
    minimum_traffic,
)
from st4vla_jax.plan_cost import Collective, Cost
from st4vla_jax.plan_hlo import parse_hlo
from st4vla_jax.plan_setup import make_plan
from st4vla_jax.plan_table import memory_table
from st4vla_jax.sharding import make_mesh
from st4vla_jax.train_config import MeshSettings, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 256


def config(mesh, depth=12, times=1):
    """A tiny run whose VLM has widths and heads of 128 lanes on each chip, as large ones have.

    So many times the samples.  Twelve layers, so that the gather too many of a prefetched scan is
    under a tenth; compiling them takes no longer than two.
    """
    tree = tiny(stage2_action.get_config())
    tree.runtime.update({"compute": "bfloat16", "remat": "full", "vocab_tile": 64})
    for kind in ("robot_samples", "grounding_samples"):
        tree.data.schedule[kind] *= times
    tree.runtime.attention = "xla"  # kernels compile slowly; tests/models compiles them
    built = TrainConfig.from_dict(tree)
    model = built.model
    vision = dataclasses.replace(
        model.vision, depth=2, hidden_size=WIDTH, num_heads=2, fullatt_block_indexes=(1,),
        out_hidden_size=WIDTH,
    )  # fmt: skip
    text = dataclasses.replace(
        model.text, hidden_size=WIDTH, num_hidden_layers=depth, intermediate_size=2 * WIDTH,
        num_attention_heads=2, num_key_value_heads=1, head_dim=128, mrope_section=(16, 24, 24),
    )  # fmt: skip
    bridge = dataclasses.replace(model.bridge, start_layer=depth, end_layer=depth + 1)
    model = dataclasses.replace(model, vision=vision, text=text, bridge=bridge).check()
    return dataclasses.replace(built, model=model, mesh=MeshSettings(*mesh, {}))


@functools.cache
def plan_for(*mesh):
    return make_plan(config(mesh), math.prod(mesh))


def compile_tiny(topology, mesh, times=1):
    tpu = parse_slice(topology)
    try:
        devices = slice_devices(tpu)
    except TopologyError as error:
        pytest.skip(str(error))
    plan = make_plan(config(mesh, times=times), devices)
    # Without effort on the schedule, which is not looked at, it takes two thirds of the time.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        with jax.default_matmul_precision("default"):
            return plan, compile_plan(plan, tpu, launch_flags(tpu.chip))
    finally:
        jax.config.update("jax_exec_time_optimization_effort", 0.0)


@pytest.fixture(scope="module")
def compiled():
    return compile_tiny("v5e:2x2", (2, 2, 1))


@pytest.mark.aot
def test_the_train_step_moves_what_it_must(compiled):
    """Weights of sharded kernels are gathered, their gradients scattered and nothing else moves."""
    _, found = compiled
    for kind, least in found.minimum.items():
        assert 0.95 * least <= found.traffic()[kind][2] <= 1.1 * least, kind
    assert found.traffic().keys() <= found.minimum.keys() | {"collective-permute"}
    assert found.of_activations == () and found.rematerialised == 0 and not found.logits
    assert plan_report.warnings(found) == []


@pytest.mark.aot
def test_what_is_said_of_a_compiled_step(compiled):
    plan, found = compiled
    table = memory_table(plan)
    assert 0.5 * table.total < found.peak < 2 * table.total
    assert found.peak < found.tpu.chip.hbm_bytes
    assert 0 < found.model_flops < found.program_flops
    assert 0 < found.bound < 1
    lines = "\n".join(plan_report.compiled_lines(plan, found))
    assert "peak HBM of a chip" in lines and "all-gather" in lines
    json.dumps(plan_report.compiled_report(plan, found))


@pytest.mark.slow
@pytest.mark.aot
def test_cost_grows_with_the_chips(compiled):
    """Four times the chips and samples: the FLOPs of a sample and the bytes of a chip stay."""
    _, small = compiled
    _, large = compile_tiny("v5e:4x4", (8, 2, 1), times=4)
    assert large.samples == 4 * small.samples
    assert large.program_flops / 4 == pytest.approx(small.program_flops, rel=0.05)
    assert large.traffic().keys() == small.traffic().keys()
    for kind, (_, _, size) in large.traffic().items():
        assert size == pytest.approx(small.traffic()[kind][2], rel=0.05), kind


def test_logits_are_found():
    program = """HloModule scores, is_scheduled=true

ENTRY %main (a: f32[4,128]) -> f32[4,320] {
  %a = f32[4,128]{1,0} parameter(0)
  ROOT %b = f32[4,320]{1,0} custom-call(%a), custom_call_target="scores"
}
"""
    module = parse_hlo(program)
    assert plan_compile.has_logits(module, 320) and not plan_compile.has_logits(module, 64)


@pytest.mark.parametrize("length,head,share", [(1280, 128, 0.6), (1200, 128, 0.6), (1280, 80, 1)])
def test_blocks_above_the_diagonal_do_not_count(length, head, share):
    """Five blocks of 256: 15 of 25.  The vision tower's heads are of another size."""
    rows = [jax.ShapeDtypeStruct((2, length, 2, head), "bfloat16")] * 3
    segments = jax.ShapeDtypeStruct((2, length), "int32")

    def attention(*args):
        return attention_splash.attend(*args, causal=head == 128, interpret=False)

    traced = jax.make_jaxpr(attention)(*rows, segments)
    plan = SimpleNamespace(
        config=SimpleNamespace(model=model_config()),
        planned=SimpleNamespace(schedule=SimpleNamespace(capacity=Capacity(length, 0, 0, 0, 0, 0))),
    )
    kernels = {"pallas_call": plan_compile._kernel_flops(plan)}
    assert jaxpr_flops(traced, kernels=kernels) == pytest.approx(share * jaxpr_flops(traced))


@pytest.mark.aot
def test_an_option_that_the_compiler_lacks_is_named():
    tpu = parse_slice("v5e:2x2")
    mesh = make_mesh(2, 2, 1, slice_devices(tpu))
    x = jax.ShapeDtypeStruct((4,), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(CompileError, match="no option 'xla_tpu_no_such'"):
        compile_for(tpu, mesh, lambda s, b: (s + b, b), x, x, {"xla_tpu_no_such": "true"})


MEMORY = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.
Used 19.36G of 15.75G hbm. Exceeded hbm capacity by 3.61G."""


@pytest.mark.parametrize(
    "error,kind,message",
    [
        (MEMORY, OutOfMemoryError, r"needs 19\.36 GiB, a v5e chip has 15\.75 GiB, 3\.61"),
        ("RESOURCE_EXHAUSTED: HLO temporaries (19.36G) exceeds available HBM (15.75G)",
         OutOfMemoryError, r"temporaries alone need 19\.36 GiB"),
        ("INVALID_ARGUMENT: No such compile option: 'xla_tpu_x'", CompileError, "'xla_tpu_x'"),
        ("INTERNAL: Mosaic failed", CompileError, "refuses this step: INTERNAL: Mosaic failed"),
    ],
)  # fmt: skip
def test_what_the_compiler_refuses(error, kind, message):
    found = plan_compile._refused(error, parse_slice("v5e:8x8"))
    assert type(found) is kind
    with pytest.raises(kind, match=message):
        raise found


def test_the_least_that_must_move():
    """Sharded weights twice a microbatch, their gradients once; replicated gradients once."""
    plan = make_plan(dataclasses.replace(config((2, 2, 1)), accumulation=2), 4)
    sizes = {
        jax.tree_util.keystr(path): x.size
        for path, x in jax.tree_util.tree_leaves_with_path(plan.state.params)
    }
    vectors = ("bias", "scale")
    whole = {p: n for p, n in sizes.items() if "['vlm']" in p and p.split("'")[-2] not in vectors}
    rest = sum(sizes.values()) - sum(whole.values())
    rest += sum(n for p, n in sizes.items() if "['dit']" in p)  # its gradients are f32
    found = minimum_traffic(plan)
    assert found["all-gather"] == pytest.approx(2 * 2 * 2 * sum(whole.values()), rel=0.01)
    assert found["reduce-scatter"] == pytest.approx(2 * sum(whole.values()), rel=0.01)
    assert found["all-reduce"] == pytest.approx(2 * (sum(whole.values()) / 2 + rest), rel=0.01)
    assert minimum_traffic(plan_for(1, 1, 1)) == {}


def test_masked_scores_by_counting():
    plan = plan_for(1, 1, 1)
    vlm = plan.planned.batch.vlm
    wanted = total = 0
    for row in vlm.segment_ids:
        seen = (row[:, None] == row) & (row > 0)[:, None] & (row.size > 0)
        below = row.size * (row.size + 1) // 2
        wanted += int((seen & (jax.numpy.tri(row.size) > 0)).sum())
        total += below
    assert masked_scores(plan)["text"] == pytest.approx(1 - wanted / total)
    pairs = sum(int(((r[:, None] == r) & (r > 0)[:, None]).sum()) for r in vlm.patch_image)
    slots = vlm.patch_image.size * vlm.patch_image.shape[1]
    assert masked_scores(plan)["vision"] == pytest.approx(1 - pairs / slots)


@pytest.mark.parametrize("name", CHIPS)
def test_launch_flags_are_the_launchers(name):
    script = f"unset LIBTPU_INIT_ARGS; . launch/env.sh; set_compiler_flags tpu {name}; "
    script += 'printf "%s\\n" $LIBTPU_INIT_ARGS'
    lines = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    ).stdout.split()
    assert [f"--{key}={value}" for key, value in launch_flags(CHIPS[name]).items()] == lines


def collective(kind, size, exposed=0.0, dims=((8,),)):
    return Collective(kind, 3, size, (0, 1), ("x",), dims, "path", exposed < 1e-3, 1e-3, exposed)


def step(*collectives, **changes):
    fields = {
        "tpu": parse_slice("v5p:2x2x1"), "tensor": 1, "samples": 320, "steps": 100, "peak": 1e9,
        "program_flops": 4 * 459e12 * 0.3, "model_flops": 4 * 459e12 * 0.2,
        "cost": Cost(0.1, 0.05, tuple(collectives)),
        "minimum": {"all-gather": 3e9, "all-reduce": 1e9}, "of_activations": (),
        "rematerialised": 0, "logits": False, "seconds": 1.0, "host_bytes": 1e9,
    }  # fmt: skip
    return plan_compile.Compiled(**fields | changes)


def test_arithmetic_of_a_step():
    """0.3 s of products, of which 0.2 s are useful; 0.05 s of HBM and 3 x 1 ms exposed."""
    found = step(collective("all-gather", 1e9), collective("all-reduce", 1e8, 1e-3))
    assert found.step_s == pytest.approx(0.3 + 0.05 + 0.003)
    assert found.bound == pytest.approx(0.2 / 0.353)
    assert found.samples_per_host == pytest.approx(320 / 0.353)
    assert found.days == pytest.approx(100 * 0.353 / 86400)
    assert found.traffic() == {"all-gather": (3, 3, 3e9), "all-reduce": (3, 0, 3e8)}
    assert plan_report.limit(found) == "recomputation, padding and masked scores"
    assert plan_report.warnings(found) == []


def test_warnings():
    many = step(collective("all-gather", 2e9), collective("all-reduce", 1e9))
    assert [text.split(" ")[:3] for text in plan_report.warnings(many)] == [
        ["all-gathers", "move", "2.00"], ["all-reduces", "move", "2.00"],
    ]  # fmt: skip
    lost = step(collective("all-gather", 4e8))
    assert "became something else" in plan_report.warnings(lost)[0]
    moved = collective("all-gather", 1e9)
    found = step(moved, peak=96 * 2**30, of_activations=(moved,), rematerialised=2, logits=True)
    assert len(plan_report.warnings(found)) == 4


def test_activations_are_told_from_weights():
    plan = plan_for(1, 1, 1)
    tokens, slots = plan.planned.schedule.capacity.tokens, plan.planned.schedule.capacity.slots
    text = plan.config.model.text
    weight, table = (1, WIDTH, text.intermediate_size), (4, text.vocab_size // 4, WIDTH)
    for dims in ((4, tokens, WIDTH), (tokens, WIDTH), (4, slots, WIDTH), (4, slots // 4, WIDTH)):
        assert plan_compile._is_activation(collective("all-gather", 1, dims=(weight, dims)), plan)
    kept = collective("all-gather", 1, dims=(weight, table))
    assert not plan_compile._is_activation(kept, plan)


def test_sums_along_the_tensor_axis_are_what_it_is_for():
    plan = plan_for(1, 2, 2)
    summed = collective("all-reduce", 1)
    assert plan_compile._sums_tensor(summed, plan)
    assert not plan_compile._sums_tensor(summed, plan_for(1, 2, 1))
    for other in ({"kind": "all-gather"}, {"group": (0, 2)}, {"group": (0, 1, 2, 3)}):
        assert not plan_compile._sums_tensor(dataclasses.replace(summed, **other), plan)


def test_advice_is_ranked_by_what_it_saves():
    plan = plan_for(4, 1, 1)
    table = memory_table(plan)
    found = advice(plan, table)
    assert [a.saved for a in found] == sorted((a.saved for a in found), reverse=True)
    changes = [a.change for a in found]
    assert "--mesh=2,2,1" in changes and "--config.optim.mu_dtype=bfloat16" in changes
    assert not any("remat" in c for c in changes)  # it is full already
    state = sum(table.rows[n] for n in ("parameters", "moments", "gradients"))
    assert dict(zip(changes, found, strict=True))["--mesh=2,2,1"].saved == state / 2


def run_plan(*arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "st4vla_jax.plan", *arguments], cwd=ROOT, env=env,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_command_line_without_a_topology():
    done = run_plan("--config=configs/tabletop.py:stage2", "--mesh=2,1,1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert found["topology"] is None and found["compiled"] is None
    assert found["batch"]["sequences"] % 2 == 0
    assert found["table_bytes"]["moments"] == pytest.approx(2 * found["table_bytes"]["parameters"])


def test_a_slice_is_tabled_without_its_compiler(tmp_path, monkeypatch):
    library = tmp_path / "libtpu.so"
    library.write_text("no library")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    settings = ("--config=configs/tabletop.py:stage2", "--mesh=4,1,1", "--topology=v5e-4")
    refused = run_plan(*settings)
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: ")
    done = run_plan(*settings, "--nocompile", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["topology"] == "v5e:2x2" and found["compiled"] is None


def test_command_line_says_what_is_wrong():
    done = run_plan("--config=configs/tabletop.py:stage2", "--topology=v5p:9x9x9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: topology 'v5p:9x9x9' does not exist")
