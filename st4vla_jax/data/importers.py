"""Published grounding sets, each written once as JSONL for `data.grounding.GroundingSource`.

python -m st4vla_jax.data.importers refcoco REFS.p INSTANCES.json --split train --out OUT.jsonl
python -m st4vla_jax.data.importers roborefit FOLDER --split train --out OUT.jsonl
python -m st4vla_jax.data.importers where2place FOLDER --out OUT.jsonl
python -m st4vla_jax.data.importers a0 FOLDER --units pixels --out OUT.jsonl

RoboPoint's own training file is LLaVA JSON: ``GroundingSource(..., coordinates="fraction")``.
Layouts: spec data.md section 6.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st4vla_jax.data.answers import answer_text
from st4vla_jax.data.prompts import IMAGE
from st4vla_jax.data.safe_pickle import load
from st4vla_jax.data.source_files import SourceError

BOX_QUESTION = "Locate {} and output its bounding box in JSON format."
POINT_QUESTION = "{} Output the points in JSON format."
TRACE_QUESTION = (
    "Your task is {}. Output the trajectory of the contact point as points in JSON format."
)


def refcoco(refs: Path, instances: Path, split: str) -> Iterator[dict[str, Any]]:
    """RefCOCO, RefCOCO+ or RefCOCOg: one record a sentence.

    Args:
      refs: ``refs(unc).p``, ``refs(google).p`` or ``refs(umd).p``; a pickle, read as plain data.
      instances: ``instances.json`` with the boxes [x, y, width, height] and file names.
      split: train, val, test, testA, testB.

    Raises:
      SourceError: another form of file, or a split that is not there.
      UnsafePickleError: the pickle asks for code.
    """
    entries = load(refs.read_bytes(), str(refs))
    try:
        tree = json.loads(instances.read_text(encoding="utf-8"))
        boxes = {entry["id"]: entry["bbox"] for entry in tree["annotations"]}
        images = {entry["id"]: entry["file_name"] for entry in tree["images"]}
        del tree
        if split not in (splits := sorted({entry["split"] for entry in entries})):
            raise SourceError(f"{refs}: no split {split!r}; there are {', '.join(splits)}")
        for entry in entries:
            if entry["split"] == split:
                x, y, width, height = boxes[entry["ann_id"]]
                for sentence in entry["sentences"]:
                    text = sentence["sent"]
                    region = _region("box", [[x, y], [x + width, y + height]], text)
                    image = images[entry["image_id"]]
                    yield _record(image, BOX_QUESTION.format(f'"{text}"'), [region])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, SourceError):
            raise
        raise SourceError(f"{refs} and {instances}: not in REFER's form ({e!r})") from e


def roborefit(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """RoboRefIt's ``final_dataset`` folder: one record an expression; images relative to it.

    Args:
      folder: holds ``{split}/roborefit_{split}.json``.
      split: train, testA or testB.

    Raises:
      SourceError: another form of file.
    """
    path = folder / split / f"roborefit_{split}.json"
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            x1, y1, x2, y2 = entry["bbox"]
            region = _region("box", [[x1, y1], [x2, y2]], entry["text"])
            image = entry["rgb_path"].replace("\\", "/")
            yield _record(
                _inside(image, folder, split), BOX_QUESTION.format(f'"{entry["text"]}"'), [region]
            )
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as e:
        raise SourceError(f"{path}: not in RoboRefIt's form ({e!r})") from e


def where2place(folder: Path) -> Iterator[dict[str, Any]]:
    """Where2Place: one record a question, answered by a point inside its mask.

    The mask's path is kept as ``mask``: the benchmark scores the share of points inside it.

    Args:
      folder: holds ``point_questions.jsonl``, ``images/`` and ``masks/NN.jpg``.

    Raises:
      SourceError: another form of file, an empty mask.
    """
    path = folder / "point_questions.jsonl"
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            image = Path(entry["image"])
            mask = Path("masks") / f"{image.stem}.jpg"
            question = entry["text"].partition("Your answer should be formatted")[0].strip()
            region = _region("point", [_point_inside(folder / mask)])
            record = _record(f"images/{image.name}", POINT_QUESTION.format(question), [region])
            yield record | {"mask": str(mask)}
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as e:
        if isinstance(e, SourceError):
            raise
        raise SourceError(f"{path}: not in Where2Place's form ({e!r})") from e


def a0(
    folder: Path, units: str, *, points: int = 5, stride: int = 4, every: int = 5
) -> Iterator[dict[str, Any]]:
    """A0's episodes: the next way-points of the contact point, for every few frames.

    As A0's loader: ``points`` way-points at a fixed stride from the frame, the last one repeated
    past the episode's end (here left out, since an answer may be shorter).

    Args:
      folder: holds one JSON an episode, at any depth; images relative to it.
      units: "pixels" or "fraction" of the image; the files do not say which.
      points: way-points of an answer.
      stride: frames between them.
      every: frames between records.

    Raises:
      SourceError: another form of file.
    """
    if units not in ("pixels", "fraction"):
        raise ValueError(f"units {units!r}: expected pixels or fraction")
    for path in sorted(folder.rglob("*.json")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            about = tree["metadata"]
            if not about.get("is_valid", True):
                continue
            way, images = tree["waypoints2d"], tree["cam_highs"]
            span = about.get("validRange") or {}
            texts = about["instructions"]
            texts = [texts] if isinstance(texts, str) else texts
            stop = min(span.get("end", len(way)), len(way), len(images))
            for number, start in enumerate(range(span.get("start", 0), stop - 1, every)):
                trace = np.array(way[start : min(stop, start + points * stride) : stride], float)
                image = _inside(images[start].replace("\\", "/"), folder, path.parent)
                if units == "fraction":
                    with Image.open(folder / image) as header:
                        trace = trace * header.size
                region = _region("trajectory", trace.tolist())
                question = TRACE_QUESTION.format(texts[number % len(texts)])
                yield _record(image, question, [region])
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
            raise SourceError(f"{path}: not in A0's form ({e!r})") from e


def write_jsonl(records: Iterator[dict[str, Any]], out: Path) -> int:
    """Writes records as lines; the file appears when it is complete.

    Returns:
      how many.

    Raises:
      SourceError: there are none.
    """
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(work, "w", encoding="utf-8") as lines:
            for record in records:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise SourceError(f"{out}: there is nothing to write; is this the right folder?")
        work.rename(out)
    finally:
        work.unlink(missing_ok=True)
    return count


def _record(image: str, question: str, regions: list[dict[str, Any]]) -> dict[str, Any]:
    answer = {"from": "gpt", "value": answer_text(len(regions)), "regions": regions}
    question = f"{IMAGE}{question}"
    return {"image": image, "conversations": [{"from": "human", "value": question}, answer]}


def _region(kind: str, coordinates: list[list[float]], label: str = "") -> dict[str, Any]:
    return {"kind": kind, "coordinates": coordinates, "image": 0, "label": label}


def _inside(image: str, folder: Path, place: Path | str) -> str:
    """The image's path relative to ``folder``: as it stands, or from ``place`` within it."""
    if (folder / image).exists() or not (folder / place / image).exists():
        return image
    return (folder / place / image).relative_to(folder).as_posix()


