"""``bench data``: the whole path from records to batches, against tf.data, each in its own process.

The set is synthesised: RLDS TFRecord episodes with one 256 x 256 JPEG camera.  This package indexes
it, then decodes, resizes to 224, cuts patches, makes DINOv2's view, tokenises and packs, in true
global order; tf.data decodes and resizes behind a shuffle buffer (bench_tfdata.py), no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAMERA = 256  # pixels a side
CHUNK = 16
PEER_BUFFER, PEER_FRAMES = 256_000, 2_100_000  # OpenVLA's shuffle buffer; steps of Bridge V2

# Samples a second that a 4-chip host needs at 300 and at 130 tokens a sample: FLOPs against 40-45 %
# of the chips' peak, estimated (spec data.md 2.6).
NEEDED = {"v5e": (52, 92), "v5p": (120, 216), "v6e": (216, 380)}


def synthesise(folder: Path, episodes: int, seed: int = 0) -> int:
    """Writes a tfds folder of TFRecord episodes with one camera; returns the number of steps."""
    from st4vla_jax.data.tfds_folder import Column
    from st4vla_jax.data.tfds_write import encode_episode, episode_features
    from st4vla_jax.data.tfrecord import masked_crc32c

    columns = {
        "observation/image": Column("image", (CAMERA, CAMERA, 3), "uint8", "jpeg"),
        "action": Column("tensor", (7,), "float32"),
        "language_instruction": Column("text"),
    }
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(episode_features(columns, {})))
    rng, total, shards = np.random.default_rng(seed), 0, 4
    lengths = []
    for number in range(shards):
        own = range(number * episodes // shards, (number + 1) * episodes // shards)
        name = f"bench-train.tfrecord-{number:05d}-of-{shards:05d}"
        with (folder / name).open("wb") as file:
            for episode in own:
                count = int(rng.integers(28, 49))
                steps = {
                    "observation/image": _pictures(rng, count),
                    "action": rng.normal(0, 0.01, (count, 7)).astype(np.float32),
                    "language_instruction": f"put the block {episode} into the drawer",
                }
                record = encode_episode(columns, steps, {}, {})
                head = struct.pack("<Q", len(record))
                for part in (head, record):
                    file.write(part + struct.pack("<I", masked_crc32c(part)))
                total += count
        lengths.append(str(len(own)))
    info = {
        "name": "bench", "version": "1.0.0", "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": lengths}],
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return total


def _pictures(rng: np.random.Generator, count: int) -> list[bytes]:
    """JPEGs of about 20 KB: a camera that pans over one scene."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    scene = np.asarray(coarse.resize((384, 384), Image.Resampling.BICUBIC), np.int16)
    scene = np.clip(scene + rng.normal(0, 5, scene.shape), 0, 255).astype(np.uint8)
    pictures = []
    for step in range(count):
        file = io.BytesIO()
        Image.fromarray(scene[step : step + CAMERA, step : step + CAMERA]).save(
            file, "JPEG", quality=95
        )
        pictures.append(file.getvalue())
    return pictures


