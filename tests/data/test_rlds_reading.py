"""RLDS shards that fail, rot, vanish or change while they are read."""

import os

import pytest

from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.tfrecord import ShardError
from tests.data.test_rlds import BOTH, BRIDGE, assert_samples_equal, folder


def quick(source: RldsSource) -> RldsSource:
    source._reader._delays = (0.0, 0.0)
    return source


def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    _, root = folder(tmp_path / "set", "bridge")
    source = quick(RldsSource(root, BRIDGE, views=BOTH))
    expected, pread, calls = source[4], os.pread, []

    def flaky(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(os, "pread", flaky)
    assert_samples_equal(source[4], expected)
    assert len(calls) == 3  # the failed one, then both views


def test_a_short_read_is_completed(tmp_path, monkeypatch):
    _, root = folder(tmp_path / "set", "bridge")
    source = quick(RldsSource(root, BRIDGE))
    expected, pread = source[4], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 100), at))
    assert_samples_equal(source[4], expected)


def test_a_read_that_fails_for_ever_is_an_os_error(tmp_path, monkeypatch):
    _, root = folder(tmp_path / "set", "bridge")
    source = quick(RldsSource(root, BRIDGE))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match="00000-of-00001: record 0 cannot be read after 3 tries"):
        source[0]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_shard_that_vanishes_is_an_os_error(tmp_path, file_format):
    _, root = folder(tmp_path / "set", "bridge", file_format=file_format)
    source = quick(RldsSource(root, BRIDGE))
    (path,) = root.glob("*-of-*")
    path.rename(tmp_path / "away")
    with pytest.raises(OSError, match="cannot be read after 3 tries") as error:
        source[0]
    assert path.name in str(error.value)
    (tmp_path / "away").rename(path)
    assert source[0].record.endswith("step 1")


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_shard_that_changed_is_refused(tmp_path, file_format, opened_before):
    _, root = folder(tmp_path / "set", "bridge", file_format=file_format)
    source = quick(RldsSource(root, BRIDGE))
    if opened_before:
        source[0]
    (path,) = root.glob("*-of-*")
    # In place, so that a shard held open sees it too.
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ShardError, match=f"{path.name}: changed since it was indexed"):
        source[0]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_bytes_that_rot_unseen_are_a_bad_record(tmp_path, file_format):
    episodes, root = folder(tmp_path / "set", "bridge", file_format=file_format)
    source = quick(RldsSource(root, BRIDGE))
    (path,) = root.glob("*-of-*")
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(episodes[0]["observation/image_0"][1]) + 300] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BadRecordError, match=f"{path.name} record 0 step 1: images are not as"):
        source[0]
    assert source[3].record.endswith("record 1 step 2")