def _point_inside(mask: Path) -> list[float]:
    """The pixel of a mask that is nearest to the middle of all of them."""
    with Image.open(mask) as image:
        rows, cols = np.nonzero(np.asarray(image.convert("L")) > 127)
    if not len(rows):
        raise SourceError(f"{mask}: the mask is empty")
    nearest = np.argmin((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2)
    return [float(cols[nearest]), float(rows[nearest])]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m st4vla_jax.data.importers")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("refcoco", "roborefit", "where2place", "a0"):
        sub = kinds.add_parser(kind)
        sub.add_argument("path", type=Path, help="the folder; for refcoco refs(*).p")
        sub.add_argument("--out", type=Path, required=True, help="JSONL to write")
        if kind == "refcoco":
            sub.add_argument("instances", type=Path)
        if kind in ("refcoco", "roborefit"):
            sub.add_argument("--split", default="train")
        if kind == "a0":
            sub.add_argument("--units", choices=("pixels", "fraction"), required=True)
    args = parser.parse_args(argv)
    records = {
        "refcoco": lambda: refcoco(args.path, args.instances, args.split),
        "roborefit": lambda: roborefit(args.path, args.split),
        "where2place": lambda: where2place(args.path),
        "a0": lambda: a0(args.path, args.units),
    }[args.kind]()
    print(f"{args.out}: {write_jsonl(records, args.out)} records")


if __name__ == "__main__":
    main()
