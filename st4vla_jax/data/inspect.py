"""Says what a data folder or file is, whether it is understood, and what looks wrong with it.

python -m st4vla_jax.data.inspect PATH [PATH ...] [--spec NAME_OR_JSON] [--sheet OUT.png]

PATH is a tfds-format (RLDS) folder, a LeRobot folder, or a JSON / JSONL file of grounding records.
Several robot paths are searched for the same episodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from st4vla_jax.data import findings
from st4vla_jax.data.episode_table import Filters
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.oxe import SPECS, robot_spec
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode
from st4vla_jax.data.sheet import Cell, Strip, contact_sheet
from st4vla_jax.data.source import Sample
from st4vla_jax.data.source_files import SourceError
from st4vla_jax.data.stats import accumulate
from st4vla_jax.data.tfds_folder import ALL_SPLITS, TfdsFolder, read_folder

if TYPE_CHECKING:
    from st4vla_jax.data.lerobot import LeRobotSource

MANY = 10**9  # bad records are reported here, never a reason to stop
_EPISODES, _STEPS, _RECORDS = 4, 6, 24  # shown on a sheet
_LOOKED_AT = 16  # images of a camera


@dataclasses.dataclass
class Report:
    """What is known about one path.

    Attributes:
      facts: lines; findings: what looks wrong; strips: rows of the contact sheet.
      episodes: (split, hash of content) of each episode.
    """

    facts: list[str]
    findings: list[str] = dataclasses.field(default_factory=list)
    strips: list[Strip] = dataclasses.field(default_factory=list)
    episodes: list[tuple[str, int]] = dataclasses.field(default_factory=list)


def kind_of(path: Path) -> str:
    """One of "rlds", "lerobot" and "grounding".

    Raises:
      SourceError: none of them; says what was looked for.
    """
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        return "grounding"
    if (path / "meta/info.json").is_file():
        return "lerobot"
    if (path / "features.json").is_file() or list(path.glob("*/features.json")):
        return "rlds"
    raise SourceError(
        f"{path}: no data set that is known: no features.json (RLDS), no meta/info.json (LeRobot), "
        "and not a .json or .jsonl file (grounding)"
    )


# --- Robot data ---------------------------------------------------------------------------------


def inspect_rlds(path: Path, spec_name: str | None, index_dir: Path | None) -> Report:
    """A tfds-format folder; without a spec only what its files declare."""
    folder = read_folder(path)
    report = Report([f"{path}: RLDS, tfds format", *_declared(folder)])
    spec = _find_spec(folder, spec_name)
    if spec is None:
        report.facts.append(
            "no robot spec of that name: give --spec NAME or a .json (data/robot_spec.py) to see "
            f"actions, statistics and findings; registered are {', '.join(sorted(SPECS))}"
        )
        return report
    cameras = [name for name, column in folder.columns.items() if column.kind == "image"]
    spec = dataclasses.replace(spec, images={name: name for name in cameras}, swap=())
    source = RldsSource(
        path, spec, ALL_SPLITS, chunk=1, views=cameras, index_dir=index_dir,
        filters=Filters(empty_language=False), max_bad_records=MANY,
    )  # fmt: skip
    report.facts.append(f"left out: {_counts(source.left_out())}")
    _describe_robot(report, source, spec, cameras, measured_hz=None)
    report.episodes = source.episode_contents()
    return report


def inspect_lerobot(path: Path, spec_name: str | None, index_dir: Path | None) -> Report:
    """A LeRobot folder; without a spec only what its files declare."""
    from st4vla_jax.data.lerobot import LeRobotSource
    from st4vla_jax.data.lerobot_folder import LeRobotFolder

    folder = LeRobotFolder(path)
    steps = sum(episode.rows[1] - episode.rows[0] for episode in folder.episodes)
    report = Report([
        f"{path}: LeRobot {folder.version}, {len(folder.episodes)} episodes, {steps} steps, "
        f"{folder.fps:g} Hz, {len(folder.tasks)} tasks",
        *(f"  {name}: {f.get('dtype')} {f.get('shape')}" for name, f in folder.features.items()),
    ])  # fmt: skip
    missing = {
        feature: sorted(
            {
                str(episode.videos[feature].path)
                for episode in folder.episodes
                if not episode.videos[feature].path.is_file()
            }
        )
        for feature in folder.videos
    }
    report.findings += [f"missing video {path}" for paths in missing.values() for path in paths]
    if spec_name is None:
        report.facts.append("give --spec (a .json, data/robot_spec.py) to see actions and findings")
        return report
    spec = robot_spec(spec_name)
    views = [view for view, feature in spec.images.items() if not missing.get(feature)]
    if not views:
        report.facts.append("no camera of the spec has all its videos: samples cannot be shown")
        return report
    source = LeRobotSource(
        path, spec, chunk=1, views=views, max_bad_records=MANY, index_dir=index_dir
    )
    report.facts.append(f"left out: {_counts(source.left_out)}")
    _describe_robot(report, source, spec, views, measured_hz=folder.fps)
    report.episodes = [("all", int(content)) for content in source.contents()]
    return report


def _declared(folder: TfdsFolder) -> list[str]:
    splits = [
        f"  split {name}: {len(shards)} shards, "
        f"{sum(s.records or 0 for s in shards) or 'unknown'} episodes"
        for name, shards in sorted(folder.splits.items())
    ]
    columns = [
        f"  {path}: {c.kind} {'x'.join(map(str, c.shape)) or 'scalar'} {c.dtype}"
        for path, c in sorted(folder.columns.items())
    ]
    return splits + columns


def _find_spec(folder: TfdsFolder, name: str | None) -> RobotSpec | None:
    """The spec asked for, or the one registered under the folder's (data set's) name."""
    if name is not None:
        return robot_spec(name)
    # Bridge's own release is called bridge_dataset; its layout is bridge_orig's.
    aliases = {"bridge_dataset": "bridge_orig"}
    found = (aliases.get(part, part) for part in reversed(folder.root.parts))
    return next((SPECS[part] for part in found if part in SPECS), None)


def _describe_robot(
    report: Report,
    source: RldsSource | LeRobotSource,
    spec: RobotSpec,
    cameras: Sequence[str],
    measured_hz: float | None,
) -> None:
    episodes = list(source.standard_episodes())
    lengths = np.array([len(episode.actions) for episode in episodes])
    report.facts += [
        f"spec {spec.name}: embodiment {spec.embodiment}, {spec.control_hz:g} Hz, "
        f"{len(spec.names)} action dimensions",
        f"{len(episodes)} episodes of {lengths.min()} to {lengths.max()} steps, {lengths.sum()} in "
        f"all, {len(source)} samples",
    ]
    report.facts += _statistics(spec, episodes)
    report.findings += findings.gripper_findings(spec, episodes)
    report.findings += findings.motion_findings(spec, episodes)
    report.findings += findings.rate_findings(spec, measured_hz)
    chosen = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int))
    looked_at = [source[int(i)] for i in chosen]
    views = {name: [s.images[i] for s in looked_at] for i, name in enumerate(cameras)}
    report.findings += findings.camera_findings(views)
    for name, images in views.items():
        sizes = Counter("x".join(map(str, image.shape[:2])) for image in images)
        report.facts.append(f"  camera {name}: {_counts(sizes)} pixels")
    instructions = Counter(sample.turns[0].text for sample in looked_at)
    report.facts.append("instructions: " + "; ".join(map(repr, list(instructions)[:5])))
    report.strips += _episode_strips(source, spec, episodes, cameras, views)


def _statistics(spec: RobotSpec, episodes: Sequence[StandardEpisode]) -> list[str]:
    action = accumulate(spec, episodes).result().action
    head = f"  {'action':<12}{'q01':>10}{'mean':>10}{'q99':>10}{'std':>10}"
    rows = [
        f"  {name:<12}{action.q01[i]:>10.4f}{action.mean[i]:>10.4f}{action.q99[i]:>10.4f}"
        f"{action.std[i]:>10.4f}"
        for i, name in enumerate(spec.names)
    ]
    return [head, *rows]


def _episode_strips(source, spec, episodes, cameras, views) -> list[Strip]:
    """A few episodes, evenly spread: frames of the first camera that shows something."""
    lit = [name for name in cameras if not findings.camera_findings({name: views[name]})]
    camera = cameras.index(lit[0]) if lit else 0
    owner = source.episodes()
    strips = []
    for number in np.unique(np.linspace(0, len(episodes) - 1, _EPISODES).astype(int)):
        rows = np.flatnonzero(owner == np.unique(owner)[number])
        shown = rows[np.unique(np.linspace(0, len(rows) - 1, _STEPS).astype(int))]
        samples: list[Sample] = [source[int(row)] for row in shown]
        cells = [Cell(s.images[camera], s.record.rpartition(" ")[2]) for s in samples]
        title = f"{samples[0].record}: {samples[0].turns[0].text}"
        strips.append(Strip(title, tuple(cells), episodes[number].actions, spec.names))
    return strips


# --- Grounding data -----------------------------------------------------------------------------


def inspect_grounding(
    path: Path, images: Path | None, coordinates: str, index_dir: Path | None
) -> Report:
    """A JSON or JSONL file of records."""
    source = GroundingSource(
        path, name=path.stem, images=images, coordinates=coordinates, max_bad_records=MANY,
        index_dir=index_dir,
    )  # fmt: skip
    sizes = Counter(
        "x".join(map(str, size)) for i in range(len(source)) for size in source.image_sizes(i)
    )
    report = Report([
        f"{path}: grounding records (LLaVA form), {len(source)} of them usable",
        f"  images (height x width): {_counts(dict(sizes.most_common(5)))}",
        f"  answers: {', '.join(source.groups)}",
    ])  # fmt: skip
    report.findings += source.bad
    chosen = np.unique(np.linspace(0, len(source) - 1, _RECORDS).astype(int))
    cells = []
    for i in chosen:
        sample = source[int(i)]
        if not sample.images:
            continue
        regions = tuple(r for turn in sample.turns for r in turn.regions if r.image == 0)
        question = sample.turns[0].text.replace("<image>", "").strip()
        cells.append(Cell(sample.images[0], question, regions))
    for start in range(0, len(cells), _STEPS):
        report.strips.append(Strip(f"{path.name}", tuple(cells[start : start + _STEPS])))
    return report


# --- Command line -------------------------------------------------------------------------------


def _counts(counts: dict) -> str:
    return ", ".join(f"{key}: {value}" for key, value in counts.items()) or "nothing"


def inspect(args: argparse.Namespace) -> list[Report]:
    """Reports of all paths; the last one's findings include episodes that several share."""
    reports = []
    for path in args.path:
        kind = kind_of(path)
        if kind == "rlds":
            reports.append(inspect_rlds(path, args.spec, args.index_dir))
        elif kind == "lerobot":
            reports.append(inspect_lerobot(path, args.spec, args.index_dir))
        else:
            report = inspect_grounding(path, args.images, args.coordinates, args.index_dir)
            reports.append(report)
    several = len(args.path) > 1
    episodes = [
        (f"{path} split {split}" if several else f"split {split}", content)
        for path, report in zip(args.path, reports, strict=True)
        for split, content in report.episodes
    ]
    reports[-1].findings += findings.duplicate_findings(episodes)
    return reports


def main(argv: list[str] | None = None) -> int:
    """Prints reports; returns 0, or 1 where a path cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.data.inspect", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("path", type=Path, nargs="+")
    add("--spec", help="name of a registered robot spec, or a .json")
    add("--images", type=Path, help="folder that a grounding file's image paths start from")
    add("--coordinates", default="none", help="frame of a grounding file's numbers (llava.py)")
    add("--sheet", type=Path, help="write a contact sheet here (.png)")
    add("--json", type=Path, help="write facts and findings here")
    add("--index-dir", type=Path, help="where to keep the index (default: beside the data)")
    args = parser.parse_args(argv)
    try:
        reports = inspect(args)
    except (ValueError, OSError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 1
    for report in reports:
        print("\n".join(report.facts))
    found = [finding for report in reports for finding in report.findings]
    print(f"{len(found)} findings" + "".join(f"\n  - {finding}" for finding in found))
    if args.sheet:
        contact_sheet([strip for report in reports for strip in report.strips]).save(args.sheet)
        print(f"contact sheet: {args.sheet}")
    if args.json:
        tree = {"facts": [r.facts for r in reports], "findings": found}
        args.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
