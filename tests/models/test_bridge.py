import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.rules import bridge_rules, dino_rules, dit_rules, leaves_from_torch
from st4vla_jax.checkpoint import nested
from st4vla_jax.config import DINO_PRESETS, FLOAT32, BridgeConfig, DitConfig
from st4vla_jax.models.bridge import Bridge, dropout, scale_gradient
from st4vla_jax.models.dinov2 import DinoV2
from st4vla_jax.models.dit import DiT
from st4vla_jax.sharding import Rules, is_axes, make_mesh, param_shardings
from tests.reference import golden

E, C = 24, 16  # widths of the language model and of DINOv2
RT = dataclasses.replace(FLOAT32, remat="none")
# Optimising the random bits of dropout takes LLVM seconds, and these arrays are tiny.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(k=1, **fields):
    return BridgeConfig(
        start_layer=3, end_layer=3 + k, num_queries=5, hidden_size=32, num_heads=4, **fields
    )


def torch_tensors(cfg, seed=0):
    """Random weights under torch names, no norm or bias trivial."""
    rng = np.random.default_rng(seed)
    return {
        k: (0.15 * rng.normal(size=r.torch_shape) + ("norm" in k)).astype(np.float32)
        for r in bridge_rules(cfg, E, C)
        for k in r.torch_keys
    }


def from_torch(cfg, tensors):
    return {"params": nested(leaves_from_torch(bridge_rules(cfg, E, C), tensors.__getitem__))}


def inputs(k=1, lead=(2, 3), tokens=7, views=4, state=0, seed=1):
    """(hidden, dino_tokens, state, token_mask, dino_mask)."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=s) for s in ((k, *lead, tokens, E), (*lead, views, C))]
    arrays.append(rng.normal(size=(*lead, state)) if state else None)
    masks = [rng.random((*lead, n)) < 0.7 for n in (tokens, views)]
    return *[None if a is None else a.astype(np.float32) for a in arrays], *masks


@functools.lru_cache
def forward(cfg, rt=RT):
    return jit(Bridge(cfg, E, C, rt).apply)


# --- parameters and parity ----------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [config(), config(3, state_dim=6)])
def test_parameter_tree_is_the_one_of_the_rules(cfg):
    args = inputs(cfg.num_layers, state=cfg.state_dim)
    init = Bridge(cfg, E, C, RT).init
    tree = jax.eval_shape(init, jax.random.key(0), *args)["params"]
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_axes)[0]
    shapes = {"/".join(k.key for k in path): box.value.shape for path, box in flat}
    assert shapes == {rule.jax: rule.jax_shape for rule in bridge_rules(cfg, E, C)}


def test_fresh_parameters_are_upstreams():
    cfg = dataclasses.replace(config(), hidden_size=128)
    init = jit(Bridge(cfg, E, C, RT).init)
    tree = init(jax.random.key(0), *inputs())["params"]
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_axes)[0]
    leaves = {"/".join(k.key for k in path): np.asarray(box.value) for path, box in flat}
    assert np.all(leaves["blocks/cross_attn/in_proj/bias"] == 0)
    assert np.all(leaves["blocks/cross_attn/out_proj/bias"] == 0)
    bounds = {
        "blocks/cross_attn/in_proj/kernel": (6 / (4 * 128)) ** 0.5,
        "blocks/cross_attn/out_proj/kernel": 128**-0.5,
        "blocks/mlp_2/kernel": 512**-0.5,
        "blocks/mlp_2/bias": 512**-0.5,
        "proj/kernel": E**-0.5,
        "proj/bias": E**-0.5,
    }
    for name, bound in bounds.items():
        assert 0.9 * bound < np.abs(leaves[name]).max() <= bound, name
    np.testing.assert_allclose(leaves["query_tokens"].std(), 1, rtol=0.1)


@pytest.mark.parity
def test_equals_golden(shared):
    cfg = BridgeConfig()
    outer = "layer_qformer."
    rules = [r for r in bridge_rules(cfg, 2048, C) if r.torch.startswith(outer)]
    shapes = {k.removeprefix(outer): r.torch_shape for r in rules for k in r.torch_keys}
    assert len(shapes) == 15
    tensors = golden.fill(shapes)
    params = nested(leaves_from_torch(rules, lambda k: tensors[k.removeprefix(outer)]))
    params["dino_proj"] = {"kernel": np.zeros((C, 2048)), "bias": np.zeros(2048)}
    hidden, dino = golden.wave((1, 2, 50, 2048), 1, 0.4), np.zeros((2, 0, C))
    masks = np.ones((2, 50), bool), np.ones((2, 0), bool)
    apply = jax.jit(Bridge(cfg, 2048, C, FLOAT32).apply)
    got = apply({"params": params}, hidden, dino, None, *masks)
    golden.assert_matches(got, golden.load(shared)["qformer_768"]["out"], 1e-4)


def torch_qformer(cfg, tensors, hidden, dino, state, mask):
    """Upstream's formula with torch modules, one sample axis; mask True = valid."""
    torch = pytest.importorskip("torch")
    t = {k: torch.from_numpy(v) for k, v in tensors.items()}

    def linear(x, name):
        return torch.nn.functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name):
        weights = t[f"{name}.weight"], t[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *weights, eps=1e-5)

    gelu = torch.nn.functional.gelu
    query = t["layer_qformer.query_tokens"].expand(len(dino), -1, -1)
    vision = linear(torch.from_numpy(dino), "dino_pro")
    for i in range(cfg.num_layers):
        layer = f"layer_qformer.layers.{i}"
        keys = torch.cat([torch.from_numpy(hidden[i]), vision], dim=1)
        keys = linear(keys, "layer_qformer.proj")
        if state is not None:
            token = linear(torch.from_numpy(state), "state_encoder.fc1")
            keys = torch.cat([keys, linear(gelu(token), "state_encoder.fc2")[:, None]], dim=1)
        attn = torch.nn.MultiheadAttention(cfg.hidden_size, cfg.num_heads, batch_first=True).eval()
        prefix = f"{layer}.cross_attn."
        attn.load_state_dict(
            {k.removeprefix(prefix): v for k, v in t.items() if k.startswith(prefix)}
        )
        ignored = None if mask is None else torch.from_numpy(~mask)
        query = query + attn(norm(query, f"{layer}.norm1"), keys, keys, ignored)[0]
        query = query + linear(
            gelu(linear(norm(query, f"{layer}.norm2"), f"{layer}.mlp.0")), f"{layer}.mlp.2"
        )
    return query.detach().numpy()


