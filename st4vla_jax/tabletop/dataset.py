"""Writes a tabletop data set: demonstrations as RLDS, grounding records as JSONL with pictures.

python -m st4vla_jax.tabletop.dataset --episodes 2000 --grounding 4000 --generic 8000 --out DIR

  DIR/tabletop/1.0.0           episodes in array_record shards, robot spec "tabletop"
  DIR/grounding/records.jsonl  boxes, points, traces, relations in robot scenes (stage 1, 2)
  DIR/generic/records.jsonl    the same of other shapes, without a robot (stage 0)
  DIR/tokenizer                words and numbers as tokens, see `words`
  DIR/settings.json            what was asked for

Everything follows from the seed.  A run that is cut short continues by the same command: finished
shards and folders are kept; other settings are refused.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from st4vla_jax.data.conversion import Conversion, PlannedShard, run
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tfds_write import episode_features, write_json
from st4vla_jax.data.writer import GroundingWriter
from st4vla_jax.tabletop.environment import Tabletop
from st4vla_jax.tabletop.episodes import (
    MAX_EPISODES,
    METADATA,
    NAME,
    VERSION,
    columns,
    encode,
    successful,
)
from st4vla_jax.tabletop.generic import generic_example
from st4vla_jax.tabletop.grounding import robot_example
from st4vla_jax.tabletop.sampling import SPLITS, splits_of
from st4vla_jax.tabletop.tasks import TASKS
from st4vla_jax.tabletop.words import FOLDER, word_tokenizer

SETTINGS = "settings.json"

_SHARD_EPISODES = 64
_CHUNK = _SHARD_EPISODES // 16  # records that a worker makes at a time: a shard does for 16
_PROGRESS_SECONDS = 5.0
_LOG = logging.getLogger(__name__)

Records = Callable[[Callable[[int], Any], range], Iterator[Any]]


class DatasetError(ValueError):
    """Settings that do not fit each other or what is there already; says what to do."""


def write_dataset(
    out: Path,
    *,
    episodes: int,
    grounding: int = 0,
    generic: int = 0,
    seed: int = 0,
    split: str = "train",
    tasks: Sequence[str] = TASKS,
    image_size: int = 112,
    workers: int = 1,
) -> None:
    """Writes what is not there yet.

    Args:
      out: folder; see the module's docstring.
      episodes: how many demonstrations.
      grounding: how many records of robot scenes.
      generic: how many of other pictures; none of a kind makes no folder for it.
      seed: of everything.
      split: see `sampling.SPLITS`; names the tfds split too.
      tasks: of the demonstrations, in turn, and of the moments that grounding records show.
      image_size: pixels of a picture's side.
      workers: processes that make records; the result does not depend on it.

    Raises:
      DatasetError: settings that make no sense (all of them), or other ones than ``out`` has.
      ConversionError, OSError: as `data.conversion.run`.
    """
    settings = {
        "episodes": episodes, "grounding": grounding, "generic": generic, "seed": seed,
        "split": split, "tasks": list(tasks), "image_size": image_size, "code": _code_digest(),
    }  # fmt: skip
    _check(settings, workers)
    _claim(out, settings)
    word_tokenizer().save(out / FOLDER)
    with _Workers(workers) as records:
        if episodes:
            run(_episodes(settings, records), out / NAME / VERSION, threads=1)
        for name, count, make in (
            ("grounding", grounding, functools.partial(_robot_record, settings)),
            ("generic", generic, functools.partial(_generic_record, settings)),
        ):
            if count:
                _write_grounding(out / name, records(make, range(count)), count)


def _check(settings: dict[str, Any], workers: int) -> None:
    counts = {key: settings[key] for key in ("episodes", "grounding", "generic", "seed")}
    problems = [
        f"--{key} {count}: must not be negative" for key, count in counts.items() if count < 0
    ]
    if settings["episodes"] > MAX_EPISODES:
        problems.append(f"--episodes {settings['episodes']}: at most {MAX_EPISODES} for a seed")
    if not any(settings[key] for key in ("episodes", "grounding", "generic")):
        problems.append("nothing to write: give --episodes, --grounding or --generic")
    if settings["image_size"] < 28:
        problems.append(f"--image_size {settings['image_size']}: at least 28 pixels")
    if workers < 1:
        problems.append(f"--workers {workers}: at least 1")
    if (split := settings["split"]) not in SPLITS:
        problems.append(f"--split {split!r}: there are {', '.join(SPLITS)}")
    if unknown := [task for task in settings["tasks"] if task not in TASKS]:
        problems.append(f"--tasks {', '.join(unknown)}: there are {', '.join(TASKS)}")
    elif split in SPLITS and not _tasks(settings):
        problems.append(f"--split {split}: has no meaning for {', '.join(settings['tasks'])}")
    if problems:
        raise DatasetError("\n  ".join(["settings:", *problems]))


def _tasks(settings: dict[str, Any]) -> list[str]:
    return [task for task in settings["tasks"] if settings["split"] in splits_of(task)]


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Notes the settings, or compares them with those of the run before."""
    path = out / SETTINGS
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise DatasetError(f"{out}: not empty, and no data set of this command; give another")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path}: not readable ({error}); delete {out}") from error
    differ = [
        "code: another version of st4vla_jax.tabletop, which may draw other scenes"
        if key == "code"
        else f"{key}: {there.get(key)} there, {value} asked for"
        for key, value in settings.items()
        if there.get(key) != value
    ]
    if differ:
        problem = f"{out}: made with other settings; give another folder, or delete it"
        raise DatasetError("\n  ".join([problem, *differ]))


