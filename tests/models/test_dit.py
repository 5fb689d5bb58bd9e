import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.rules import dit_rules, leaves_from_torch
from st4vla_jax.checkpoint import nested
from st4vla_jax.config import DIT_PRESETS, FLOAT32, DitConfig
from st4vla_jax.models.diffusion import ddim_sample, guided
from st4vla_jax.models.dit import DiT
from st4vla_jax.sharding import is_axes, unbox
from tests.reference import golden

TINY = DitConfig(depth=2, hidden_size=32, num_heads=4, num_condition_tokens=6, chunk=5)


def torch_shapes(cfg):
    history = {
        "history_embedder.linear.weight": (cfg.hidden_size, cfg.action_dim),
        "history_embedder.linear.bias": (cfg.hidden_size,),
    }
    return {k: r.torch_shape for r in dit_rules(cfg) for k in r.torch_keys} | history


def random_params(cfg, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    leaves = [(r.jax, scale * rng.normal(size=r.jax_shape)) for r in dit_rules(cfg)]
    return {"params": nested((k, jnp.asarray(v, jnp.float32)) for k, v in leaves)}


def inputs(cfg, *lead, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*lead, cfg.chunk, cfg.action_dim)).astype(np.float32)
    z = rng.normal(size=(*lead, cfg.num_condition_tokens, cfg.hidden_size)).astype(np.float32)
    return x, rng.integers(0, 100, lead).astype(np.int32), z


def init_shapes(cfg):
    args = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, inputs(cfg, 1)))
    return jax.eval_shape(DiT(cfg, FLOAT32).init, jax.random.key(0), *args)["params"]


@pytest.mark.parametrize("name", DIT_PRESETS)
def test_parameter_tree_is_the_one_of_the_rules(name):
    cfg = DIT_PRESETS[name]
    flat = jax.tree_util.tree_flatten_with_path(init_shapes(cfg), is_leaf=is_axes)[0]
    shapes = {"/".join(k.key for k in path): box.value.shape for path, box in flat}
    assert shapes == {rule.jax: rule.jax_shape for rule in dit_rules(cfg)}


@pytest.fixture(scope="module", params=["s", "b"])
def filled(request, shared):
    """Golden entries of one preset, its jitted functions and its weights under the fill rule."""
    cfg = DIT_PRESETS[request.param]
    name = f"DiT-{request.param.upper()}"
    tensors = golden.fill(torch_shapes(cfg))
    params = nested(leaves_from_torch(dit_rules(cfg), tensors.__getitem__))
    return cfg, name, {"params": jax.tree.map(jnp.asarray, params)}, golden.load(shared)


@pytest.mark.parity
def test_forward_equals_golden(filled):
    cfg, name, params, want = filled
    x = golden.wave((2, 16, 7), 1, 0.3)
    z = golden.wave((2, 64, cfg.hidden_size), 1, 0.9)
    got = jax.jit(DiT(cfg, FLOAT32).apply)(params, x, jnp.asarray([3, 77]), z)
    golden.assert_matches(got, want[f"{name}_forward"]["out"], 1e-4)


@pytest.mark.parity
def test_timestep_embedding_equals_golden(filled):
    cfg, name, params, want = filled
    got = DiT(cfg, FLOAT32).apply(params, jnp.asarray([3, 77]), method=DiT.embed_timestep)
    golden.assert_matches(got, want[f"{name}_t_embed"]["out"], 1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("key", "num_steps", "scale"), [("ddim10_cfg1.5", 10, 1.5), ("ddim5_nocfg", 5, 1.0)]
)
def test_ddim_equals_golden(filled, key, num_steps, scale):
    cfg, name, params, want = filled

    @jax.jit
    def sample(params, noise, condition):
        def denoise(x, t, z):
            return DiT(cfg, FLOAT32).apply(params, x, t, z)

        uncondition = params["params"]["z_embedder"]["uncondition"]
        return ddim_sample(guided(denoise, condition, uncondition, scale), noise, num_steps)

    noise = golden.wave((1, 16, 7), 1, 1.1)
    got = sample(params, noise, golden.wave((1, 64, cfg.hidden_size), 1, 0.9))
    golden.assert_matches(got, want[f"{name}_{key}"]["out"], 1e-3)


