"""``bench data``: the whole path from records to batches, against tf.data, each in its own process.

The set is synthesised: RLDS TFRecord episodes with one 256 x 256 JPEG camera.  This package indexes
it, then decodes, resizes to 224, cuts patches, makes DINOv2's view, tokenises and packs, in true
global order; tf.data decodes and resizes behind a shuffle buffer (bench_tfdata.py), no more.  Two
sizes of that buffer tell what a frame in it takes, and so what a buffer of real size would.
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
BUFFERS = (1_000, 9_000)  # steps of the two shuffle buffers that are measured
# Bytes of a step in memory at most, while a schedule is built: measured on Schedule alone, at 2.1
# million steps (74 at 4.2 million).
IN_MEMORY = 89

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
    """Measures all sides in turn, one process each time, and returns what they printed.

    Each side's best round counts: what else runs on a machine only ever slows it down.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bench/1.0.0"
        frames = synthesise(folder, args.episodes)
        again = Path(scratch) / "array/bench/1.0.0"
        as_array_record(folder, again)
        counts = ["--batch", str(args.batch), "--steps", str(args.steps), "--warm", str(args.warm)]
        counts += ["--threads", str(args.threads)]
        own = [sys.executable, "-m", "st4vla_jax.bench", "data", *counts, "--folder"]
        commands = {"ours": [*own, str(folder)], "array_record": [*own, str(again)]}
        if has_tensorflow(args.tf_python):
            script = [args.tf_python, str(Path(__file__).with_name("bench_tfdata.py")), str(folder)]
            for buffer in BUFFERS:
                numbers = (CHUNK, args.batch, buffer, args.steps, args.warm)
                commands[f"tf.data {buffer}"] = [*script, *map(str, numbers)]
        result: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg()[0],
            "frames": frames,
            "batch": args.batch,
            "rounds": args.rounds,
            # The first process on a folder builds its index; later ones find it.
            "index": _last_line(commands["ours"]),
        }
        result["index_bytes"] = sum(
            path.stat().st_size for path in (folder / ".st4vla_index").rglob("*.npy")
        )
        rounds = []
        for number in range(args.rounds):
            rounds.append({})
            for name, command in commands.items():
                rounds[-1][name] = _last_line(command)
                print(f"round {number + 1} of {args.rounds}: {name} done", file=sys.stderr)
        for name in commands:
            result[name] = _best([each[name] for each in rounds])
        result["fit"] = fitted(result)
        return result


def as_array_record(folder: Path, out: Path) -> None:
    """The same episodes as array_record shards, record by record, as data.convert writes them."""
    from st4vla_jax.data import convert

    convert.main(["--from", str(folder), "--out", str(out)])


def _best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Most samples a second; least of everything else, but for memory its most."""
    choose = {"samples_s": max, "peak_mib": max, "version": max}
    return {key: choose.get(key, min)(each[key] for each in rounds) for key in rounds[0]}


def fitted(result: dict[str, Any]) -> dict[str, float]:
    """Memory at a peer's real size, by what a frame takes here (MiB).

    tf.data's grows with its buffer: a line through two buffers, read at PEER_BUFFER steps.  Ours
    grows with the data set: length tables and the schedule's order in memory, and the index, which
    is mapped, so that its pages are the kernel's to drop, all counted for PEER_FRAMES steps.
    """
    index = result["index_bytes"] / result["frames"]
    frame = index + IN_MEMORY
    found = {
        "ours": result["ours"]["peak_mib"] + frame * (PEER_FRAMES - result["frames"]) / 2**20,
        "ours_bytes_a_frame": frame,
    }
    peers = [result.get(f"tf.data {buffer}") for buffer in BUFFERS]
    if all(peers):
        low, high = (peer["peak_mib"] for peer in peers)
        slope = (high - low) / (BUFFERS[1] - BUFFERS[0])
        found["tf.data"] = low + slope * (PEER_BUFFER - BUFFERS[0])
        found["tf.data_bytes_a_frame"] = slope * 2**20
    return found


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
        f"best of {result['rounds']} rounds, all in turn; index built and opened in "
        f"{result['index']['open_s']:.2f} s, opened again in {result['ours']['open_s']:.2f} s",
        f"{'':22}{'samples/s':>11}{'CPU-ms/sample':>15}{'peak MiB':>10}{'first batch s':>15}",
    ]
    names = {"ours": "ours", "array_record": "ours, array_record"}
    names |= {f"tf.data {n}": f"tf.data, buffer {n}" for n in BUFFERS}
    for key, name in names.items():
        if (row := result.get(key)) is not None:
            lines.append(
                f"{name:22}{row['samples_s']:>11.0f}{row['cpu_ms']:>15.2f}{row['peak_mib']:>10.0f}"
                f"{row['first_batch_s']:>15.2f}"
            )
    fit = result["fit"]
    lines.append(
        f"memory at {PEER_FRAMES:,} steps, fitted: ours {fit['ours']:.0f} MiB (global shuffle; "
        f"{fit['ours_bytes_a_frame']:.0f} bytes a step, index included)"
    )
    if "tf.data" in fit:
        lines[-1] += (
            f", tf.data with a buffer of {PEER_BUFFER:,} steps {fit['tf.data']:.0f} MiB "
            f"({fit['tf.data_bytes_a_frame'] / 1000:.1f} kB a step): "
            f"{fit['ours'] / fit['tf.data']:.1%}"
        )
    else:
        lines.append("tf.data     not measured: no tensorflow (pip install st4vla_jax[bench])")
    needs = ", ".join(f"{chip} {low}-{high}" for chip, (low, high) in NEEDED.items())
    return [*lines, f"samples/s that a host of 4 chips needs (estimated): {needs}"]


def register(commands: Any) -> None:
    """Adds ``data`` to the command line of bench."""
    sub = commands.add_parser("data", help="records to batches, against tf.data")
    sub.add_argument("--episodes", type=int, default=200)
    sub.add_argument("--batch", type=int, default=64)
    sub.add_argument("--steps", type=int, default=40)
    sub.add_argument("--warm", type=int, default=5, help="batches before the clock starts")
    sub.add_argument("--rounds", type=int, default=2, help="times that each side is measured")
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
