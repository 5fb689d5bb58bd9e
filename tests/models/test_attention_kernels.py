"""The kernels behind attention() against its dense XLA form: splash in Pallas's interpreter, and
everything around cuDNN with XLA standing in for the one call that needs a GPU."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from st4vla_jax.config import VLM_PRESETS, Runtime
from st4vla_jax.models import attention as attention_module
from st4vla_jax.models import attention_cudnn
from st4vla_jax.models.attention import attention, kernel_for, segment_mask
from st4vla_jax.models.qwen_lm import LanguageModel
from st4vla_jax.models.qwen_vision import VisionTower
from st4vla_jax.runtime import DTypes
from st4vla_jax.sharding import Rules, make_mesh

BF16 = jnp.bfloat16


@pytest.fixture
def xla_for_cudnn(monkeypatch):
    """cuDNN's call computed by XLA, in float32 too; yields the calls' keyword arguments."""
    calls, real = [], jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        calls.append(kwargs)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention_cudnn, "supports", lambda *_: True)
    return calls


def packed(batch, length, seed=0):
    """Segments 1, 2, .. and a tail of padding in each row; the last row is padding throughout."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((batch, length), np.int32)
    for row in segments[:-1]:
        start = 0
        for number in range(1, 9):
            stop = start + int(rng.integers(1, length // 3))
            row[start : min(stop, length - 5)] = number
            start = stop
    return segments


def inputs(lead, length, heads, groups, dim):
    rng = np.random.default_rng([length, heads, dim])
    shapes = [(*lead, length, n, dim) for n in (heads, groups, groups, heads)]
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def result_and_gradient(q, k, v, g, segments, causal, kernel, rules=None):
    def run(q, k, v):
        return attention(
            q, k, v, q_segments=segments, kv_segments=segments, causal=causal, kernel=kernel,
            rules=rules,
        )  # fmt: skip

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(jnp.asarray(g))


def assert_equal(got, want, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()))


CASES = [(128, 2, 256, True), (80, 4, 200, False), (64, 1, 130, True)]


@pytest.mark.parametrize("dim,groups,length,causal", CASES)
def test_splash_equals_dense(dim, groups, length, causal):
    args = (*inputs((2,), length, 4, groups, dim), packed(2, length), causal)
    run = jax.jit(result_and_gradient, static_argnums=(5, 6))
    assert_equal(run(*args, "splash"), run(*args, "xla"))


MESHES = [(2, 2, 2, ()), (1, 2, 4, ()), (1, 1, 8, ()), (2, 2, 2, ("tensor",))]


@pytest.mark.parametrize("data,fsdp,tensor,kv_axes", MESHES)
def test_mesh_splits_rows_and_heads(xla_for_cudnn, data, fsdp, tensor, kv_axes):
    """Every device gets the key/value heads of its query heads, whole or split by the rules."""
    rules = Rules().replace(act_kv_heads=kv_axes)
    args = (*inputs((4,), 16, 8, 2, 8), packed(4, 16), True)
    want = jax.jit(result_and_gradient, static_argnums=(5, 6))(*args, "xla")
    with jax.set_mesh(make_mesh(data, fsdp, tensor)):
        run = jax.jit(result_and_gradient, static_argnums=(5, 6, 7))
        got = run(*args, "cudnn", rules)
        text = run.lower(*args, "cudnn", rules).compile().as_text()
    assert_equal(got, want)
    assert xla_for_cudnn
    assert "all-gather" not in text.split("ENTRY")[0]


def test_splash_on_a_mesh_equals_dense():
    args = (*inputs((2,), 128, 4, 2, 64), packed(2, 128), True)
    want = jax.jit(result_and_gradient, static_argnums=(5, 6))(*args, "xla")
    with jax.set_mesh(make_mesh(1, 2, 4)):
        got = jax.jit(result_and_gradient, static_argnums=(5, 6, 7))(*args, "splash", Rules())
    assert_equal(got, want)


def test_rows_that_do_not_divide_stay_whole(xla_for_cudnn):
    args = (*inputs((3,), 16, 3, 1, 8), packed(3, 16), False)
    want = jax.jit(result_and_gradient, static_argnums=(5, 6))(*args, "xla")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got = jax.jit(result_and_gradient, static_argnums=(5, 6, 7))(*args, "cudnn", Rules())
    assert_equal(got, want)


@pytest.mark.parametrize("lead,causal", [((2,), True), ((2, 3), False)])
def test_cudnn_path_equals_dense(xla_for_cudnn, lead, causal):
    segments = packed(int(np.prod(lead)), 16).reshape(*lead, 16)
    args = (*inputs(lead, 16, 4, 2, 8), segments, causal)
    run = jax.jit(result_and_gradient, static_argnums=(5, 6))
    assert_equal(run(*args, "cudnn"), run(*args, "xla"))
    assert [c["is_causal"] for c in xla_for_cudnn] == [causal]
    # A float mask would cost a gradient in every block.
    assert xla_for_cudnn[0]["mask"].dtype == bool


def language_model(kernel, segments):
    cfg = dataclasses.replace(VLM_PRESETS["tiny"][1], num_hidden_layers=DEPTH)
    batch, length = segments.shape
    x = np.random.default_rng(0).standard_normal((batch, length, cfg.hidden_size))
    positions = np.broadcast_to(np.arange(length)[None, :, None], (batch, length, 3))
    return LanguageModel(cfg, runtime(kernel)), (x.astype(np.float32), positions, segments)


def vision_tower(kernel, segments):
    cfg = dataclasses.replace(
        VLM_PRESETS["tiny"][0], depth=DEPTH, fullatt_block_indexes=(1,)
    )  # fmt: skip
    batch, length = segments.shape
    patches = np.random.default_rng(0).integers(0, 256, (batch, length, 588)).astype(np.uint8)
    hw = np.broadcast_to(np.stack(np.divmod(np.arange(length), 8), -1), (batch, length, 2))
    return VisionTower(cfg, runtime(kernel)), (patches, hw.astype(np.int32), segments, segments)


DEPTH = 2


def runtime(kernel):
    return Runtime(DTypes(compute=jnp.float32), attention=kernel)


@functools.cache
def model_params(build):
    model, args = build("xla", packed(2, 64))
    params = jax.jit(model.init)(jax.random.key(0), *args)
    return jax.tree.map(lambda p: 4 * p, params)  # else attention adds next to nothing


def model_gradient(build, kernel, segments):
    """A function of (params, args) and its arguments."""
    model, args = build(kernel, segments)

    def loss(params, args):
        out = model.apply(params, *args)
        out = getattr(out, "hidden", out)
        return jnp.mean(out * jax.random.normal(jax.random.key(1), out.shape))

    return jax.value_and_grad(loss), (model_params(build), args)


@functools.cache
def xla_gradient(build):
    step, args = model_gradient(build, "xla", packed(2, 128))
    return jax.tree.leaves(jax.jit(step)(*args))


@pytest.mark.parametrize("build", [language_model, vision_tower])
def test_models_give_the_same_gradient_with_cudnn(xla_for_cudnn, build):
    want = xla_gradient(build)
    assert not xla_for_cudnn
    step, args = model_gradient(build, "cudnn", packed(2, 128))
    got = jax.jit(step)(*args)
    assert xla_for_cudnn
    assert_equal(jax.tree.leaves(got), want, atol=1e-4)


def count(jaxpr, found) -> int:
    """Equations for which ``found`` holds, each scan's body counted once for every turn."""
    total = 0
    for eqn in jaxpr.eqns:
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += found(eqn)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += turns * count(inner, found)
    return total


@pytest.mark.parametrize("build,masks", [(language_model, 1), (vision_tower, 2)])
def test_the_mask_is_made_once_for_all_blocks(xla_for_cudnn, build, masks):
    """Not in every block, nor again in the backward pass, and never kept once for each block."""
    step, args = model_gradient(build, "cudnn", packed(2, 192))
    jaxpr = jax.make_jaxpr(step)(*args).jaxpr

    def compares_segments(eqn):
        # [2,192,192] over rows, [2,3,64,64] over windows
        return eqn.primitive.name == "eq" and eqn.outvars[0].aval.shape[-1:] in ((192,), (64,))

    assert count(jaxpr, compares_segments) == masks

    def stacks_masks(eqn):
        shapes = [v.aval.shape for v in eqn.outvars]
        return eqn.primitive.name == "scan" and any(s[-2:] == (192, 192) for s in shapes)

    assert count(jaxpr, stacks_masks) == 0


def test_language_model_with_splash_on_a_mesh():
    """Inside the scan over rematerialised blocks."""
    step, args = model_gradient(language_model, "splash", packed(2, 128))
    with jax.set_mesh(make_mesh(1, 2, 4)):
        lowered = jax.jit(step).lower(*args)
        got = lowered.compile()(*args)
    assert "manual_computation" in lowered.as_text()
    assert_equal(jax.tree.leaves(got), xla_gradient(language_model), atol=1e-4)


def test_kernel_for():
    assert kernel_for("auto", BF16, 1024, 1024, 128) == "xla"  # the tests run on CPUs
    assert kernel_for("cudnn", BF16, 1024, 1024, 80) == "cudnn"
    for dtype, q_len, kv_len, dim in [
        (jnp.float32, 1024, 1024, 128), (BF16, 1023, 1023, 128), (BF16, 2, 3, 128),
        (BF16, 64, 64, 100), (BF16, 64, 64, 256),
    ]:  # fmt: skip
        assert kernel_for("cudnn", dtype, q_len, kv_len, dim) == "xla"
    assert kernel_for("cudnn", BF16, 64, 128, 128) == "cudnn"
    assert kernel_for("cudnn", BF16, 64, 128, 128, causal=True) == "xla"
    assert kernel_for("splash", jnp.float32, 257, 257, 80) == "splash"
    assert kernel_for("splash", BF16, 64, 64, 80) == "xla"
    assert kernel_for("splash", BF16, 1, 1024, 128) == "xla"
    with pytest.raises(ValueError, match="unknown attention kernel 'flash'.*xla, cudnn, splash"):
        kernel_for("flash", BF16, 8, 8, 8)
    with pytest.raises(ValueError, match="did you mean 'splash'"):
        Runtime(attention="spalsh")


@pytest.mark.parametrize("platform,kernel", [("tpu", "splash"), ("gpu", "cudnn"), ("cpu", "xla")])
def test_auto_is_the_platforms_kernel(monkeypatch, platform, kernel):
    monkeypatch.setattr(attention_module, "platform", lambda: platform)
    monkeypatch.setattr(attention_cudnn, "device_has_kernel", lambda: True)
    assert kernel_for("auto", BF16, 1024, 1024, 128) == kernel
    mask = segment_mask("auto", BF16, 128, *(jnp.zeros((2, 8), jnp.int32),) * 2)
    assert (mask is not None) == (platform == "gpu")


def test_old_gpus_stay_with_xla(monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_cudnn, "device_has_kernel", lambda: False)
    assert kernel_for("auto", BF16, 1024, 1024, 128) == "xla"


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_cached_keys_and_dropout_stay_with_xla(xla_for_cudnn, kernel):
    q, k, v, _ = inputs((1,), 128, 2, 2, 8)
    plain = attention(q, k, v, causal=True, q_offset=jnp.int32(3))
    offset = attention(q, k, v, causal=True, q_offset=jnp.int32(3), kernel=kernel)
    np.testing.assert_array_equal(offset, plain)
    zeroed = attention(q, k, v, weights_fn=jnp.zeros_like, kernel=kernel)
    np.testing.assert_array_equal(zeroed, np.zeros_like(q))
    assert not xla_for_cudnn


@pytest.fixture(scope="module")
def tpu_mesh():
    """Compile-only v5p:2x2x1 as (data 1, fsdp 2, tensor 2)."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        devices = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
    except RuntimeError as e:
        pytest.skip(f"needs libtpu (the [tpu] extra): {e}")
    return make_mesh(1, 2, 2, devices=devices)


AOT_CASES = [
    ("language model", 1024, 16, 2, 128, True),
    ("vision tower", 2560, 16, 16, 80, False),
    pytest.param("head dim 64, padded", 1100, 16, 16, 64, False, marks=pytest.mark.slow),
]


@pytest.mark.aot
@pytest.mark.parametrize("name,length,heads,groups,dim,causal", AOT_CASES)
def test_splash_compiles_for_tpu(tpu_mesh, name, length, heads, groups, dim, causal):
    """Forward and backward at the 3B model's shapes, chosen by "auto" from the mesh's platform."""
    rules = Rules()
    run = functools.partial(result_and_gradient, causal=causal, kernel="auto", rules=rules)

    def array(count):
        spec = rules.spec(("batch", "act_seq", "act_heads" if count == heads else None, None))
        sharding = jax.sharding.NamedSharding(tpu_mesh, spec)
        return jax.ShapeDtypeStruct((4, length, count, dim), BF16, sharding=sharding)

    rows = jax.sharding.NamedSharding(tpu_mesh, rules.spec(("batch", None)))
    segments = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows)
    # Mosaic has no bf16 matmul at conftest's "highest" precision.
    with jax.set_mesh(tpu_mesh), jax.default_matmul_precision("default"):
        args = (array(heads), array(groups), array(groups), array(heads), segments)
        compiled = jax.jit(run).lower(*args).compile()
    text = compiled.as_text()
    # Forward, dq, and dk with dv; scores [.., length, length] never exist.
    assert text.count('custom_call_target="tpu_custom_call"') >= 3
    assert f"{length},{length}]" not in text
    assert "all-gather" not in text and "all-to-all" not in text
