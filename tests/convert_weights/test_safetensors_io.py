"""Our reader and writer against the safetensors library and torch; damaged files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weights.rules import ConversionError
from convert_weights.safetensors_io import open_weights, write_safetensors, write_sharded
from convert_weights.torch_io import write_torch

TENSORS = {
    "a.bf16": torch.arange(7, dtype=torch.float32).to(torch.bfloat16),
    "b.f32": torch.randn(3, 5),
    "c.i64": torch.arange(4).reshape(2, 2),
    "d.scalar": torch.tensor(2.5),
    "e.empty": torch.zeros(0, 3),
    "f.bool": torch.tensor([True, False, True]),
}


def assert_same(tensors, state):
    assert set(tensors) == set(state)
    for key, lazy in tensors.items():
        array, other = lazy.read(), state[key]
        assert lazy.shape == array.shape == tuple(other.shape), key
        assert lazy.dtype == array.dtype
        bits = other.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert np.array_equal(array.reshape(-1).view(np.uint8), bits), key


@pytest.mark.parity
def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    assert_same(open_weights(tmp_path / "x.safetensors"), TENSORS)


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_writes(tmp_path, zipped):
    strided = TENSORS | {"g.strided": torch.randn(4, 6).T}
    torch.save(strided, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert_same(open_weights(tmp_path / "x.pt"), strided)


@pytest.mark.parity
def test_library_reads_what_we_write(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    arrays = {k: t.read() for k, t in open_weights(tmp_path / "x.safetensors").items()}
    write_safetensors(tmp_path / "y.safetensors", arrays)
    back = load_file(tmp_path / "y.safetensors")
    assert_same(open_weights(tmp_path / "x.safetensors"), back)
    write_torch(tmp_path / "y.pt", open_weights(tmp_path / "y.safetensors"))
    assert_same(open_weights(tmp_path / "x.safetensors"), torch.load(tmp_path / "y.pt"))


@pytest.mark.parity
def test_shards_in_any_order_of_arrival(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((10, i + 1)).astype(np.float32) for i in range(9)}
    arrays["odd"] = np.ones(3, ml_dtypes.bfloat16)
    plan = {k: (x.shape, x.dtype) for k, x in arrays.items()}
    write_sharded(tmp_path, plan, reversed(arrays.items()), max_shard=800)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    table = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(table["weight_map"]) == set(arrays)
    assert table["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    read = open_weights(tmp_path)
    for key, array in arrays.items():
        assert np.array_equal(read[key].read(), array)
        by_library = load_file(tmp_path / table["weight_map"][key])[key]
        assert np.array_equal(by_library.float().numpy(), array.astype(np.float32))


def test_writer_wants_every_tensor_once_and_as_planned(tmp_path):
    plan = {"a": ((2,), np.float32), "b": ((2,), np.float32)}
    x = np.zeros(2, np.float32)
    with pytest.raises(ConversionError, match="never written: b"):
        write_sharded(tmp_path, plan, [("a", x)])
    with pytest.raises(ConversionError, match="a: .*planned"):
        write_sharded(tmp_path, plan, [("a", x), ("a", x)])
    with pytest.raises(ConversionError, match=r"b: float64\(2,\), planned float32"):
        write_sharded(tmp_path, plan, [("b", x.astype(np.float64))])


def damaged(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "truncated: 12 of 16 data bytes; cut: b"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b: data_offsets 4 to 12: overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b: data_offsets 12 to 20: leaves a hole"),
        ({"a": entry(0, 8)}, 11, "3 bytes after the last tensor"),
        ({"a": entry(0, 8, dtype="F8_E4M3")}, 8, "a: dtype F8_E4M3 is not one of"),
        ({"a": entry(0, 8, shape=(3,))}, 8, r"a: F32 \(3,\) does not fill bytes 0 to 8"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: entry without"),
        (b"not json", 0, "the header is not JSON"),
        (b"[1]", 0, "the header is not JSON"),
    ],
)
def test_damaged_safetensors(tmp_path, header, size, message):
    path = damaged(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(ConversionError, match=f"bad.safetensors(.|\n)*{message}"):
        open_weights(path)


def test_truncated_header(tmp_path):
    path = damaged(tmp_path / "bad.safetensors", {"a": entry(0, 8)}, length=10**6)
    with pytest.raises(ConversionError, match="bad.safetensors: truncated"):
        open_weights(path)
    path.write_bytes(b"abc")
    with pytest.raises(ConversionError, match="bad.safetensors: truncated"):
        open_weights(path)


def test_index_and_shards_must_agree(tmp_path):
    arrays = {k: np.zeros(100, np.float32) for k in "abc"}
    plan = {k: (x.shape, x.dtype) for k, x in arrays.items()}
    write_sharded(tmp_path, plan, arrays.items(), max_shard=400)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    wrong = dict(table["weight_map"]) | {"nothere": table["weight_map"]["a"]}
    del wrong["b"]
    index.write_text(json.dumps({"weight_map": wrong | {"z": table["weight_map"]["b"]}}))
    with pytest.raises(ConversionError, match="lacks nothere(.|\n)*holds b, which the index"):
        open_weights(tmp_path)
    index.write_text(json.dumps(table))
    (tmp_path / table["weight_map"]["b"]).unlink()
    with pytest.raises(ConversionError, match=r"missing shards .*model-00002.*\(1 tensors\)"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ConversionError, match="index.json: not an index"):
        open_weights(tmp_path)


class Malicious:
    def __reduce__(self):
        return (print, ("executed!",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Malicious(), "weights_only=True. refused it.*can run any code"),
        ([torch.zeros(1)], "holds a list, not a dict"),
        ({"w": torch.zeros(1), "epoch": 3}, r"also holds epoch \(int\)"),
        ({"model": {"w": torch.zeros(1)}}, r"also holds model \(dict\)"),
        ({"w": torch.zeros(1, dtype=torch.complex64)}, "w has dtype complex64"),
    ],
)
def test_pt_that_is_no_plain_dict(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ConversionError, match=f"bad.pt.*{message}"):
        open_weights(tmp_path / "bad.pt")
    assert "executed" not in capsys.readouterr().out


def test_truncated_pt(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match="bad.pt"):
        open_weights(tmp_path / "bad.pt")


def test_nothing_there(tmp_path):
    for path in ("none.safetensors", "none"):
        with pytest.raises(ConversionError, match=f"{path}: no such file"):
            open_weights(tmp_path / path)
    with pytest.raises(ConversionError, match="holds neither"):
        open_weights(tmp_path)
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(ConversionError, match="w.h5: expected .safetensors"):
        open_weights(tmp_path / "w.h5")
