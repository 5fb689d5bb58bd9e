"""Windows of keys against full rows: which width is taken, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.config import FLOAT32, VLM_PRESETS
from st4vla_jax.models import attention as attention_module
from st4vla_jax.models import attention_xla
from st4vla_jax.models.attention import attention
from st4vla_jax.models.qwen_lm import LanguageModel
from st4vla_jax.models.qwen_vision import VisionTower
from st4vla_jax.sharding import Rules, make_mesh

LENGTH = 64


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Blocks of 4 queries and windows of 8, 16 or 32 keys, so that short rows have all of them."""
    monkeypatch.setattr(attention_xla, "BLOCK", 4)
    monkeypatch.setattr(attention_xla, "WIDTHS", (8, 16, 32))


def row(*pairs):
    """(segment id, tokens), ...; the rest is padding."""
    ids = np.concatenate([np.full(tokens, number) for number, tokens in pairs])
    return np.pad(ids, (0, LENGTH - len(ids))).astype(np.int32)


def inputs(batch, heads=4, groups=2, dim=8, length=LENGTH):
    rng = np.random.default_rng([batch, heads, length])
    shapes = [(batch, length, n, dim) for n in (heads, groups, groups, heads)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def result_and_gradient(run, q, k, v, g, segments, causal):
    """Output and gradients where they mean something: not in padding."""
    valid = (segments > 0)[..., None, None]
    out, pull = jax.vjp(lambda *qkv: jnp.where(valid, run(*qkv, segments, causal), 0), q, k, v)
    return out, *pull(jnp.asarray(g))


def full(q, k, v, segments, causal):
    return attention_xla.attend(q, k, v, segments, segments, causal, 0, 0)


def windows(q, k, v, segments, causal):
    return attention_xla.attend_windows(q, k, v, segments, causal, 24)


@functools.cache
def compiled(run, causal):
    return jax.jit(functools.partial(result_and_gradient, run, causal=causal))


def assert_equal(got, want, atol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()))


# (rows, width for causal, width for full attention)
LAYOUTS = [
    # Exactly at the bound, and one key more.
    ([row((1, 8), (2, 8), (3, 8))], 8, 8),
    ([row((1, 8), (2, 9))], 16, 16),
    ([row((1, 3), (2, 6))], 16, 16),
    ([row((1, 16), (2, 16), (3, 16), (4, 16))], 16, 16),
    ([row((1, 16), (2, 17), (3, 15))], 32, 32),
    ([row((1, 3), (2, 29), (3, 32))], 32, 32),
    ([row((1, 33))], LENGTH, LENGTH),
    ([row((1, 64))], LENGTH, LENGTH),
    # A block of queries across two segments reads both: tokens 6..8 and 9..21.
    ([row((1, 6), (2, 3), (3, 13))], 16, 16),
    # The causal window ends with the block, the other with the segment.
    ([row((1, 6), (2, 14))], 16, 32),
    # The widest of the rows decides; padding between, at the end, everywhere.
    ([row((1, 5)), row((1, 8), (0, 8), (2, 12))], 16, 16),
    ([row((1, 4), (0, 2), (2, 6), (0, 20), (3, 8)), row((0, 1))], 8, 8),
    # An id that comes twice is one segment.
    ([row((1, 4), (2, 4), (1, 4))], 16, 16),
    ([row((1, 4), (2, 56), (1, 4))], LENGTH, LENGTH),
]


@pytest.mark.parametrize("causal", [True, False])
def test_smallest_width_that_holds_all_keys(monkeypatch, causal):
    """Every branch gives its width."""
    monkeypatch.setattr(
        attention_xla, "_over_windows", lambda causal, width, q, *_: jnp.full_like(q, width)
    )
    monkeypatch.setattr(attention_xla, "attend", lambda q, *_: jnp.full_like(q, LENGTH))
    run = jax.jit(lambda *args: attention_xla.attend_windows(*args, causal, 0)[0, 0, 0, 0])
    got = [run(*inputs(2)[:3], np.stack((rows * 2)[:2])) for rows, *_ in LAYOUTS]
    assert got == [causal_width if causal else full for _, causal_width, full in LAYOUTS]


@pytest.mark.parametrize("causal", [True, False])
def test_windows_equal_full_rows(causal):
    layouts = [np.stack((rows * 2)[:2]) for rows, *_ in LAYOUTS]
    rng = np.random.default_rng(0)
    for longest in (6, 6, 12, 12, 28):
        sizes = rng.integers(1, longest, (2, 40))
        layouts.append(np.stack([np.repeat(np.arange(1, 41), n)[:50] for n in sizes]))
        layouts[-1] = np.pad(layouts[-1], ((0, 0), (0, 14))).astype(np.int32)
    for segments in layouts:
        args = (*inputs(2), segments)
        assert_equal(compiled(windows, causal)(*args), compiled(full, causal)(*args))


