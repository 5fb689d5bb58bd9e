import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.rules import text_rules
from st4vla_jax.config import FLOAT32, DTypes, TextConfig
from st4vla_jax.models.layers import RMSNorm
from st4vla_jax.models.mrope import rotary_tables
from st4vla_jax.models.qwen_lm import DecoderBlock, LanguageModel, Tap
from st4vla_jax.sharding import make_mesh, param_shardings, unbox

CFG = TextConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, mrope_section=(1, 1, 2),
)  # fmt: skip
DEPTH = CFG.num_hidden_layers
MODEL = LanguageModel(CFG, FLOAT32)


def _init(key):
    args = jnp.zeros((1, 2, CFG.hidden_size)), jnp.zeros((1, 2, 3), jnp.int32)
    return MODEL.init(key, *args, jnp.ones((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def params():
    """Every leaf random: fresh scales and biases would hide a missing one."""
    tree = unbox(jax.jit(_init)(jax.random.key(0)))
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


class Packed(NamedTuple):
    """Rows of segments of these lengths, then padding up to ``length``."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


def pack(lengths, length, seed=0):
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    segments = np.zeros((batch, length), np.int32)
    positions = np.zeros((batch, length, 3), np.int32)
    for b, row in enumerate(lengths):
        start = 0
        for i, n in enumerate(row):
            segments[b, start : start + n] = i + 1
            steps = rng.integers(0, 2, (n, 3))
            steps[0] = 0
            positions[b, start : start + n] = np.cumsum(steps, axis=0)
            start += n
    tokens = rng.integers(0, CFG.vocab_size, (batch, length), dtype=np.int32)
    return Packed(tokens, positions, segments)


@functools.partial(jax.jit, static_argnames=("rt",))
def forward(params, tokens, positions, segment_ids, rt=FLOAT32):
    model = LanguageModel(CFG, rt)
    embeds = model.apply({"params": params}, tokens, method="embed")
    return model.apply({"params": params}, embeds, positions, segment_ids).hidden


def run(params, packed, **kw):
    return forward(params, packed.tokens, packed.positions, packed.segment_ids, **kw)


def tapped(params, packed, start, end, fn, carry, xs, rt=FLOAT32):
    model = LanguageModel(CFG, rt)
    embeds = model.apply({"params": params}, packed.tokens, method="embed")
    tap = Tap(start, end, xs, carry, fn)
    args = embeds, packed.positions, packed.segment_ids
    return model.apply({"params": params}, *args, tap=tap)


def collect(params, packed, start, end, rt=FLOAT32):
    """Hidden states start..end-1, [end - start, B, T, D], and the final one."""
    num = end - start
    empty = jnp.zeros((num, *packed.tokens.shape, CFG.hidden_size))
    out = tapped(
        params, packed, start, end, lambda c, i, h: c.at[i].set(h), empty, jnp.arange(num), rt
    )
    return out.carry, out.hidden


def test_parameters_are_those_of_the_conversion_table():
    tree = unbox(jax.eval_shape(_init, jax.random.key(0)))
    found = {
        "language_model/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert found == {rule.jax: rule.jax_shape for rule in text_rules(CFG)}


def test_packed_sequences_equal_separate_forwards(params):
    lengths = [[5, 9, 3], [12], [1, 1, 14]]
    packed = pack(lengths, 20)
    got = run(params, packed)
    assert bool(jnp.all(jnp.isfinite(got)))
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            cut = np.s_[b : b + 1, start : start + n]
            alone = Packed(packed.tokens[cut], packed.positions[cut], np.ones((1, n), np.int32))
            np.testing.assert_allclose(got[cut], run(params, alone), atol=1e-5)
            start += n


def test_padding_holds_the_vector_of_its_token_without_attention(params):
    packed = pack([[4, 3], [6]], 12)
    packed.tokens[packed.segment_ids == 0] = 7
    got = np.asarray(run(params, packed))[packed.segment_ids == 0]
    assert len(got) == 11
    block, norm = params["blocks"], params["norm"]["scale"]

    def rms(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2) + CFG.rms_norm_eps) * scale

    x = params["embed_tokens"]["embedding"][7]
    for i in range(DEPTH):
        y = rms(x, block["post_attention_layernorm"]["scale"][i])
        mlp = {name: block["mlp"][name]["kernel"][i] for name in block["mlp"]}
        x = x + (jax.nn.silu(y @ mlp["gate_proj"]) * (y @ mlp["up_proj"])) @ mlp["down_proj"]
    np.testing.assert_allclose(got, np.tile(rms(x, norm), (11, 1)), atol=1e-5)


def test_token_ids_outside_the_vocabulary_give_nan(params):
    packed = pack([[4], [4]], 4)
    packed.tokens[0, 2] = CFG.vocab_size
    finite = np.isfinite(np.asarray(run(params, packed))).all(axis=-1)
    assert not finite[0, 2] and finite[1].all()


@jax.jit
def one_block(layer, x, rope, segment_ids):
    block = DecoderBlock(CFG, FLOAT32, parent=None)
    return block.apply({"params": layer}, x, rope, segment_ids)[0]


def one_by_one(params, packed):
    """Hidden states of all ids from a plain loop over the blocks, [depth + 1, B, T, D]."""
    rope = rotary_tables(packed.positions, CFG.head_dim, CFG.mrope_section, CFG.rope_theta)
    states = [jnp.take(params["embed_tokens"]["embedding"], packed.tokens, axis=0)]
    for i in range(DEPTH):
        layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        states.append(one_block(layer, states[-1], rope, packed.segment_ids))
    norm = RMSNorm(CFG.hidden_size, "embed", CFG.rms_norm_eps)
    states[-1] = norm.apply({"params": params["norm"]}, states[-1])
    return jnp.stack(states)


RANGES = [(0, 5), (0, 1), (1, 3), (1, 4), (3, 5), (4, 5), (0, 3), (2, 3)]


@pytest.mark.parametrize("start, end", RANGES)
def test_a_tap_reads_the_hidden_states_of_its_range(params, start, end):
    packed = pack([[5, 4], [9]], 10)
    want = one_by_one(params, packed)
    got, hidden = jax.jit(collect, static_argnums=(2, 3))(params, packed, start, end)
    np.testing.assert_allclose(hidden, want[-1], atol=1e-5)
    assert len(got) == end - start
    np.testing.assert_allclose(got, want[start:end], atol=1e-5)


@pytest.mark.parametrize(
    "start, end, remat",
    [(0, 5, "full"), (1, 3, "full"), (1, 3, "none"), (1, 3, "dots"), (4, 5, "dots")],
)
def test_gradients_through_a_tap_equal_those_of_a_plain_loop(params, start, end, remat):
    packed = pack([[5, 4], [9]], 10)
    shape = (end - start, CFG.hidden_size, CFG.hidden_size)
    mixers = jax.random.normal(jax.random.key(2), shape) / 8
    rt = dataclasses.replace(FLOAT32, remat=remat)

    def read(carry, mixer, hidden):
        return jnp.tanh(carry + hidden @ mixer)

    def loss(params, mixers):
        zero = jnp.zeros((*packed.tokens.shape, CFG.hidden_size))
        out = tapped(params, packed, start, end, read, zero, mixers, rt)
        return jnp.sum(out.carry**2) + jnp.sum(jnp.sin(out.hidden))

    def reference(params, mixers):
        states = one_by_one(params, packed)
        carry = jnp.zeros_like(states[0])
        for i in range(start, end):
            carry = read(carry, mixers[i - start], states[i])
        return jnp.sum(carry**2) + jnp.sum(jnp.sin(states[-1]))

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, mixers)
    want = jax.grad(reference, argnums=(0, 1))(params, mixers)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(b).max()) > 1e-3, path
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize("start, end", [(3, 3), (-1, 2), (4, 6)])
def test_a_tap_outside_the_hidden_states_is_refused(params, start, end):
    with pytest.raises(ValueError, match=r"there are 5, with ids 0\.\.4"):
        collect(params, pack([[3]], 3), start, end)


def test_a_tap_does_not_change_the_parameter_tree():
    def init(key, tap):
        args = jnp.zeros((1, 2, CFG.hidden_size)), jnp.zeros((1, 2, 3), jnp.int32)
        return MODEL.init(key, *args, jnp.ones((1, 2), jnp.int32), tap=tap)["params"]

    tap = Tap(2, 4, jnp.zeros(2), jnp.zeros(()), lambda c, x, h: c + x + jnp.sum(h))
    trees = [jax.eval_shape(init, jax.random.key(0), None)]
    trees.append(jax.eval_shape(lambda k: init(k, tap), jax.random.key(0)))
    assert trees[0] == trees[1]


def test_only_a_tap_inside_the_stack_slices_weights(params):
    packed = pack([[5]], 5)
    stacked = {p.shape for p in jax.tree.leaves(params["blocks"])}

    def num_slices(start, end):
        jaxpr = jax.make_jaxpr(collect, static_argnums=(2, 3))(params, packed, start, end)
        sliced = [e for e in jaxpr.eqns if e.primitive.name == "slice"]
        return sum(e.invars[0].aval.shape in stacked for e in sliced)

    assert num_slices(DEPTH, DEPTH + 1) == 0
    assert num_slices(1, 3) > 0


def test_query_chunks_equal_one_piece(params):
    packed = pack([[7, 6], [11]], 14)
    chunked = run(params, packed, rt=dataclasses.replace(FLOAT32, query_chunk=4))
    np.testing.assert_allclose(chunked, run(params, packed), atol=1e-5)


def test_bf16_stays_near_f32(params):
    packed = pack([[7, 6], [11]], 14)
    got = run(params, packed, rt=dataclasses.replace(FLOAT32, dtypes=DTypes()))
    assert got.dtype == jnp.bfloat16
    error = np.asarray(got, np.float32) - np.asarray(run(params, packed))
    assert np.sqrt(np.mean(error**2)) < 0.1


def test_a_mesh_gives_the_values_and_gradients_of_one_device(params):
    packed = pack([[5, 4], [9], [2, 2, 2], [10]], 10)
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings(jax.eval_shape(_init, jax.random.key(0)), mesh, FLOAT32.rules)

    def loss(params, packed):
        return jnp.sum(forward(params, packed.tokens, packed.positions, packed.segment_ids) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    want = step(params, packed)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        lowered = step.lower(sharded, packed)
        got = lowered.compile()(sharded, packed)
    assert lowered.as_text().count("sharding_constraint") > 5
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
