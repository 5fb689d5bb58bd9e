"""Synthetic tfds-format folders without TensorFlow: features.json, shards with masked CRCs.

An episode is {column path below a step: list of bytes | array [T,...]}.  Low-dimensional values,
and the JPEGs, are drawn from the given rng; `bridge`, `fractal`, `kuka` (zlib-packed) and
`language_table` are shaped as those data sets are (spec data.md section 5).
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

Episode = dict[str, Any]


def image_feature(height: int = 32, width: int = 40, encoding: str = "jpeg") -> dict[str, Any]:
    shape = {"dimensions": [str(height), str(width), "3"]}
    return {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {"shape": shape, "dtype": "uint8", "encodingFormat": encoding},
    }


def tensor_feature(*shape: int, dtype: str = "float32", encoding: str = "none") -> dict[str, Any]:
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"shape": dimensions, "dtype": dtype, "encoding": encoding},
    }


def text_feature() -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
        "text": {},
    }


def encode_image(pixels: np.ndarray, encoding: str = "jpeg") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, encoding.upper(), quality=95)  # PNG ignores the quality
    return out.getvalue()


def random_images(
    rng: np.random.Generator, steps: int, height: int = 32, width: int = 40, encoding: str = "jpeg"
) -> list[bytes]:
    return [
        encode_image(rng.integers(0, 256, (height, width, 3), np.uint8), encoding)
        for _ in range(steps)
    ]


# --- Serialising --------------------------------------------------------------------------------


def serialize(episode: Episode) -> bytes:
    """One tf.train.Example as tfds writes it: bool and integers as i64, floats as f32."""
    example = tf_example_pb2.Example()
    for path, values in episode.items():
        feature = example.features.feature[f"steps/{path}"]
        if isinstance(values, list):
            feature.bytes_list.value.extend(values)
        elif values.dtype.kind == "f":
            feature.float_list.value.extend(values.astype(np.float32).reshape(-1).tolist())
        else:
            feature.int64_list.value.extend(values.astype(np.int64).reshape(-1).tolist())
    example.features.feature["episode_metadata/episode_id"].int64_list.value.append(7)
    return example.SerializeToString()


def parse(record: bytes) -> tf_example_pb2.Example:
    """The independent reading of a record: protobuf's own parser."""
    return tf_example_pb2.Example.FromString(record)


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record: bytes) -> bytes:
    """A record with TFRecord's framing."""
    length = struct.pack("<Q", len(record))
    crcs = struct.pack("<I", masked_crc(length)), struct.pack("<I", masked_crc(record))
    return length + crcs[0] + record + crcs[1]


def tfrecord_records(path: Path) -> list[bytes]:
    """Records of a shard, read by their lengths alone."""
    data, at, records = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        records.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    return records


# --- Folders ------------------------------------------------------------------------------------