def _code_digest() -> str:
    """sha256 of this package: another version of it would draw other scenes."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# --- Workers ------------------------------------------------------------------------------------


class _Workers:
    """Gives a function that makes records in order, in this process or in several."""

    def __init__(self, count: int) -> None:
        # spawn: a fork would copy the locks of array_record's threads.
        self._pool = ProcessPoolExecutor(count, get_context("spawn")) if count > 1 else None

    def __enter__(self) -> Records:
        if self._pool is None:
            return map
        return functools.partial(self._pool.map, chunksize=_CHUNK)

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


# --- Episodes -----------------------------------------------------------------------------------


def _episodes(settings: dict[str, Any], records: Records) -> Conversion:
    tasks = _tasks(settings)
    make = functools.partial(
        _episode_record, settings["seed"], tuple(tasks), settings["split"], settings["image_size"]
    )
    count = settings["episodes"]
    starts = range(0, count, _SHARD_EPISODES)
    spans = [range(start, min(start + _SHARD_EPISODES, count)) for start in starts]
    return Conversion(
        source=Path(NAME),
        sources=(),
        format="rlds",
        name=NAME,
        version=VERSION,
        features=episode_features(columns(settings["image_size"]), METADATA),
        shards=tuple(
            PlannedShard(
                settings["split"], number, len(span), functools.partial(records, make, span)
            )
            for number, span in enumerate(spans)
        ),
        settings=settings,
    )


def _episode_record(
    seed: int, tasks: Sequence[str], split: str, image_size: int, number: int
) -> tuple[bytes, int]:
    """One serialised episode and its number of steps."""
    task = tasks[number % len(tasks)]
    episode = successful(Tabletop(image_size), seed * MAX_EPISODES + number, task, split)
    return encode(episode, image_size)


# --- Grounding ----------------------------------------------------------------------------------

_Record = tuple[bytes, Sequence[Turn], dict[str, Any]]


def _has_lists(settings: dict[str, Any]) -> bool:
    """Lists of everything teach; a test asks for what is named."""
    return settings["split"] == "train"


def _robot_record(settings: dict[str, Any], number: int) -> _Record:
    example = robot_example(
        settings["seed"], number, settings["split"], settings["image_size"],
        tasks=settings["tasks"], lists=_has_lists(settings),
    )  # fmt: skip
    return _png(example.image), example.turns, example.info


def _generic_record(settings: dict[str, Any], number: int) -> _Record:
    example = generic_example(
        settings["seed"], number, settings["image_size"], lists=_has_lists(settings)
    )
    return _png(example.image), example.turns, example.info


def _png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _write_grounding(out: Path, records: Iterator[_Record], count: int) -> None:
    """Writes a folder of records, or finds it finished; it appears when it is complete."""
    if out.exists():
        _LOG.info("%s: already complete", out)
        return
    start = said = time.monotonic()
    with GroundingWriter(out) as writer:
        for image, turns, info in records:
            writer.add([image], turns, **info)
            if (now := time.monotonic()) - said >= _PROGRESS_SECONDS:
                said = now
                rate = writer.records / (now - start)
                _LOG.info("%s: %d of %d records, %.0f/s", out.name, writer.records, count, rate)
    _LOG.info("%s: complete, %d records", out, count)


# --- Command line -------------------------------------------------------------------------------


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.tabletop.dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--episodes", type=int, default=0, help="demonstrations")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train", help=", ".join(SPLITS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="in turn; default: all")
    parser.add_argument("--grounding", type=int, default=0, help="records about robot scenes")
    parser.add_argument("--generic", type=int, default=0, help="records about other pictures")
    parser.add_argument("--image_size", type=int, default=112, help="pixels of a side")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    args = vars(_arguments().parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        write_dataset(args.pop("out"), **args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
