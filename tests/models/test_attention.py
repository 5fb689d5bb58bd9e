"""attention() against torch's scaled_dot_product_attention and literal mask matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.models.attention import attention

torch = pytest.importorskip("torch")


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def reference(q, k, v, mask=None):
    q, k, v = (torch.tensor(x).transpose(-2, -3) for x in (q, k, v))
    mask = None if mask is None else torch.tensor(np.asarray(mask))[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return out.transpose(-2, -3).numpy()


@pytest.mark.parity
@pytest.mark.parametrize("heads,groups", [(4, 4), (6, 2), (4, 1)])
def test_grouped_heads_equal_torch(heads, groups):
    q, k, v = random(2, 9, heads, 8), random(2, 11, groups, 8), random(2, 11, groups, 8, seed=1)
    np.testing.assert_allclose(attention(q, k, v), reference(q, k, v), atol=1e-5)


def visible(**kwargs):
    """Which keys each query sees, read off one-hot values."""
    n = len(kwargs.get("q_segments", range(4)))
    zeros, eye = jnp.zeros((1, n, 1, n)), jnp.eye(n)[None, :, None, :]
    kwargs = {k: jnp.asarray(v)[None] if "segments" in k else v for k, v in kwargs.items()}
    return (attention(zeros, zeros, eye, **kwargs)[0, :, 0] > 0).astype(int).tolist()


def test_mask_matrices():
    segments = [1, 1, 2, 0]
    both = {"q_segments": segments, "kv_segments": segments}
    assert visible(causal=True) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(**both) == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert visible(**both, causal=True) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert visible(causal=True, q_offset=2)[0] == [1, 1, 1, 0]


@pytest.mark.parametrize("chunk", [1, 3, 4, 10])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_change_nothing(chunk, causal):
    q, k, v = random(2, 10, 4, 8), random(2, 10, 2, 8), random(2, 10, 2, 8, seed=1)
    segments = np.repeat([[1, 1, 2, 2, 2], [1, 2, 2, 3, 0]], 2, axis=1)
    kwargs = {"q_segments": segments, "kv_segments": segments, "causal": causal}

    def loss(q, k, v, chunk):
        return jnp.sum(jnp.sin(attention(q, k, v, query_chunk=chunk, **kwargs)))

    want = jax.value_and_grad(loss, (0, 1, 2))(q, k, v, 0)
    got = jax.value_and_grad(loss, (0, 1, 2))(q, k, v, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_bfloat16_keeps_f32_softmax():
    q, k, v = random(1, 64, 2, 16) * 4, random(1, 64, 2, 16), random(1, 64, 2, 16, seed=1)
    low = attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), reference(q, k, v), atol=0.05)