@pytest.mark.parity
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(
    ("k", "state_dim", "tolerance"), [(1, 0, 1e-5), (3, 0, 1e-4), (3, 6, 1e-4)]
)
def test_equals_torch(k, state_dim, tolerance, mask_padding):
    cfg = config(k, state_dim=state_dim, state_hidden_size=20, mask_padding=mask_padding)
    tensors, args = torch_tensors(cfg), inputs(k, state=state_dim)
    hidden, dino, state, *masks = args
    merged = [None if a is None else a.reshape(6, *a.shape[2:]) for a in (dino, state, *masks)]
    mask = np.concatenate([*merged[2:], np.ones((6, int(bool(state_dim))), bool)], axis=1)
    want = torch_qformer(
        cfg, tensors, hidden.reshape(k, 6, *hidden.shape[3:]), *merged[:2],
        mask if mask_padding else None,
    )  # fmt: skip
    got = forward(cfg)(from_torch(cfg, tensors), *args)
    np.testing.assert_allclose(np.reshape(got, want.shape), want, atol=tolerance)


def test_blocks_ride_a_scan_of_other_layers():
    cfg = config(3)
    params, args = from_torch(cfg, torch_tensors(cfg)), inputs(3)
    hidden, dino, state, *masks = args

    @jit
    def ride(params):
        bridge = Bridge(cfg, E, C, RT).bind(params)
        context, mask = bridge.encode(dino, state), bridge.key_mask(*masks)

        def body(carry, scanned):
            states, query = carry
            block, change, layer = scanned
            states = states + change
            query = bridge.block(block, query, states, context, mask, None, layer)
            return (states, query), None

        changes = jnp.concatenate([hidden[:1], jnp.diff(hidden, axis=0)])
        scanned = (params["params"]["blocks"], changes, jnp.arange(3))
        start = (jnp.zeros_like(hidden[0]), bridge.queries((2, 3)))
        return jax.lax.scan(body, start, scanned)[0][1]

    np.testing.assert_allclose(ride(params), forward(cfg)(params, *args), atol=1e-5)


# --- masks and bad input ------------------------------------------------------------------------


