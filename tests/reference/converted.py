"""Runs conversions and reads what they wrote, by tfds and array_record alone."""

import io
import json
import sys

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from st4vla_jax.data.convert import main


def convert(source, out, *more):
    main(["--from", str(source), "--out", str(out), *map(str, more)])
    return out


def manifest(out):
    return json.loads((out / "conversion.json").read_text())


def records(out, split="train"):
    found = []
    for path in sorted(out.glob(f"*-{split}.array_record*")):
        reader = ArrayRecordReader(str(path))
        found += [reader.read([i])[0] for i in range(reader.num_records())]
    return found


def episodes_by_tfds(out, split="train"):
    import tensorflow_datasets as tfds

    assert "tensorflow" not in sys.modules
    source = tfds.builder_from_directory(str(out)).as_data_source()[split]
    return [[dict(step) for step in episode["steps"]] for episode in source]


def jpeg(pixels):
    """The re-encoded image, decoded."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return np.asarray(Image.open(io.BytesIO(out.getvalue())))
