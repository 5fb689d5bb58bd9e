"""Brings data sets of other formats to array_record shards that tfds and this package read.

python -m st4vla_jax.data.convert --from bridge/1.0.0 --out array/bridge/1.0.0
python -m st4vla_jax.data.convert --from LEROBOT --spec my_robot.json --out my_robot/1.0.0
python -m st4vla_jax.data.convert --from libero_spatial --out libero_spatial/1.0.0
python -m st4vla_jax.data.convert --from refcoco.jsonl --image_root train2014 --out refcoco/1.0.0

RLDS in TFRecord shards (records copied byte for byte), LeRobot v2 and v3 folders (frames become
JPEG of quality 95), HDF5 demonstrations of LIBERO and robomimic, LLaVA JSON and JSONL.  Training
reads RLDS, LeRobot and JSONL as they are: converting is for other tools, and for file systems.

A run that is cut short continues by the same command.  OUT appears when all is written and every
record counted; its conversion.json lists sources and shards with sizes and sha256.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from st4vla_jax.data.conversion import MANIFEST, Conversion, ConversionError, run
from st4vla_jax.data.oxe import robot_spec
from st4vla_jax.data.robot_spec import nearest

FORMATS = ("rlds", "lerobot", "hdf5", "grounding")

_HDF5 = (".hdf5", ".h5")
_JSON = (".json", ".jsonl")
_NAME = re.compile(r"[A-Za-z]\w*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def detect_format(path: Path) -> str:
    """One of FORMATS, by the files at ``path``.

    Raises:
      ConversionError: nothing there that is known.
    """
    if not path.exists():
        raise ConversionError(f"{path}: no such file or folder")
    if path.suffix in _HDF5:
        return "hdf5"
    if path.suffix in _JSON or (path / MANIFEST).exists():
        return "grounding"
    if (path / "meta/info.json").exists():
        return "lerobot"
    if (path / "features.json").exists() or any(path.glob("*/features.json")):
        return "rlds"
    if path.is_dir() and any(p.suffix in _HDF5 for p in path.iterdir()):
        return "hdf5"
    raise ConversionError(
        f"{path}: neither RLDS (features.json), LeRobot (meta/info.json), HDF5 nor JSON; "
        f"give --format, one of {', '.join(FORMATS)}"
    )


def check_settings(make: Callable[..., Any], settings: Mapping[str, Any], what: str) -> None:
    """Raises ConversionError if ``make`` has no such settings; names the first and the nearest."""
    known = [
        p.name for p in inspect.signature(make).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    if unknown := [name for name in settings if name not in known]:
        near = nearest(unknown[0], known)
        raise ConversionError(f"--{unknown[0]}: {what} has no such setting{near}")


def _planner(file_format: str) -> Callable[..., Conversion]:
    # Imported here: each needs its own extra, and only the one that is asked for.
    if file_format == "rlds":
        from st4vla_jax.data.convert_rlds import rlds_conversion as make
    elif file_format == "lerobot":
        from st4vla_jax.data.convert_lerobot import lerobot_conversion as make
    elif file_format == "hdf5":
        from st4vla_jax.data.convert_hdf5 import hdf5_conversion as make
    else:
        from st4vla_jax.data.convert_grounding import grounding_conversion as make
    return make


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="what to convert")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, NAME/VERSION")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto")
    parser.add_argument("--name", help="of the data set; default: the source's")
    parser.add_argument("--threads", type=int, default=2, help="shards written at a time")
    parser.add_argument("--shard_records", type=int, help="episodes (32) or records of a shard")
    lerobot = parser.add_argument_group("lerobot")
    lerobot.add_argument("--spec", help="RobotSpec (JSON) of the folder; selects features")
    lerobot.add_argument("--images", nargs="+", help="video features; default: all")
    lerobot.add_argument("--columns", nargs="+", help="features of numbers; default: all")
    lerobot.add_argument("--episodes", nargs="+", type=int, help="numbers; default: all")
    hdf5 = parser.add_argument_group("hdf5")
    hdf5.add_argument("--instruction", help="of every episode, where files do not tell it")
    hdf5.add_argument(
        "--rotate180", action=argparse.BooleanOptionalAction, help="default: LIBERO's images only"
    )
    hdf5.add_argument("--float32", action="store_true", help="store f64 columns as f32")
    grounding = parser.add_argument_group("grounding")
    grounding.add_argument("--image_root", type=Path, help="default: the file's folder")
    grounding.add_argument("--coordinates", help="frame of numbers in texts, as GroundingSource's")
    grounding.add_argument("--to", choices=("array_record", "jsonl"), default="array_record")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    args = vars(_arguments().parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    source, out, to = args.pop("source"), args.pop("out"), args.pop("to")
    name, file_format, threads = args.pop("name", None), args.pop("format"), args.pop("threads")
    try:
        if file_format == "auto":
            file_format = detect_format(source)
        if to == "jsonl":
            from st4vla_jax.data.convert_grounding import write_jsonl

            check_settings(write_jsonl, args, "JSONL")
            print(f"{out}: {write_jsonl(source, out, **args)} records")
            return
        if "spec" in args:
            args["spec"] = robot_spec(args["spec"])
        make = _planner(file_format)
        check_settings(make, args, file_format)
        run(_named(make(source, **args), name, out), out, threads)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _named(conversion: Conversion, name: str | None, out: Path) -> Conversion:
    """The conversion under a name that tfds takes, and the version that ``out`` is named after."""
    if name is not None and not _NAME.fullmatch(name):
        raise ConversionError(f"--name {name!r}: a letter, then letters, digits and _")
    name = name or re.sub(r"\W", "_", conversion.name)
    version = out.name if _VERSION.fullmatch(out.name) else conversion.version
    return dataclasses.replace(conversion, name=name, version=version)


if __name__ == "__main__":
    main()
