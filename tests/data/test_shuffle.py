"""Orders that need no memory: the permutation is one, the lattice's bound is exact."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.shuffle import Lattice, permuted


@given(st.integers(1, 5000), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_permutation(size, key):
    found = permuted(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(found) == list(range(size))


def test_permuted_depends_on_the_key_and_is_uniform():
    size, trials = 6, 12_000
    index = np.tile(np.arange(size), trials)
    key = np.repeat(np.arange(trials, dtype=np.uint64), size)
    rows = permuted(index, np.full(len(index), size), key).reshape(trials, size)
    counts = Counter(map(tuple, rows))
    assert len(counts) == 720  # every permutation occurs
    for position in range(size):
        share = np.bincount(rows[:, position]) / trials
        assert np.abs(share - 1 / size).max() < 5 * np.sqrt(1 / size / trials)


@given(st.integers(1, 400), st.integers(0, 900), st.data())
@settings(max_examples=80, deadline=None)
def test_lattice_bound_is_exact(size, length, data):
    lattice = Lattice(size)
    assert sorted(lattice(np.arange(7, 7 + size))) == list(range(size))
    width = data.draw(st.integers(0, size))
    hits = np.stack([lattice(np.arange(s, s + length)) for s in range(size)])
    counts = [
        (((hits - start) % size) < width).sum(axis=1).max(initial=0)
        for start in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    ]
    (bound,) = lattice.most(length, np.array([width]))
    assert max(counts) <= bound <= -(-length // size) * width
    assert set(counts) == {bound}  # stretches are rotations of one another: all arcs are alike


def test_a_lattice_spreads_evenly():
    for size in (997, 1000, 12_345, 2_000_000):
        widths = np.linspace(0, size, 33).astype(np.int64)
        assert (Lattice(size).most(512, widths) - 512 * widths / size).max() < 4
