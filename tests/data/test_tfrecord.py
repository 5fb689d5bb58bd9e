import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from st4vla_jax.data.tfrecord import (
    ExampleError,
    ShardError,
    bytes_spans,
    feature_spans,
    masked_crc32c,
    numbers,
    read_records,
)
from tests.reference.shards import frame, parse, tfrecord_records


def test_masked_crc32c_is_that_of_tensorflow():
    # tensorflow/core/lib/hash/crc32c_test.cc: crc of 32 zero bytes is 0x8a9136aa.
    crc = 0x8A9136AA
    assert masked_crc32c(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@pytest.mark.parity
def test_every_real_record_is_sound_and_reads_as_protobuf_does(shared):
    path = shared / "data/bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001"
    records = list(read_records(path))
    assert [data for _, data, _, _ in records] == tfrecord_records(path)
    assert len(records) == 25 and all(sound for *_, sound in records)
    whole = path.read_bytes()
    for offset, data, _, _ in records:
        assert whole[offset : offset + len(data)] == data
        _assert_equal(data)


def _assert_equal(data: bytes) -> None:
    """Every feature as protobuf's own parser reads it."""
    features = parse(data).features.feature
    spans = feature_spans(data)
    assert spans.keys() == features.keys()
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            found = [data[a:b] for a, b in bytes_spans(data, spans[name])]
            assert found == list(feature.bytes_list.value)
        elif kind is not None:
            expected = getattr(feature, kind).value
            found = numbers(data, spans[name])
            assert found.tolist() == list(expected)
            assert not len(found) or found.dtype == {"f": np.float32, "i": np.int64}[kind[0]]


_FEATURE = st.one_of(
    st.lists(st.binary(max_size=200), max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
)


def _example(content) -> bytes:
    example = tf_example_pb2.Example()
    for name, values in content.items():
        feature = example.features.feature[name]
        kinds = {bytes: feature.bytes_list, float: feature.float_list, int: feature.int64_list}
        if values:
            kinds[type(values[0])].value.extend(values)
    return example.SerializeToString()


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=10), _FEATURE, max_size=4))
def test_examples_read_as_protobuf_reads_them(content):
    _assert_equal(_example(content))


def test_numbers_that_are_not_packed_read_the_same():
    # What writers of proto2 emit: a key before each value.
    floats = b"".join(b"\x0d" + struct.pack("<f", x) for x in (0.5, -2.0))
    integers = b"\x08\x05" + b"\x08" + b"\xff" * 9 + b"\x01"
    for body, field, expected in ((floats, 2, [0.5, -2.0]), (integers, 3, [5, -1])):
        feature = bytes([field << 3 | 2, len(body)]) + body
        entry = b"\x0a\x01a\x12" + bytes([len(feature)]) + feature
        features = b"\x0a" + bytes([len(entry)]) + entry
        message = parse(b"\x0a" + bytes([len(features)]) + features).features.feature["a"]
        assert list((message.float_list if field == 2 else message.int64_list).value) == expected
        assert numbers(feature, (0, len(feature))).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 10**6))
def test_broken_examples_raise_example_errors_only(noise, at):
    good = bytearray(_example({"a": [b"x", b"yz"], "b": [1.0, 2.0], "c": [3, -4]}))
    at %= len(good)
    good[at : at + len(noise)] = noise
    with contextlib.suppress(ExampleError):
        for span in feature_spans(bytes(good)).values():
            for read in (bytes_spans, numbers):
                with contextlib.suppress(ExampleError):
                    read(bytes(good), span)


def test_asking_for_the_other_kind_is_an_error():
    data = _example({"a": [b"x"], "b": [1.0]})
    spans = feature_spans(data)
    with pytest.raises(ExampleError, match="holds bytes values"):
        numbers(data, spans["a"])
    with pytest.raises(ExampleError, match="holds f32 values, not bytes"):
        bytes_spans(data, spans["b"])


def test_each_flipped_byte_is_found(tmp_path):
    records = [_example({"a": [b"first"]}), _example({"a": [b"second"]})]
    whole = b"".join(map(frame, records))
    second = len(frame(records[0]))
    path = tmp_path / "x-train.tfrecord-00000-of-00001"
    for at in range(second, len(whole)):
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(data)
        reading = read_records(path)
        assert next(reading)[3]
        if at < second + 12:
            with pytest.raises(ShardError, match=f"length at byte {second} fails its checksum"):
                next(reading)
        else:
            assert not next(reading)[3]


def test_each_truncation_is_found_but_at_a_record_boundary(tmp_path):
    records = [_example({"a": [b"first"]}), _example({"a": [b"second"]})]
    whole = b"".join(map(frame, records))
    boundary = len(frame(records[0]))
    path = tmp_path / "x-train.tfrecord-00000-of-00001"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        if size == boundary:
            assert len(list(read_records(path))) == 1
            continue
        start = 0 if size < boundary else boundary
        with pytest.raises(ShardError, match=f"{path.name}.*truncated record at byte {start}"):
            list(read_records(path))