def ours(folder: Path, batch: int, steps: int, warm: int, threads: int) -> dict[str, Any]:
    """Measures this package; the first call on a folder also builds its index."""
    from st4vla_jax.data.pipeline import DataSet, Pipeline
    from st4vla_jax.data.rlds import RldsSource
    from st4vla_jax.data.robot_spec import Part, RobotSpec
    from st4vla_jax.data.schedule import ScheduleConfig
    from st4vla_jax.data.settings import DataSettings, SetSettings, make_encoders

    start = time.perf_counter()
    spec = RobotSpec(
        "bench", "bench", {"primary": "observation/image"}, "language_instruction",
        (Part("action", (0, 6)), Part("action", (6, None), ops=("binarize",))),
    )  # fmt: skip
    source = RldsSource(folder, spec, chunk=CHUNK)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    settings = DataSettings((SetSettings("bench", "rlds", str(folder)),), threads=threads)
    encoders = make_encoders(settings, [source])
    config = ScheduleConfig(robot_samples=batch, grounding_samples=0)
    pipeline = Pipeline([DataSet(source, encoders[0])], config, threads=threads)
    batches = pipeline.batches()
    next(batches)
    first = time.perf_counter() - start
    for _ in range(warm):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    count = steps * batch
    return {
        "open_s": opened,
        "first_batch_s": first,
        "samples_s": count / wall,
        "cpu_ms": 1000 * cpu / count,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def data(args: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides, one process each, and returns what they printed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bench/1.0.0"
        frames = synthesise(folder, args.episodes)
        buffer = max(1, round(frames * PEER_BUFFER / PEER_FRAMES))
        numbers = [str(n) for n in (CHUNK, args.batch, buffer, args.steps, args.warm)]
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg()[0],
            "frames": frames,
            "batch": args.batch,
            "shuffle_buffer": buffer,
        }
        own = [sys.executable, "-m", "st4vla_jax.bench", "data", "--folder", str(folder)]
        own += ["--batch", str(args.batch), "--steps", str(args.steps), "--warm", str(args.warm)]
        own += ["--threads", str(args.threads)]
        result["index"] = _last_line(own)  # builds the index; the next process finds it
        result["ours"] = _last_line(own)
        script = Path(__file__).with_name("bench_tfdata.py")
        if has_tensorflow(args.tf_python):
            result["tf.data"] = _last_line([args.tf_python, str(script), str(folder), *numbers])
        return result


def has_tensorflow(python: str) -> bool:
    """Whether an interpreter has tensorflow; it is not imported."""
    if python == sys.executable:
        return importlib.util.find_spec("tensorflow") is not None
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('tensorflow') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _last_line(command: list[str]) -> dict[str, Any]:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def report(result: dict[str, Any]) -> list[str]:
    """The lines that the command prints."""
    lines = [
        f"{result['frames']} steps with one {CAMERA} px JPEG camera, batches of "
        f"{result['batch']}; {result['machine']}, load average {result['load_average']:.2f}",
        f"index built and opened in {result['index']['open_s']:.2f} s, opened again in "
        f"{result['ours']['open_s']:.2f} s",
        f"{'':12}{'samples/s':>11}{'CPU-ms/sample':>15}{'peak MiB':>10}{'first batch s':>15}",
    ]
    for name in ("ours", "tf.data"):
        if (row := result.get(name)) is None:
            lines.append("tf.data     not measured: no tensorflow (pip install st4vla_jax[bench])")
            continue
        lines.append(
            f"{name:12}{row['samples_s']:>11.0f}{row['cpu_ms']:>15.2f}{row['peak_mib']:>10.0f}"
            f"{row['first_batch_s']:>15.2f}"
        )
    lines.append(
        f"ours is a global shuffle; tf.data's buffer holds {result['shuffle_buffer']} steps, "
        f"{PEER_BUFFER:,} scaled to this set"
    )
    needs = ", ".join(f"{chip} {low}-{high}" for chip, (low, high) in NEEDED.items())
    return [*lines, f"samples/s that a host of 4 chips needs (estimated): {needs}"]


def register(commands: Any) -> None:
    """Adds ``data`` to the command line of bench."""
    sub = commands.add_parser("data", help="records to batches, against tf.data")
    sub.add_argument("--episodes", type=int, default=200)
    sub.add_argument("--batch", type=int, default=64)
    sub.add_argument("--steps", type=int, default=40)
    sub.add_argument("--warm", type=int, default=5, help="batches before the clock starts")
    sub.add_argument("--threads", type=int, default=os.cpu_count())
    sub.add_argument("--tf-python", default=sys.executable, help="interpreter with tensorflow")
    sub.add_argument("--folder", type=Path, help="measure this package alone on such a folder")
    sub.add_argument("--json", type=Path, help="also write the result here")
    sub.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """What the command does."""
    if args.folder is not None:
        print(json.dumps(ours(args.folder, args.batch, args.steps, args.warm, args.threads)))
        return
    result = data(args)
    print("\n".join(report(result)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