def features_json(columns: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The nested declaration of step columns; a key like "a/b" becomes nested dictionaries."""
    steps: dict[str, Any] = {}
    for path, feature in columns.items():
        *parents, leaf = path.split("/")
        node = steps
        for name in parents:
            node = node.setdefault(name, {"featuresDict": {"features": {}}})
            node = node["featuresDict"]["features"]
        node[leaf] = feature
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "steps": {
                    "pythonClassName": (
                        "tensorflow_datasets.core.features.dataset_feature.Dataset"
                    ),
                    "sequence": {"feature": {"featuresDict": {"features": steps}}},
                },
                "episode_metadata": {
                    "featuresDict": {"features": {"episode_id": tensor_feature(dtype="int32")}}
                },
            }
        },
    }


def write_folder(
    root: Path,
    columns: Mapping[str, dict[str, Any]],
    splits: Mapping[str, Sequence[Episode | bytes]],
    *,
    name: str = "synthetic",
    shards: int = 1,
    file_format: str = "tfrecord",
    info: bool = True,
) -> Path:
    """Writes a data set version; episodes given as bytes are written as they are.

    Args:
      root: folder to make.
      columns: declaration of each step column.
      splits: episodes of each split.
      name: of the data set, in the files' names.
      shards: files a split.
      file_format: tfrecord or array_record.
      info: write dataset_info.json too.

    Returns:
      ``root``.
    """
    root.mkdir(parents=True)
    (root / "features.json").write_text(json.dumps(features_json(columns)))
    described = []
    for split, episodes in splits.items():
        records = [e if isinstance(e, bytes) else serialize(e) for e in episodes]
        parts = [records[i * len(records) // shards : (i + 1) * len(records) // shards]
                 for i in range(shards)]  # fmt: skip
        for i, part in enumerate(parts):
            path = root / f"{name}-{split}.{file_format}-{i:05d}-of-{shards:05d}"
            if file_format == "tfrecord":
                path.write_bytes(b"".join(map(frame, part)))
            else:
                writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
                for record in part:
                    writer.write(record)
                writer.close()
        described.append({"name": split, "shardLengths": [str(len(part)) for part in parts]})
    if info:
        content = {"name": name, "fileFormat": file_format, "splits": described}
        (root / "dataset_info.json").write_text(json.dumps(content))
    return root


# --- Shapes of real data sets -------------------------------------------------------------------


def _texts(text: str, steps: int) -> list[bytes]:
    return [text.encode()] * steps


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 0.02, shape).astype(np.float32)


BRIDGE = {
    **{f"observation/image_{i}": image_feature() for i in range(2)},
    "observation/state": tensor_feature(7),
    "action": tensor_feature(7),
    "is_first": tensor_feature(dtype="bool"),
    "language_instruction": text_feature(),
}


def bridge(rng: np.random.Generator, steps: int, text: str = "put the cup away") -> Episode:
    """Externally converted layout: language at the top, one action vector."""
    actions = _normal(rng, steps, 7)
    actions[:, 6] = rng.integers(0, 2, steps)
    return {
        **{f"observation/image_{i}": random_images(rng, steps) for i in range(2)},
        "observation/state": _normal(rng, steps, 7),
        "action": actions,
        "is_first": np.arange(steps) == 0,
        "language_instruction": _texts(text, steps),
    }


_GOOGLE = {
    "observation/image": image_feature(),
    "observation/natural_language_instruction": text_feature(),
    "action/world_vector": tensor_feature(3),
    "action/rotation_delta": tensor_feature(3),
    "action/gripper_closedness_action": tensor_feature(1),
    "action/terminate_episode": tensor_feature(3, dtype="int32"),
}


def _google(rng: np.random.Generator, steps: int, text: str) -> Episode:
    return {
        "observation/image": random_images(rng, steps),
        "observation/natural_language_instruction": _texts(text, steps),
        "action/world_vector": _normal(rng, steps, 3),
        "action/rotation_delta": _normal(rng, steps, 3),
        "action/gripper_closedness_action": rng.integers(-1, 2, (steps, 1)).astype(np.float32),
        "action/terminate_episode": rng.integers(-1, 2, (steps, 3)).astype(np.int32),
    }


FRACTAL = {
    **_GOOGLE,
    "observation/base_pose_tool_reached": tensor_feature(7),
    "observation/gripper_closed": tensor_feature(1),
}


def fractal(rng: np.random.Generator, steps: int, text: str = "pick coke can") -> Episode:
    """Google's layout: actions in parts, a relative gripper, language among the observations."""
    return {
        **_google(rng, steps, text),
        "observation/base_pose_tool_reached": _normal(rng, steps, 7),
        "observation/gripper_closed": rng.random((steps, 1)).astype(np.float32),
    }


KUKA = {
    **_GOOGLE,
    "observation/clip_function_input/base_pose_tool_reached": tensor_feature(7, encoding="zlib"),
    "observation/gripper_closed": tensor_feature(1, encoding="zlib"),
}


def packed(rows: np.ndarray) -> list[bytes]:
    """zlib-packed f32 rows, as tfds packs a tensor with encoding zlib."""
    return [zlib.compress(np.asarray(row, "<f4").tobytes()) for row in rows]


def kuka(rng: np.random.Generator, steps: int, text: str = "pick anything") -> Episode:
    """Google's layout with zlib-packed proprioception."""
    return {
        **_google(rng, steps, text),
        "observation/clip_function_input/base_pose_tool_reached": packed(_normal(rng, steps, 7)),
        "observation/gripper_closed": packed(rng.random((steps, 1))),
    }


LANGUAGE_TABLE = {
    "observation/rgb": image_feature(36, 64, "png"),
    "observation/effector_translation": tensor_feature(2),
    "observation/instruction": tensor_feature(512, dtype="int32"),
    "action": tensor_feature(2),
}


def language_table(rng: np.random.Generator, steps: int, text: str = "push the star") -> Episode:
    """Two-dimensional actions, PNG images, the instruction as code points cut at 0."""
    points = np.zeros((steps, 512), np.int32)
    points[:, : len(text)] = [ord(c) for c in text]
    return {
        "observation/rgb": random_images(rng, steps, 36, 64, "png"),
        "observation/effector_translation": _normal(rng, steps, 2),
        "observation/instruction": points,
        "action": _normal(rng, steps, 2),
    }
