"""Weights that are gathered a block ahead: same numbers as a plain scan on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.config import VLM_PRESETS
from st4vla_jax.models import prefetch
from st4vla_jax.models.qwen_lm import LanguageModel
from st4vla_jax.runtime import FLOAT32
from st4vla_jax.sharding import make_mesh, param_shardings, unbox

B, T = 8, 16
CFG = dataclasses.replace(VLM_PRESETS["tiny"][1], num_hidden_layers=3)


def decoder(remat):
    return LanguageModel(CFG, dataclasses.replace(FLOAT32, remat=remat))


def inputs():
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, T))
    positions = np.tile(np.arange(T)[None, :, None], (B, 1, 3))
    return tokens, positions, np.repeat([[1] * 9 + [2] * 5 + [0] * 2], B, 0)


def loss_of(model):
    def loss(params, tokens, positions, segments):
        embeds = model.apply({"params": params}, tokens, method=LanguageModel.embed)
        hidden = model.apply({"params": params}, embeds, positions, segments).hidden
        return jnp.sum(jnp.sin(hidden) * jnp.arange(CFG.hidden_size))

    return jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def one_device():
    tokens, positions, segments = inputs()
    model = decoder("none")
    embeds = jnp.zeros((1, T, CFG.hidden_size))
    boxed = jax.jit(model.init)(jax.random.key(0), embeds, positions[:1], segments[:1])["params"]
    params = unbox(boxed)
    return boxed, params, jax.jit(loss_of(model))(params, tokens, positions, segments)


@pytest.mark.parametrize("remat,mesh", [("dots", (2, 4, 1)), ("full_keep_weights", (2, 2, 2))])
def test_equal_to_a_plain_scan(one_device, remat, mesh):
    boxed, params, (want, want_grads) = one_device
    mesh, model = make_mesh(*mesh), decoder(remat)
    shardings = param_shardings(boxed, mesh, model.rt.rules)
    with jax.set_mesh(mesh):
        step = jax.jit(loss_of(model), out_shardings=(None, shardings))
        lowered = step.lower(jax.device_put(params, shardings), *inputs())
        got, grads = lowered.compile()(jax.device_put(params, shardings), *inputs())
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())
    assert "custom_vjp" in program(model, mesh, params)


def program(model, mesh, params):
    def run(params):
        embeds = jnp.zeros((B, T, CFG.hidden_size))
        return model.apply({"params": params}, embeds, *inputs()[1:]).hidden

    with jax.set_mesh(mesh):
        return str(jax.make_jaxpr(run)(params))


@pytest.mark.parametrize(
    "remat,kept",
    [("full", 1), ("dots", 7), ("dots_decoder", 7), ("dots_decoder_mlp", 7),
     ("full_keep_weights", 13)],
)  # fmt: skip
def test_what_is_kept_for_the_backward_pass(one_device, remat, kept):
    """A block's input; six products; or the twelve weights, gathered."""
    found = []

    def forward(*args):
        out = prefetch._forward(*args)
        found.append(jax.tree.leaves(out[1][0]))
        return out

    model, mesh = decoder(remat), make_mesh(2, 4, 1)
    prefetch._scan.defvjp(forward, prefetch._backward)
    try:
        with jax.set_mesh(mesh):
            jax.make_jaxpr(loss_of(model))(one_device[1], *inputs())
    finally:
        prefetch._scan.defvjp(prefetch._forward, prefetch._backward)
    assert len(found[0]) == kept and all(len(x) == CFG.num_hidden_layers for x in found[0])


@pytest.mark.parametrize("remat,waits", [("full", 0), ("dots", 1), ("dots_decoder", 1)])
def test_what_reads_positions_may_wait_for_the_next_weights(one_device, remat, waits):
    with jax.set_mesh(make_mesh(2, 4, 1)):
        traced = jax.make_jaxpr(loss_of(decoder(remat)))(one_device[1], *inputs())
    assert str(traced).count("optimization_barrier") == waits


def test_adapters_take_the_plain_scan(one_device):
    """Their leaves have no place in the layout of a block."""
    _, params, _ = one_device
    q_proj = params["blocks"]["self_attn"]["q_proj"]
    adapters = {
        "lora_a": jnp.zeros((3, CFG.hidden_size, 2)),
        "lora_b": jnp.zeros((3, 2, CFG.num_attention_heads, CFG.head_dim)),
    }
    attention = params["blocks"]["self_attn"] | {"q_proj": q_proj | adapters}
    params = params | {"blocks": params["blocks"] | {"self_attn": attention}}
    mesh, model = make_mesh(2, 4, 1), decoder("full")
    assert "custom_vjp" not in program(model, mesh, params)
