import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf_modeling

from st4vla_jax.models.mrope import rotary_tables, rotate
from tests.reference.qwen import tiny_hf

B, T, N, H = 2, 17, 3, 12


@pytest.fixture(scope="module")
def positions():
    return np.random.default_rng(0).integers(0, 60, (B, T, 3), dtype=np.int32)


@pytest.mark.parity
def test_equals_transformers(positions):
    hf, cfg = tiny_hf(tie=True)
    text = cfg.text
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((B, T, N, H)).astype(np.float32) for _ in range(2))
    as_torch = torch.from_numpy(positions).permute(2, 0, 1)
    cos, sin = hf.model.language_model.rotary_emb(torch.zeros(1), as_torch)
    want = hf_modeling.apply_rotary_pos_emb(
        torch.from_numpy(q), torch.from_numpy(k), cos, sin, unsqueeze_dim=2
    )
    tables = rotary_tables(positions, H, text.mrope_section, text.rope_theta)
    for x, y in zip((q, k), want, strict=True):
        np.testing.assert_allclose(rotate(x, tables), y.numpy(), atol=1e-5)


def test_each_axis_turns_its_own_frequencies(positions):
    sections = (1, 2, 3)
    base, _ = rotary_tables(positions, H, sections, 10.0)
    for axis, owned in enumerate(([0], [1, 2], [3, 4, 5])):
        moved = positions.copy()
        moved[..., axis] += 1
        cos, _ = rotary_tables(moved, H, sections, 10.0)
        changed = np.flatnonzero(np.any(np.asarray(cos != base), axis=(0, 1)))
        np.testing.assert_array_equal(changed, owned)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((1, 1, 1, H)).astype(np.float32) for _ in range(2))

    def score(i, j):
        at = [rotary_tables(jnp.full((1, 1, 3), p), H, (1, 2, 3), 100.0) for p in (i, j)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_keeps_the_dtype_and_computes_in_f32(positions):
    x = np.random.default_rng(3).standard_normal((B, T, N, H)).astype(jnp.bfloat16)
    tables = rotary_tables(positions, H, (1, 2, 3), 1e4)
    out = rotate(jnp.asarray(x), tables)
    assert out.dtype == jnp.bfloat16
    want = rotate(jnp.asarray(x, jnp.float32), tables).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(want))