def test_masked_slots_cannot_matter_and_no_valid_slot_is_finite():
    cfg = config(2)
    params, (hidden, dino, _, token_mask, dino_mask) = (
        from_torch(cfg, torch_tensors(cfg)),
        inputs(2),
    )
    token_mask[0, 0], dino_mask[0, 0] = False, False
    apply = forward(cfg)
    want = apply(params, hidden, dino, None, token_mask, dino_mask)
    assert np.isfinite(want).all()
    hidden = np.where(token_mask[..., None], hidden, 50.0).astype(np.float32)
    dino = np.where(dino_mask[..., None], dino, -50.0).astype(np.float32)
    got = np.asarray(apply(params, hidden, dino, None, token_mask, dino_mask))
    some = (token_mask.any(-1) | dino_mask.any(-1))[..., None, None]
    np.testing.assert_array_equal(np.where(some, got, 0), np.where(some, want, 0))

    def loss(params, hidden):
        bridge = Bridge(cfg, E, C, RT)
        return jnp.sum(bridge.apply(params, hidden, dino, None, token_mask, dino_mask))

    grads = jit(jax.grad(loss, (0, 1)))(params, hidden)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_wrong_number_of_states_and_missing_state_are_refused():
    cfg = config(2, state_dim=6)
    bridge = Bridge(cfg, E, C, RT)
    with pytest.raises(ValueError, match="3 hidden states for the bridge's 2 blocks"):
        jax.eval_shape(bridge.init, jax.random.key(0), *inputs(3, state=6))
    with pytest.raises(ValueError, match="state_dim is 6, but the batch has no state"):
        jax.eval_shape(bridge.init, jax.random.key(0), *inputs(2))


# --- gradient decay -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_scale_gradient_closed_form(scale, dtype):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(4, 5)), dtype) for _ in range(2))
    y, vjp = jax.vjp(lambda x, probe: scale_gradient(x, scale, probe), x, jnp.zeros(()))
    np.testing.assert_array_equal(y, x)
    got, squares = vjp(g)
    assert got.dtype == dtype
    assert squares.dtype == jnp.float32
    np.testing.assert_array_equal(got, g * jnp.asarray(scale, dtype))
    want = np.sum(np.square(np.asarray(g, np.float64)))
    assert want > 0
    np.testing.assert_allclose(squares, want, rtol=1e-6)


def test_scale_zero_stops_a_gradient_that_is_not_finite():
    _, vjp = jax.vjp(lambda x: scale_gradient(x, 0.0, jnp.zeros(())), jnp.ones(3))
    np.testing.assert_array_equal(vjp(jnp.asarray([jnp.inf, jnp.nan, 1.0]))[0], 0)


