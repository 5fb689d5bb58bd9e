"""Plain data comes through, everything else is refused before it runs."""

import collections
import contextlib
import functools
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.safe_pickle import UnsafePickleError, load

STRUCTURED = np.array([(7, 1, 2, 0.5), (9, 3, 4, -1)],
                      [("id", "<u4"), ("x", "<i4"), ("y", ">i2"), ("o", "<f4")])  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        {"ref_id": 3, "sentences": [{"sent": "the Tür", "tokens": ["a", "b"]}], "split": "val"},
        [None, True, 1.5, 2**80, b"\x00\xff", b"", (1, (2,)), {1, 2}, frozenset("ab")],
        np.arange(6, dtype=np.float64).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        STRUCTURED,
        np.array(["ab", "c"]),
        np.array([True, False]),
        {"x": np.float32(1.5), "n": np.uint32(7), "t": (np.zeros((0, 4)), np.array(3))},
    ],
)
def test_plain_data(value, protocol):
    found = load(pickle.dumps(value, protocol=protocol))
    np.testing.assert_equal(found, value)
    if isinstance(value, np.ndarray):
        assert found.dtype == value.dtype
        assert type(found) is np.ndarray


def test_old_numpy_names():
    """Written by NumPy 1, whose modules had other names."""
    data = pickle.dumps(np.arange(3), protocol=2)
    assert b"numpy._core" in data
    np.testing.assert_equal(load(data.replace(b"numpy._core", b"numpy.core")), np.arange(3))


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "attack",
    [
        lambda path: _Runs(os.system, f"touch {path}"),
        lambda path: [{"deep": _Runs(eval, f"open({path!r}, 'w')")}],
        lambda path: _Runs(functools.partial, print),
        lambda path: _Runs(getattr, "a", "upper"),
        lambda path: collections.OrderedDict(a=1),
        lambda path: np.array([{}], object),
        lambda path: np.dtype("f4"),
        lambda path: np.ma.array([1]),
    ],
)
def test_code_and_other_types_are_refused(attack, protocol, tmp_path):
    path = tmp_path / "ran"
    with pytest.raises(UnsafePickleError, match=r"annotation\.x"):
        load(pickle.dumps(attack(str(path)), protocol=protocol), "annotation.x")
    assert not path.exists()


def _with_state(state):
    """A pickle of an array whose state is not what NumPy writes."""
    make = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    )  # fmt: skip
    return make.replace(b"\x80\x02", b"\x80\x03") + pickle.dumps(state, 3)[2:-1] + b"b."


def test_lies_about_shape_are_refused():
    good = np.arange(4, dtype="<i4")
    state = (1, (4,), good.dtype, False, good.tobytes())
    np.testing.assert_equal(load(_with_state(state)), good)
    for shape, data in [((5,), good.tobytes()), ((4,), b"1"), ((10**9,), b""), ("x", b"")]:
        with pytest.raises(UnsafePickleError):
            load(_with_state((1, shape, good.dtype, False, data)))


def test_lies_about_offsets_are_refused():
    """NumPy's own dtype.__setstate__ would believe them and read foreign memory."""
    data = pickle.dumps(STRUCTURED, 2)
    offsets = [i for op, i, _ in pickletools.genops(data) if op.name == "BININT1" and i == 8]
    assert offsets
    lying = data.replace(b"K\x0a", b"K\xff").replace(b"K\x08", b"J" + struct.pack("<i", 10**6))
    with pytest.raises(UnsafePickleError):
        load(lying)


def test_deep_and_shared_containers():
    deep = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UnsafePickleError, match="nested"):
        load(pickle.dumps(deep))
    shared = []
    for _ in range(40):  # 2**40 leaves, were sharing not kept
        shared = [shared, shared]
    found = load(pickle.dumps(shared))
    assert found[0] is found[1]


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes(data):
    with contextlib.suppress(UnsafePickleError):
        load(b"\x80\x04" + data)


def test_a_stand_in_cannot_be_changed():
    """BUILD on a name's stand-in would poison the next pickle."""
    attack = b"\x80\x03cnumpy\ndtype\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    with pytest.raises(UnsafePickleError):
        load(attack)
    np.testing.assert_equal(load(pickle.dumps(np.arange(2))), np.arange(2))


def test_real_annotations(shared):
    pq = pytest.importorskip("pyarrow.parquet")
    root = shared / "data/lerobot_sim_pick_place"
    path = root / "data/chunk-000/episode_000000.parquet"
    names = [n for n in pq.read_schema(path).names if n.startswith("annotation.")]
    table = pq.read_table(path, columns=names).slice(100, 1)
    for name in names:
        cell = table[name][0].as_py()
        np.testing.assert_equal(load(cell, name), pickle.loads(cell))