def torch_dit(cfg, tensors, x, t, z):
    """Upstream's forward with torch functions."""
    torch = pytest.importorskip("torch")
    w = {k: torch.from_numpy(v) for k, v in tensors.items()}
    x, t, z = (torch.from_numpy(a) for a in (x, t, z))
    functional = torch.nn.functional

    def linear(y, name):
        return functional.linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(y):
        return functional.layer_norm(y, y.shape[-1:], eps=1e-6)

    angles = t[:, None] * 10_000.0 ** (-torch.arange(128) / 128)
    time = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "t_embedder.mlp.0")
    time = linear(functional.silu(time), "t_embedder.mlp.2")
    condition = linear(z, "z_embedder.linear") + time[:, None]
    h = torch.cat([condition, linear(x, "x_embedder.linear")], dim=1) + w["positional_embedding"]
    for i in range(cfg.depth):
        qkv = linear(norm(h), f"blocks.{i}.attn.qkv").unflatten(2, (3, cfg.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + linear(mixed, f"blocks.{i}.attn.proj")
        up = functional.gelu(linear(norm(h), f"blocks.{i}.mlp.fc1"), approximate="tanh")
        h = h + linear(up, f"blocks.{i}.mlp.fc2")
    return linear(norm(h), "final_layer.linear")[:, -cfg.chunk :].numpy()


@pytest.mark.parity
def test_equals_torch():
    """Larger activations than under the golden fill: these tell tanh GELU from exact GELU."""
    rng = np.random.default_rng(0)
    tensors = {
        k: (0.15 * rng.normal(size=s)).astype(np.float32) for k, s in torch_shapes(TINY).items()
    }
    params = {"params": nested(leaves_from_torch(dit_rules(TINY), tensors.__getitem__))}
    args = inputs(TINY, 3)
    want = torch_dit(TINY, tensors, *args)
    got = jax.jit(DiT(TINY, FLOAT32).apply)(params, *args)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_fresh_parameters_are_upstreams():
    cfg = DitConfig(depth=2, hidden_size=256, num_heads=4)
    init = jax.jit(DiT(cfg, FLOAT32).init)
    params = unbox(init(jax.random.key(0), *inputs(cfg, 1)))
    out = DiT(cfg, FLOAT32).apply(params, *inputs(cfg, 2))
    np.testing.assert_array_equal(out, 0)  # the final layer is zero
    leaves = {"/".join(k.key for k in p): v for p, v in jax.tree_util.tree_leaves_with_path(params)}
    leaves = {k.removeprefix("params/"): v for k, v in leaves.items()}
    assert all(np.all(v == 0) for k, v in leaves.items() if k.endswith("bias"))
    bound = {"attn/qkv": (6 / (4 * 256)) ** 0.5, "mlp/fc1": (6 / (5 * 256)) ** 0.5}
    for name, limit in bound.items():
        largest = np.abs(leaves[f"blocks/{name}/kernel"]).max()
        assert 0.99 * limit < largest <= limit
    normal = ("z_embedder/uncondition", "z_embedder/linear/kernel", "x_embedder/kernel")
    for name in (*normal, "t_embedder/mlp_0/kernel", "t_embedder/mlp_2/kernel"):
        np.testing.assert_allclose(np.std(leaves[name]), 0.02, rtol=0.1)
    np.testing.assert_allclose(np.std(leaves["positional_embedding"]), 256**-0.5, rtol=0.1)


def test_drop_replaces_the_whole_condition():
    dit, params = DiT(TINY, FLOAT32), random_params(TINY)
    apply = jax.jit(dit.apply)
    x, t, z = inputs(TINY, 2, 3)
    drop = np.array([[True, False, True], [False, False, True]])
    got = np.asarray(apply(params, x, t, z, drop))
    nothing = dit.apply(params, method=DiT.unconditional)
    without = np.asarray(apply(params, x, t, jnp.broadcast_to(nothing, z.shape)))
    kept = np.asarray(apply(params, x, t, z))
    assert np.abs(kept - without).min(axis=(-1, -2)).max() > 0
    np.testing.assert_array_equal(got, np.where(drop[..., None, None], without, kept))


def test_repeats_broadcast_over_one_condition():
    dit, params = DiT(TINY, FLOAT32), random_params(TINY)
    x, t, _ = inputs(TINY, 2, 3, 4)
    z = inputs(TINY, 2, 3, 1)[2]
    drop = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    got = jax.jit(dit.apply)(params, x, t, z, drop)
    flat = [a.reshape(24, *a.shape[3:]) for a in (x, t, np.repeat(z, 4, axis=2), drop)]
    np.testing.assert_allclose(np.reshape(got, (24, 5, 7)), dit.apply(params, *flat), atol=1e-5)


def test_embedded_condition_and_remat_change_nothing():
    x, t, z = inputs(TINY, 3)
    params, dit = random_params(TINY), DiT(TINY, FLOAT32)
    embedded = dit.apply(params, z, method=DiT.embed_condition)
    want = jax.jit(dit.apply)(params, x, t, z)
    denoise = jax.jit(lambda p, *a: dit.apply(p, *a, method=DiT.denoise))
    np.testing.assert_allclose(denoise(params, x, t, embedded), want, atol=1e-5)
    grads = [
        jax.jit(jax.grad(lambda p, d=d: jnp.sum(d.apply(p, x, t, z) ** 2)))(params)
        for d in (DiT(TINY, dataclasses.replace(FLOAT32, remat=r)) for r in ("none", "full"))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *grads)
