import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.chunks import PADS, action_chunk

EPISODE = np.array([[1, 2, 0], [3, 4, 1], [5, 6, 1]], np.float32)


@pytest.mark.parametrize(
    ("pad", "tail"),
    [
        ("neutral", [[0, 0, 1], [0, 0, 1]]),
        ("zero", [[0, 0, 0], [0, 0, 0]]),
        ("repeat", [[5, 6, 1], [5, 6, 1]]),
    ],
)
def test_padding_by_hand(pad, tail):
    actions, mask = action_chunk(EPISODE, 1, 4, pad, absolute=(2,))
    np.testing.assert_array_equal(actions, [[3, 4, 1], [5, 6, 1], *tail])
    np.testing.assert_array_equal(mask, [[True] * 3] * 2 + [[False] * 3] * 2)
    assert (actions.dtype, mask.dtype) == (np.float32, bool)


def test_upstream_counts_its_zero_padding_in_the_loss():
    actions, mask = action_chunk(EPISODE, 2, 3, "zero", absolute=(2,), masked=False)
    np.testing.assert_array_equal(actions, [[5, 6, 1], [0, 0, 0], [0, 0, 0]])
    assert mask.all()


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 12),
    size=st.integers(1, 4),
    chunk=st.integers(1, 20),
    pad=st.sampled_from(PADS),
    masked=st.booleans(),
    data=st.data(),
)
def test_each_row_is_the_episodes_or_padding(length, size, chunk, pad, masked, data):
    start = data.draw(st.integers(0, length - 1))
    absolute = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    episode = np.random.default_rng(length * 31 + size).normal(size=(length, size)).astype("f")
    before = episode.copy()
    actions, mask = action_chunk(episode, start, chunk, pad, absolute, masked)
    for row in range(chunk):
        inside = start + row < length
        for dim in range(size):
            holds = pad == "repeat" or (pad == "neutral" and dim in absolute)
            expected = episode[min(start + row, length - 1), dim] if inside or holds else 0
            assert actions[row, dim] == expected
            assert mask[row, dim] == (inside or not masked)
    actions[:] = 7  # a copy: episodes are memory-mapped read-only columns
    np.testing.assert_array_equal(episode, before)


@pytest.mark.parametrize(
    ("start", "chunk", "pad"), [(3, 2, "zero"), (-1, 2, "zero"), (0, 0, "zero"), (0, 1, "none")]
)
def test_impossible_chunks_are_refused(start, chunk, pad):
    with pytest.raises(ValueError, match="chunk|pad"):
        action_chunk(EPISODE, start, chunk, pad, absolute=(2,))