def test_decay_reaches_the_hidden_states_only():
    cfg = config(3)
    params, (hidden, *rest) = from_torch(cfg, torch_tensors(cfg)), inputs(3)

    @functools.partial(jit, static_argnums=0)
    def grads(scale, params, hidden, dino):
        def loss(params, hidden, dino, probe):
            if scale is not None:
                hidden = scale_gradient(hidden, scale, probe)
            condition = Bridge(cfg, E, C, RT).apply(params, hidden, dino, *rest[1:])
            return jnp.sum(jnp.sin(condition))

        return jax.value_and_grad(loss, (0, 1, 2, 3))(params, hidden, dino, jnp.zeros(()))

    plain, full, half, none = (grads(s, params, hidden, rest[0]) for s in (None, 1.0, 0.5, 0.0))
    jax.tree.map(np.testing.assert_array_equal, plain[0], half[0])
    assert all(np.any(g) for g in jax.tree.leaves(plain[1][:3]))
    for other, scale in ((full, 1.0), (half, 0.5), (none, 0.0)):
        for i in (0, 2):  # parameters of the bridge, DINO tokens
            jax.tree.map(np.testing.assert_array_equal, other[1][i], plain[1][i])
        np.testing.assert_array_equal(other[1][1], scale * plain[1][1])
        squares = np.sum(np.square(np.asarray(plain[1][1], np.float64)))
        np.testing.assert_allclose(other[1][3], squares, rtol=1e-5)


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_statistics_and_scale():
    keys = jax.random.split(jax.random.key(0), (20, 5))
    drop = jit(lambda x: dropout(x, keys, 0.1))
    y = np.asarray(drop(jnp.full((20, 5, 40, 10), 3.0)))
    np.testing.assert_allclose(np.unique(y), [0, 3 / 0.9], rtol=1e-6)
    assert abs((y == 0).mean() - 0.1) < 0.005
    assert jax.eval_shape(drop, jnp.ones((20, 5, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_does_not_depend_on_how_the_batch_is_split():
    cfg = config(2, dropout=0.5)
    params, args = from_torch(cfg, torch_tensors(cfg)), inputs(2, lead=(4, 3))
    keys = jax.random.split(jax.random.key(5), (4, 3))
    apply = forward(cfg)
    whole = np.asarray(apply(params, *args, keys))
    for rows in (slice(0, 2), slice(2, 4)):
        part = apply(params, args[0][:, rows], args[1][rows], None, *(m[rows] for m in args[3:]),
                     keys[rows])  # fmt: skip
        np.testing.assert_allclose(part, whole[rows], atol=1e-5)
    assert np.abs(whole - apply(params, *args)).max() > 0.1
    assert np.abs(whole - apply(params, *args, keys[::-1])).max() > 0.1


@pytest.mark.parametrize("part", ["cross_attn/out_proj", "mlp_2"])
def test_each_dropout_acts_and_differs_between_blocks(part):
    """The other half of the block is silenced; one block is run under two layer numbers."""
    cfg = config(2, dropout=0.5)
    tensors = torch_tensors(cfg)
    silent = {"cross_attn/out_proj": "mlp.2", "mlp_2": "cross_attn.out_proj"}[part]
    for k in tensors:
        if silent in k:
            tensors[k] = np.zeros_like(tensors[k])
    params, (hidden, dino, _, *masks) = from_torch(cfg, tensors), inputs(2)
    block = jax.tree.map(lambda p: p[0], params["params"]["blocks"])
    keys = jax.random.split(jax.random.key(5), (2, 3))

    @jit
    def run(keys, layer):
        bridge = Bridge(cfg, E, C, RT).bind(params)
        context, mask, query = bridge.encode(dino), bridge.key_mask(*masks), bridge.queries((2, 3))
        return bridge.block(block, query, hidden[0], context, mask, keys, layer)

    evaluated, first, second = (np.asarray(run(*a)) for a in ((None, 0), (keys, 0), (keys, 1)))
    assert np.abs(evaluated - first).max() > 0.1
    assert np.abs(first - second).max() > 0.1


# --- layout -------------------------------------------------------------------------------------


def test_expert_on_eight_devices_equals_one():
    """DINOv2 -> bridge -> DiT, weights split over fsdp and tensor: forward, gradients, probe."""
    dino_cfg, cfg = DINO_PRESETS["tiny"], config(2)
    dit_cfg = DitConfig(depth=2, hidden_size=32, num_heads=4, num_condition_tokens=5, chunk=4)
    split = {f"{part}_{axis}": mesh_axis for part in ("dino", "bridge", "dit")
             for axis, mesh_axis in (("embed", "fsdp"), ("heads", "tensor"), ("mlp", "tensor"))
             }  # fmt: skip
    rt = dataclasses.replace(RT, rules=Rules().replace(**split))
    dino, dit = DinoV2(dino_cfg, rt), DiT(dit_cfg, rt)
    bridge = Bridge(cfg, E, dino_cfg.hidden_size, rt)
    rng = np.random.default_rng(0)
    hidden, _, _, token_mask, _ = inputs(2, lead=(4, 2))
    images = rng.integers(0, 256, (4, 2, 2, 28, 28, 3), np.uint8)
    x, t = rng.normal(size=(4, 2, 3, 4, 7)).astype(np.float32), rng.integers(0, 100, (4, 2, 3))
    rules = {
        "dino": dino_rules(dino_cfg),
        "bridge": bridge_rules(cfg, E, dino_cfg.hidden_size),
        "dit": dit_rules(dit_cfg),
    }
    params = {
        part: nested((r.jax, 0.2 * rng.normal(size=r.jax_shape).astype(np.float32)) for r in rows)
        for part, rows in rules.items()
    }

    def loss(params, probe, hidden, images, token_mask, x, t, keys):
        tokens = dino.apply({"params": params["dino"]}, images).reshape(4, 2, 8, -1)
        hidden = scale_gradient(hidden, 0.5, probe)
        valid = jnp.ones(tokens.shape[:-1], bool)
        condition = bridge.apply(
            {"params": params["bridge"]}, hidden, tokens, None, token_mask, valid, keys
        )
        noise = dit.apply({"params": params["dit"]}, x, t, condition[:, :, None])
        return jnp.mean(jnp.square(noise)), noise

    step = jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    keys = jax.random.split(jax.random.key(2), (4, 2))
    data = (hidden, images, token_mask, x, t, keys)
    (_, want), want_grads = step(params, jnp.zeros(()), *data)

    mesh = make_mesh(2, 2, 2)
    boxed = {
        "dino": jax.eval_shape(dino.init, jax.random.key(0), images),
        "bridge": jax.eval_shape(
            bridge.init, jax.random.key(0), hidden, np.zeros((4, 2, 8, dino_cfg.hidden_size)),
            None, token_mask, np.ones((4, 2, 8), bool),
        ),
        "dit": jax.eval_shape(
            dit.init, jax.random.key(0), x, t, np.zeros((4, 2, 1, 5, dit_cfg.hidden_size))
        ),
    }  # fmt: skip
    shardings = param_shardings({k: v["params"] for k, v in boxed.items()}, mesh, rt.rules)
    qkv = shardings["dit"]["blocks"]["attn"]["qkv"]["kernel"].spec
    assert {"fsdp", "tensor"} <= set(qkv)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        placed = [jax.device_put(hidden, jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp"))))]
        placed += [jax.device_put(a, rows) for a in data[1:]]
        (_, got), grads = step(jax.device_put(params, shardings), jnp.zeros(()), *placed)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)
    assert want_grads[1] > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7),
        grads,
        want_grads,
    )
