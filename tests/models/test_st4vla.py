"""The whole policy: losses against a recomposition, the gradient decay, meshes, sampling."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.data.packing import Capacity, pack
from st4vla_jax.models import diffusion, st4vla
from st4vla_jax.models.layers import gather_rows
from st4vla_jax.models.st4vla import Denominators, LossWeights
from st4vla_jax.sharding import make_mesh, param_shardings
from tests.reference.policy import (
    TOKENIZER,
    grounding_sample,
    random_params,
    robot_sample,
    tiny_batch,
    tiny_policy,
    tiny_rows,
)

REPEATS = 3
# conftest's fast emitters fuse and round by the program around; these do not, so that programs
# which differ in one factor can be compared bit by bit.
EXACT = {"xla_cpu_use_fusion_emitters": True}
BOTH, ACTION_ONLY, TEXT_ONLY = LossWeights(), LossWeights(1.0, 0.0), LossWeights(0.0, 1.0)


def assert_trees_close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


def leaf_names(tree):
    return ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def draw(model, batch, repeats=REPEATS, seed=7):
    return jax.jit(model.draw, static_argnums=2)(jax.random.key(seed), batch, repeats)


def make_setup(model):
    batch = tiny_batch(model.cfg)
    draws = draw(model, batch)
    return model, random_params(model), batch, draws, Denominators.of(batch, REPEATS)


@pytest.fixture(scope="module")
def setup():
    return make_setup(tiny_policy())


def run(model, setup, weights=BOTH, options=None):
    """(loss, parts), gradient of the parameters, gradient of the probe."""
    _, params, batch, draws, denominators = setup

    def loss(params, probe):
        return model.loss(params, batch, draws, denominators, weights, probe)

    fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=options)
    (total, parts), (grads, probe) = fn(params, 0.0)
    return total, parts, grads, probe


def scaled(model, scale):
    bridge = dataclasses.replace(model.cfg.bridge, gradient_scale=scale)
    return dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, bridge=bridge))


@pytest.fixture(scope="module")
def action_runs(setup):
    return {
        scale: run(scaled(setup[0], scale), setup, ACTION_ONLY, EXACT) for scale in (0.0, 0.5, 1.0)
    }


def test_decay_leaves_the_forward_bit_equal(action_runs):
    losses = {float(r[0]) for r in action_runs.values()}
    assert len(losses) == 1 and losses.pop() > 0
    parts = [r[1].action_error for r in action_runs.values()]
    assert (parts[0] == parts[1]).all() and (parts[0] == parts[2]).all()


def test_decay_halves_the_vlm_gradients_of_the_action_loss_exactly(action_runs):
    half, full = action_runs[0.5][2]["vlm"], action_runs[1.0][2]["vlm"]
    names = leaf_names(full)
    for name, h, f in zip(names, jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert np.abs(f).max() > 0, name
        # A power of two scales every product and sum exactly.
        assert (np.asarray(h) == 0.5 * np.asarray(f)).all(), name


def test_decay_leaves_dino_bridge_and_dit_gradients_alone(action_runs):
    for part in ("dino", "bridge", "dit"):
        half, full = action_runs[0.5][2][part], action_runs[1.0][2][part]
        for name, h, f in zip(leaf_names(full), *map(jax.tree.leaves, (half, full)), strict=True):
            assert np.abs(f).max() > 0, (part, name)
            assert (np.asarray(h) == np.asarray(f)).all(), (part, name)


def test_scale_zero_stops_the_gradient(action_runs):
    assert not any(np.any(g) for g in jax.tree.leaves(action_runs[0.0][2]["vlm"]))
    assert np.any(action_runs[0.0][2]["bridge"]["proj"]["kernel"])


def test_scale_one_is_bit_equal_to_no_bridge_operation(setup, action_runs, monkeypatch):
    monkeypatch.setattr(st4vla, "scale_gradient", lambda x, scale, probe: x)
    plain = run(setup[0], setup, ACTION_ONLY, EXACT)[2]
    jax.tree.map(np.testing.assert_array_equal, plain, action_runs[1.0][2])


def test_text_gradients_do_not_depend_on_the_decay(setup):
    one, half = (run(scaled(setup[0], s), setup, TEXT_ONLY, EXACT)[2] for s in (1.0, 0.5))
    assert np.any(one["vlm"]["visual"]["merger"]["mlp_0"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, one, half)
    for part in ("dino", "bridge", "dit"):
        assert not any(np.any(g) for g in jax.tree.leaves(one[part]))


def recomposed_action_loss(model, params, tokens, batch, draws, denominators):
    """The action loss from gathered hidden states [k,B,K,L,E], over a flat list of samples."""
    flat = [np.asarray(i) for i in np.nonzero(np.asarray(batch.action.valid))]
    action, d, keys = jax.tree.map(
        lambda x: x[*flat], (batch.action, draws.diffusion, draws.dropout_keys)
    )
    images = action.dino_images.reshape(-1, *action.dino_images.shape[2:])
    views = model.dino.apply({"params": params["dino"]}, images)
    mask = jnp.repeat(action.view_mask, views.shape[1], axis=1)
    views = views.reshape(len(keys), -1, views.shape[-1])
    condition = model.bridge.apply(
        {"params": params["bridge"]}, tokens[:, *flat], views, None, action.token_mask, mask, keys
    )
    total = 0.0
    for r in range(REPEATS):
        noisy = diffusion.q_sample(action.actions, d.noise[:, r], d.timesteps[:, r])
        inputs = noisy, d.timesteps[:, r], condition, d.drop[:, r]
        eps = model.dit.apply({"params": params["dit"]}, *inputs)
        total += jnp.sum(action.action_mask * jnp.square(eps - d.noise[:, r]))
    return total / denominators.action


@pytest.mark.parametrize("layers", [(4, 5), (0, 5)])
def test_action_loss_and_probe_equal_a_recomposition(layers):
    model = tiny_policy(start_layer=layers[0], end_layer=layers[1])
    setup = make_setup(model)
    _, params, batch, draws, denominators = setup
    _, parts, _, probe = run(model, setup, ACTION_ONLY)

    count = layers[1] - layers[0]
    empty = jnp.zeros((count, *batch.vlm.tokens.shape, model.cfg.text.hidden_size))
    tap = st4vla.Tap(*layers, jnp.arange(count), empty, lambda c, i, h: c.at[i].set(h))
    states = jax.jit(lambda p: model.vlm.apply({"params": p}, batch.vlm, tap=tap).carry)
    tokens = jax.vmap(gather_rows, (0, None))(states(params["vlm"]), batch.action.token_index)

    def loss(tokens):
        return recomposed_action_loss(model, params, tokens, batch, draws, denominators)

    value, grad = jax.jit(jax.value_and_grad(loss))(tokens)
    np.testing.assert_allclose(parts.action, value, rtol=1e-5)
    assert probe > 0
    np.testing.assert_allclose(probe, jnp.sum(jnp.square(grad)), rtol=1e-4)


def test_text_loss_equals_dense_cross_entropy(setup):
    model, params, batch, draws, denominators = setup
    parts = run(model, setup)[1]
    vlm = {"params": params["vlm"]}
    hidden = model.vlm.apply(vlm, batch.vlm).hidden
    logits = model.vlm.apply(vlm, hidden, method="logits")
    rows = gather_rows(jax.nn.log_softmax(logits), batch.vlm.target_index)
    nll = -jnp.take_along_axis(rows, batch.vlm.targets[..., None], -1)[..., 0]
    weights = batch.vlm.target_weight
    np.testing.assert_allclose(parts.text_nll * weights, nll * weights, atol=1e-4)
    np.testing.assert_allclose(parts.text, jnp.sum(nll * weights) / weights.sum(), rtol=1e-5)


def test_losses_do_not_depend_on_the_packing(setup):
    """Each sample alone in a row, in other slots: the same text loss and sampled actions."""
    model, params, batch, *_ = setup
    rows = [[sample] for row in tiny_rows(model.cfg) for sample in row]
    capacity = dataclasses.replace(Capacity.fit(rows, token_multiple=64), robot=2)
    alone = pack(rows, capacity, pad_id=TOKENIZER.pad)
    np.testing.assert_allclose(*(text_loss(model, params, b) for b in (alone, batch)), rtol=1e-5)

    noise = jax.random.normal(jax.random.key(3), (4, model.cfg.dit.chunk, model.cfg.dit.action_dim))
    sample = jax.jit(model.sample_actions)
    packed = sample(params, batch, noise.reshape(2, 2, *noise.shape[1:]))
    slots = jnp.zeros((6, 2, *noise.shape[1:])).at[jnp.array([0, 2, 3, 5]), 0].set(noise)
    single = sample(params, alone, slots)[jnp.array([0, 2, 3, 5]), 0]
    np.testing.assert_allclose(single, packed.reshape(single.shape), atol=1e-4)
    assert np.abs(single).max() > 0.1


def text_loss(model, params, batch):
    batch = dataclasses.replace(batch, action=None)
    return jax.jit(model.loss)(params, batch, None, Denominators.of(batch, 1))[1].text


def test_unused_robot_slots_change_nothing_and_give_no_nan(setup):
    model, params, batch, draws, denominators = setup
    rows = tiny_rows(model.cfg)
    capacity = dataclasses.replace(Capacity.fit(rows, token_multiple=16), robot=3)
    wide = pack(rows, capacity, pad_id=TOKENIZER.pad)
    wide.action.actions[:, 2] = np.nan
    pad = draw(model, wide, seed=1)
    wide_draws = jax.tree.map(lambda small, big: big.at[:, :2].set(small), draws, pad)
    wide_setup = (model, params, wide, wide_draws, Denominators.of(wide, REPEATS))
    want, got = run(model, setup), run(model, wide_setup)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert_trees_close(got[2], want[2], atol=1e-5)


def test_accumulation_and_batch_split_change_nothing(setup):
    model, params, batch, draws, denominators = setup
    half = [jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, draws)) for i in range(2)]
    loss = jax.jit(model.loss)
    sums = [loss(params, b, d, denominators)[0] for b, d in half]
    np.testing.assert_allclose(sum(sums), run(model, setup)[0], rtol=1e-5)


def test_stage_one_needs_the_vlm_only(setup):
    model, params, batch, *_ = setup
    batch = dataclasses.replace(batch, action=None)
    assert model.draw(jax.random.key(0), batch, 1) is None
    stage_one = {"vlm": params["vlm"]}
    total, parts = jax.jit(model.loss)(stage_one, batch, None, Denominators.of(batch, 1))
    assert parts.action == 0 and parts.action_error is None
    np.testing.assert_allclose(total, 0.1 * parts.text)


def test_without_targets_no_logits_are_formed(setup):
    model, params, *_ = setup
    rows = [[robot_sample(model.cfg, 0)]]
    batch = pack(rows, Capacity.fit(rows), pad_id=TOKENIZER.pad)
    draws, denominators = draw(model, batch, 1), Denominators.of(batch, 1)
    jaxpr = str(jax.make_jaxpr(model.loss)(params, batch, draws, denominators))
    vocab = model.cfg.text.vocab_size
    assert not re.search(rf"f32\[[\d,]*\b{vocab}\]", jaxpr)
    shapes = jax.eval_shape(model.loss, params, batch, draws, denominators)
    assert shapes[1].text_nll is None


def test_state_encoder_reaches_the_actions():
    model = tiny_policy(state_dim=5)
    params = random_params(model)
    rows = [[robot_sample(model.cfg, 0)]]
    batch = pack(rows, Capacity.fit(rows), pad_id=TOKENIZER.pad)
    other = dataclasses.replace(
        batch, action=dataclasses.replace(batch.action, state=batch.action.state + 1)
    )
    noise = jnp.ones((1, 1, model.cfg.dit.chunk, model.cfg.dit.action_dim))
    sample = jax.jit(model.sample_actions)
    assert np.abs(sample(params, batch, noise) - sample(params, other, noise)).max() > 1e-3


def test_many_chunks_equal_one_at_a_time(setup):
    model, params, batch, *_ = setup
    noise = jax.random.normal(jax.random.key(5), (3, *batch.action.actions.shape))

    def sample_chunks(params, batch, noise):
        return model.denoise(params, model.encode(params, batch)[1], noise)

    chunks = jax.jit(sample_chunks)(params, batch, noise)
    sample = jax.jit(model.sample_actions)
    for got, start in zip(chunks, noise, strict=True):
        np.testing.assert_allclose(got, sample(params, batch, start), rtol=1e-6, atol=1e-5)
    # Encoded once and denoised one at a time: no array of S chunks' tokens is formed.
    jaxpr = str(jax.make_jaxpr(sample_chunks)(params, batch, noise))
    tokens = model.cfg.dit.num_condition_tokens + model.cfg.dit.chunk
    assert f",{tokens},{model.cfg.dit.hidden_size}]" in jaxpr
    assert not re.search(rf"f32\[3,[\d,]*{tokens},{model.cfg.dit.hidden_size}\]", jaxpr)


def test_grounding_only_batch_with_robot_slots(setup):
    """A batch whose robot records all turned out bad still runs through the compiled step."""
    model, params, *_ = setup
    robot = robot_sample(model.cfg, 0)[1]
    rows = [[grounding_sample(1)]]
    capacity = dataclasses.replace(Capacity.fit(rows), robot=1, sample_tokens=8, views=1)
    batch = pack(rows, capacity, pad_id=TOKENIZER.pad, like=robot)
    loss = jax.jit(model.loss)
    total, parts = loss(params, batch, draw(model, batch), Denominators.of(batch, REPEATS))
    assert parts.action == 0 and np.isfinite(total)


# --- Meshes -------------------------------------------------------------------------------------

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collective_shapes(text):
    """[(kind, shape)] of every collective of a compiled program."""
    lines = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text)
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for shapes, kind in lines
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


ODD = 11  # no parameter has it as a factor


@pytest.fixture(scope="module")
def one_device():
    model = tiny_policy()
    rows = tiny_rows(model.cfg, 8)
    capacity = dataclasses.replace(Capacity.fit(rows), tokens=16 * ODD, slots=64 * ODD)
    batch = jax.tree.map(jnp.asarray, pack(rows, capacity, pad_id=TOKENIZER.pad))
    denominators = Denominators.of(batch, REPEATS)
    setup = (model, random_params(model), batch, draw(model, batch), denominators)
    return setup, run(model, setup)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_meshes_equal_one_device(sizes, one_device):
    (model, params, batch, draws, denominators), want = one_device
    mesh, rules = make_mesh(*sizes), model.rt.rules
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.device_put(params, param_shardings(boxed, mesh, rules))
    rows = jax.NamedSharding(mesh, rules.spec(("batch",)))
    batch, draws = jax.device_put((batch, draws), rows)

    def loss(params, probe, batch, draws):
        return model.loss(params, batch, draws, denominators, probe=probe)

    with jax.set_mesh(mesh):
        fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        compiled = fn.lower(params, 0.0, batch, draws).compile()
        (total, _), (grads, probe) = compiled(params, 0.0, batch, draws)
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_allclose(probe, want[3], rtol=1e-4)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want[2]), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * max(1.0, np.abs(w).max()))

    # Only sizes of activations have ODD as a factor.  Rows never leave their data shard; heads and
    # mlp are summed over the tensor axis, within a shard's own rows.
    found = [math.prod(shape) for _, shape in collective_shapes(compiled.as_text())]
    assert found
    rows, widest = (8 // 4 if sizes[2] > 1 else 0), model.cfg.text.intermediate_size
    limit = rows * max(batch.vlm.tokens.shape[1], batch.vlm.patches.shape[1]) * widest
    assert not [size for size in found if size % ODD == 0 and size > limit]


def test_decay_over_several_layers_on_eight_devices():
    mesh, runs = make_mesh(2, 2, 2), {}
    base = tiny_policy(start_layer=1, end_layer=4)
    boxed = jax.eval_shape(base.init, jax.random.key(0))
    params = jax.device_put(random_params(base), param_shardings(boxed, mesh, base.rt.rules))
    batch = tiny_batch(base.cfg, rows=8)
    draws, denominators = draw(base, batch), Denominators.of(batch, REPEATS)
    rows = jax.NamedSharding(mesh, base.rt.rules.spec(("batch",)))
    batch, draws = jax.device_put((batch, draws), rows)
    for scale in (0.5, 1.0):
        model = scaled(base, scale)

        def loss(params, probe, model=model):
            return model.loss(params, batch, draws, denominators, ACTION_ONLY, probe)[0]

        with jax.set_mesh(mesh):
            runs[scale] = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=EXACT)(
                params, 0.0
            )
    (half, half_probe), (full, full_probe) = runs[0.5], runs[1.0]
    names = leaf_names(full["vlm"])
    for name, h, f in zip(names, *map(jax.tree.leaves, (half["vlm"], full["vlm"])), strict=True):
        # The final norm comes after the last hidden state that is read here.
        assert np.abs(f).max() > 0 or name == "language_model/norm/scale", name
        assert (np.asarray(h) == 0.5 * np.asarray(f)).all(), name
    for part in ("dino", "bridge", "dit"):
        jax.tree.map(np.testing.assert_array_equal, half[part], full[part])
    # Each layer is read once, so what arrives there does not depend on the decay.
    assert 0 < half_probe == full_probe
