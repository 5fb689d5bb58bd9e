import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert_weights.rules import text_rules, vision_rules
from st4vla_jax.config import FLOAT32
from st4vla_jax.losses import next_token_nll
from st4vla_jax.models.layers import gather_rows
from st4vla_jax.models.qwen_lm import Tap
from st4vla_jax.models.qwen_vl import QwenVL
from st4vla_jax.sharding import make_mesh, param_shardings, unbox
from tests.reference import qwen

SIZES = {
    "text only": (),
    "one image": ((140, 196),),
    "two images": ((308, 448), (28, 28)),
    "three images": ((84, 1400), (224, 224), (140, 196)),
}


@functools.cache
def tiny(tie):
    hf, cfg = qwen.tiny_hf(tie)
    return hf, cfg, qwen.params_of(hf, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def all_states(params, vlm, cfg):
    """Every hidden state [ids,B,T,D] and the logits [B,T,V]."""
    model, num = QwenVL(cfg, FLOAT32), cfg.text.num_hidden_layers + 1
    empty = jnp.zeros((num, *vlm.tokens.shape, cfg.text.hidden_size))
    tap = Tap(0, num, jnp.arange(num), empty, lambda c, i, h: c.at[i].set(h))
    out = model.apply({"params": params}, vlm, tap=tap)
    return out.carry, model.apply({"params": params}, out.hidden, method="logits")


@pytest.mark.parity
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("images", SIZES)
def test_hidden_states_and_logits_equal_transformers(tie, images):
    hf, cfg, params = tiny(tie)
    sample = qwen.random_sample(np.random.default_rng(3), 23, SIZES[images])
    want_states, want_logits = qwen.hf_forward(hf, sample)
    states, logits = all_states(params, qwen.pack(hf, [[sample]]), cfg)
    assert len(states) == len(want_states) == cfg.text.num_hidden_layers + 1
    for i, want in enumerate(want_states):
        np.testing.assert_allclose(states[i, 0], want, atol=1e-4, err_msg=f"hidden state {i}")
    np.testing.assert_allclose(logits[0], want_logits, atol=1e-4)
    assert logits.dtype == jnp.float32


@pytest.mark.parity
def test_packed_samples_with_images_equal_transformers_on_each():
    hf, cfg, params = tiny(True)
    rng = np.random.default_rng(4)
    rows = [
        [qwen.random_sample(rng, 9, ((56, 84),)), qwen.random_sample(rng, 7)],
        [
            qwen.random_sample(rng, 5, ((28, 140), (84, 84))),
            qwen.random_sample(rng, 6, ((56, 56),)),
        ],
        [qwen.random_sample(rng, 31)],
    ]
    vlm = qwen.pack(hf, rows, length=64)
    states, logits = all_states(params, vlm, cfg)
    assert bool(jnp.all(jnp.isfinite(states)))
    for b, row in enumerate(rows):
        for i, sample in enumerate(row):
            inside = vlm.segment_ids[b] == i + 1
            want_states, want_logits = qwen.hf_forward(hf, sample)
            np.testing.assert_allclose(states[-1, b][inside], want_states[-1], atol=1e-4)
            np.testing.assert_allclose(logits[b][inside], want_logits, atol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_init_makes_the_parameters_of_the_conversion_table(tie):
    hf, cfg, _ = tiny(tie)
    sample = qwen.random_sample(np.random.default_rng(0), 3, ((28, 28),))
    vlm = qwen.pack(hf, [[sample]])
    init = functools.partial(jax.eval_shape, QwenVL(cfg, FLOAT32).init, jax.random.key(0))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(unbox(init(vlm)["params"]))
    }
    rules = vision_rules(cfg.vision) + text_rules(cfg.text)
    assert found == {rule.jax: rule.jax_shape for rule in rules}
    with pytest.raises(ValueError, match="at least one bin"):
        init(qwen.pack(hf, [[qwen.Sample([1, 2], [])]]))


def test_a_vision_index_of_minus_one_keeps_the_token():
    hf, cfg, params = tiny(True)
    sample = qwen.random_sample(np.random.default_rng(0), 6, ((56, 56),))
    vlm = qwen.pack(hf, [[sample]])
    model = QwenVL(cfg, FLOAT32)
    embeds = model.apply({"params": params}, vlm, method="inputs_embeds")[0]
    table = params["language_model"]["embed_tokens"]["embedding"]
    is_image = np.array(sample.tokens) == qwen.IMAGE
    np.testing.assert_array_equal(embeds[~is_image], table[np.array(sample.tokens)[~is_image]])
    assert float(jnp.abs(embeds[is_image] - table[qwen.IMAGE]).min(axis=-1).max()) > 0.01


def _loss(params, vlm, cfg, rt=FLOAT32):
    """Next-token loss over the vocabulary's tiles; the weights are in the batch."""
    model = QwenVL(cfg, rt)
    rows = gather_rows(model.apply({"params": params}, vlm).hidden, vlm.target_index)
    table = model.apply({"params": params}, method="head_table")
    nll = next_token_nll(rows, table, vlm.targets, tile=64, rules=rt.rules)
    return jnp.sum(nll * vlm.target_weight)


@functools.cache
def supervised():
    """Four packed rows with images and six targets each."""
    hf, cfg, params = tiny(False)
    rng = np.random.default_rng(5)
    rows = [
        [qwen.random_sample(rng, 5 + i, ((56, 84),)), qwen.random_sample(rng, 6)] for i in range(4)
    ]
    vlm = qwen.pack(hf, rows, length=32)
    index = np.tile(np.array([1, 11, 12, 18, 17, 0], np.int32), (4, 1))
    return (
        cfg,
        params,
        dataclasses.replace(
            vlm,
            target_index=index,
            targets=rng.integers(0, qwen.VOCAB, index.shape, dtype=np.int32),
            target_weight=np.tile(np.array([1, 0.5, 1, 2, 1, 0], np.float32), (4, 1)),
        ),
    )


@pytest.mark.parity
def test_the_next_token_loss_and_gradients_equal_torch():
    hf, _, _ = tiny(False)
    rng = np.random.default_rng(6)
    sample = qwen.random_sample(rng, 12, ((56, 84),))
    cfg, params, _ = supervised()
    length = len(sample.tokens)
    vlm = dataclasses.replace(
        qwen.pack(hf, [[sample]]),
        target_index=np.arange(length - 1, dtype=np.int32)[None],
        targets=np.array([sample.tokens[1:]], np.int32),
        target_weight=np.ones((1, length - 1), np.float32),
    )
    value, grads = jax.jit(jax.value_and_grad(functools.partial(_loss, cfg=cfg)))(params, vlm)
    hf.zero_grad()
    logits = hf(**qwen.hf_inputs([sample])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor(sample.tokens[1:]), reduction="sum"
    )
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    named = {name: p.grad.numpy() for name, p in hf.named_parameters()}
    for rule in vision_rules(cfg.vision) + text_rules(cfg.text):
        leaf = functools.reduce(lambda tree, k: tree[k], rule.jax.split("/"), grads)
        for i, key in enumerate(rule.torch_keys):
            want = rule.to_jax(named[key if key.startswith("lm_head") else f"model.{key}"])
            scale = np.abs(want).max()
            assert scale > 1e-4, key
            got = leaf if rule.layers is None else leaf[i]
            np.testing.assert_allclose(got, want, atol=1e-4 * max(scale, 1), err_msg=key)


def test_a_mesh_gives_the_loss_and_gradients_of_one_device():
    cfg, params, vlm = supervised()
    mesh = make_mesh(2, 2, 2)
    boxed = jax.eval_shape(QwenVL(cfg, FLOAT32).init, jax.random.key(0), vlm)["params"]
    step = jax.jit(jax.value_and_grad(functools.partial(_loss, cfg=cfg)))
    want = step(params, vlm)
    rows = jax.sharding.NamedSharding(mesh, FLOAT32.rules.spec(("batch",)))
    with jax.set_mesh(mesh):
        got = step(
            jax.device_put(params, param_shardings(boxed, mesh, FLOAT32.rules)),
            jax.device_put(vlm, rows),
        )
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