def test_padding_sees_only_padding():
    segments = row((1, 6), (0, 6), (2, 5), (3, 7), *((n, 8) for n in range(4, 9)))[None]
    q, k, v, _ = inputs(1)
    real = (segments > 0)[..., None, None]
    out = windows(q, k, v, segments, False)
    other = windows(q, np.where(real, 9, k), np.where(real, 9, v), segments, False)
    np.testing.assert_array_equal(np.where(real, 0, out), np.where(real, 0, other))


def test_heads_apart_and_rows_on_more_axes():
    q, k, v, _ = inputs(4)
    segments = np.stack([row((1, 7), (2, n)) for n in (3, 8, 13, 20)])
    want = full(q, k, v, segments, True)
    q, k, v, segments = (x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v, segments))
    got = windows(q, k, v, segments, True).reshape(want.shape)
    valid = (segments.reshape(4, -1) > 0)[..., None, None]
    assert_equal(np.where(valid, got, 0), np.where(valid, want, 0))


def test_every_device_takes_its_own_width():
    """Rows and heads are split, and no device waits for another or gathers anything."""
    segments = np.stack([row((1, n), (2, 5)) for n in (7, 15, 30, 50)])
    args = (*inputs(4, heads=8), segments)

    def on_mesh(q, k, v, segments, causal):
        return attention(
            q, k, v, q_segments=segments, kv_segments=segments, causal=causal, rules=Rules()
        )

    want = compiled(full, True)(*args)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        run = compiled(on_mesh, True).lower(*args).compile()
        got = run(*args)
    assert_equal(got, want)
    text = run.as_text()
    assert "conditional(" in text
    assert "all-gather" not in text.split("ENTRY")[0]


def test_where_windows_are_taken(monkeypatch):
    calls, real = [], attention_xla.attend_windows
    monkeypatch.setattr(
        attention_xla, "attend_windows", lambda *args: calls.append(args) or real(*args)
    )
    q, k, v, _ = inputs(1)
    ids = jnp.asarray(row((1, 9))[None])

    def run(kv_ids=ids, **kwargs):
        attention(q, k, v, q_segments=ids, kv_segments=kv_ids, **kwargs)
        return len(calls)

    assert run() == 1
    assert run(causal=True, kernel="auto") == 2
    assert run(weights_fn=lambda w: w) == 2  # dropout
    assert run(causal=True, q_offset=jnp.int32(0)) == 2  # cached keys
    assert run(kv_ids=jnp.copy(ids)) == 2  # other keys
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_module.attention_cudnn, "device_has_kernel", lambda: False)
    assert run() == 2
    monkeypatch.setattr(attention_module, "platform", lambda: "cpu")
    assert run() == 3
    assert not attention_xla.has_windows(12)  # no window is half a row
    assert not attention_xla.has_windows(66)  # no whole blocks


def language_model(rt, segments):
    cfg = dataclasses.replace(VLM_PRESETS["tiny"][1], num_hidden_layers=2)
    batch, length = segments.shape
    x = np.random.default_rng(0).standard_normal((batch, length, cfg.hidden_size))
    positions = np.broadcast_to(np.arange(length)[None, :, None], (batch, length, 3))
    return LanguageModel(cfg, rt), (x.astype(np.float32), positions, segments)


def vision_tower(rt, segments):
    cfg = dataclasses.replace(VLM_PRESETS["tiny"][0], depth=2, fullatt_block_indexes=(1,))
    batch, length = segments.shape
    patches = np.random.default_rng(0).integers(0, 256, (batch, length, 588)).astype(np.uint8)
    hw = np.broadcast_to(np.stack(np.divmod(np.arange(length), 8), -1), (batch, length, 2))
    return VisionTower(cfg, rt), (patches, hw.astype(np.int32), segments, segments)


@pytest.mark.parametrize(
    "build,remat", [(language_model, "none"), (language_model, "dots"), (vision_tower, "full")]
)
def test_models_give_the_same_gradient(monkeypatch, build, remat):
    segments = np.stack([row((1, 12), (2, 16), (0, 8), (3, 8)), row((1, 4), (2, 8))])
    segments = np.concatenate([segments, np.roll(segments, 8, axis=1)], axis=1)
    model, args = build(dataclasses.replace(FLOAT32, remat=remat), segments)
    params = jax.jit(model.init)(jax.random.key(0), *args)
    params = jax.tree.map(lambda p: 4 * p, params)  # else attention adds next to nothing

    def loss(params):
        out = model.apply(params, *args)
        out = getattr(out, "hidden", out)
        used = segments[:, :: segments.shape[1] // out.shape[1]] > 0
        noise = jax.random.normal(jax.random.key(1), out.shape)
        return jnp.mean(jnp.where(used[..., None], out * noise, 0))

    got = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(attention_xla, "has_windows", lambda _: False)
    assert_equal(got, jax.jit(jax.value_and_grad(loss))(params), atol=1e-4)
