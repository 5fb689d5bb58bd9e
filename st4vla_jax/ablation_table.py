"""What the jobs of an ablation found: the table, its curves, and the report.

Every rate is p [Wilson 95 %] n, and every row is compared with the first on the same episodes and
boxes (exact McNemar).  The order of rows is told as it came out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from st4vla_jax.ablation_rows import (
    DOMAINS,
    FINAL,
    IN_DISTRIBUTION,
    RUN,
    SPLITS_FOLDER,
    Plan,
    Row,
)
from st4vla_jax.ablation_run import seconds
from st4vla_jax.data.tfds_write import write_json
from st4vla_jax.eval.grounding import IOU_THRESHOLD
from st4vla_jax.eval.report import Section, write_report
from st4vla_jax.eval.runner import EPISODES_FILE, grounding_file, versions
from st4vla_jax.eval.statistics import PairedComparison, Rate, compare
from st4vla_jax.metrics import METRICS_FILE, read_metrics

TABLE_JSON, TABLE_MD, REPORT = "table.json", "table.md", "report.html"
_CURVES = {"PSS": "align/pss", "gradient cosine": "align/cosine", "action loss": "loss/action"}
_SIGNIFICANT = 0.05

Hits = Mapping[Any, bool]  # what was asked or tried -> whether it went well
Curve = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What is known of a row.

    Attributes:
      name, says: of the row.
      boxes: domain -> step -> hits by box; step 0 is the stage that the row starts from.
      episodes: success by (task, split, seed).
      curves: title -> (update, value) pairs from the training's own log.
      seconds: of its training.
    """

    name: str
    says: str
    boxes: Mapping[str, Mapping[int, Hits]]
    episodes: Hits
    curves: Mapping[str, Curve]
    seconds: float

    def last_boxes(self, domain: str) -> Hits:
        return self.boxes[domain][max(self.boxes[domain])]

    def success(self, *, held_out: bool) -> Rate:
        """In distribution, or over all other splits."""
        return _rate({k: v for k, v in self.episodes.items() if held_out == _is_held_out(k)})

    def by(self, place: int) -> dict[str, Rate]:
        """Success by task (place 0) or split (1)."""
        names = sorted({key[place] for key in self.episodes})
        return {
            name: _rate({k: v for k, v in self.episodes.items() if k[place] == name})
            for name in names
        }

    @property
    def pss(self) -> float:
        """Mean over training; NaN for a row without both losses."""
        values = [value for _, value in self.curves.get("PSS", ()) if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan


def read_row(plan: Plan, row: Row) -> RowResult:
    """Reads the files that the row's jobs wrote."""
    folder = plan.out / row.name
    start, own = plan.answers(row.start), plan.answers(row.name)
    boxes = {
        domain: {
            step: read_boxes(path, domain) for step, path in (start[domain] | own[domain]).items()
        }
        for domain in DOMAINS
    }
    episodes: dict[Any, bool] = {}
    for name in (FINAL, SPLITS_FOLDER):
        for line in _lines(folder / name / EPISODES_FILE):
            episodes[line["task"], line["split"], line["seed"]] = line["success"]
    metrics = read_metrics(folder / RUN) if (folder / RUN / METRICS_FILE).is_file() else []
    curves = {
        title: [(int(line["step"]), line[name]) for line in metrics if name in line]
        for title, name in _CURVES.items()
    }
    took = seconds(plan.out, f"{row.name}/train") or 0.0
    return RowResult(row.name, row.says, boxes, episodes, curves, took)


def read_boxes(folder: Path, domain: str) -> Hits:
    """IoU@0.5 of every true box by (record, number), from an evaluation's answers."""
    return {
        (line["record"].rpartition(":")[2], number): iou >= IOU_THRESHOLD
        for line in _lines(folder / grounding_file(domain))
        for number, iou in enumerate(line["values"].get("iou", ()))
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _rate(hits: Hits) -> Rate:
    return Rate(sum(hits.values()), len(hits))


def _is_held_out(key: tuple[str, str, int]) -> bool:
    return key[1] != IN_DISTRIBUTION


def paired(first: Hits, second: Hits) -> PairedComparison:
    """Compares what both tried."""
    shared = [key for key in first if key in second]
    return compare([first[key] for key in shared], [second[key] for key in shared])


# --- Table --------------------------------------------------------------------------------------


def table(results: Sequence[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the main table."""
    header = ["row", "what", "success", "p", "other splits", "p"]
    for domain in DOMAINS:
        header += [f"IoU@0.5 {domain}: start", "end", "p"]
    header += ["PSS", "training"]
    return header, [_cells(one, results[0]) for one in results]


def _cells(one: RowResult, first: RowResult) -> list[str]:
    cells = [one.name, one.says]
    for held_out in (False, True):
        mine, theirs = (
            {k: v for k, v in r.episodes.items() if _is_held_out(k) == held_out}
            for r in (one, first)
        )
        cells += [str(one.success(held_out=held_out)), _p(one, first, mine, theirs)]
    for domain in DOMAINS:
        last = one.last_boxes(domain)
        cells += [str(_rate(one.boxes[domain][0])), str(_rate(last))]
        cells.append(_p(one, first, last, first.last_boxes(domain)))
    pss = "-" if math.isnan(one.pss) else f"{one.pss:.3f}"
    return [*cells, pss, f"{one.seconds / 60:.1f} min"]


def _p(one: RowResult, first: RowResult, mine: Hits, theirs: Hits) -> str:
    return "-" if one is first else f"{paired(mine, theirs).p_value:.2g}"


def split_table(results: Sequence[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Success by split and by task."""
    names = list(dict.fromkeys(n for one in results for place in (1, 0) for n in one.by(place)))
    rows = [
        [one.name, *(str((one.by(1) | one.by(0)).get(name, "-")) for name in names)]
        for one in results
    ]
    return ["row", *names], rows


def orderings(results: Sequence[RowResult]) -> list[str]:
    """Rows from best to worst by each measure, and which differences from the next are clear."""
    measures: dict[str, dict[str, Hits]] = {
        "success in distribution": {
            r.name: {k: v for k, v in r.episodes.items() if not _is_held_out(k)} for r in results
        }
    }
    for domain in DOMAINS:
        measures[f"IoU@0.5 at the end, {domain}"] = {r.name: r.last_boxes(domain) for r in results}
    return [f"{title}: {_ordering(hits)}" for title, hits in measures.items()]


def _ordering(hits: Mapping[str, Hits]) -> str:
    names = sorted(hits, key=lambda name: -_rate(hits[name]).value)
    parts = [f"{names[0]} {_rate(hits[names[0]]).value:.2f}"]
    for better, worse in zip(names, names[1:], strict=False):
        clear = paired(hits[better], hits[worse]).p_value < _SIGNIFICANT
        parts.append(f"{'>' if clear else '~'} {worse} {_rate(hits[worse]).value:.2f}")
    return " ".join(parts)


_LEGEND = (
    "Rates are p [Wilson 95 %] n. p: exact McNemar against the first row on the same episodes or "
    "boxes. Success is in distribution (other seeds); PSS is the mean over training, '-' without "
    "both losses. In the orderings '>' is a difference with p < 0.05 between neighbours, '~' none."
)


# --- Files --------------------------------------------------------------------------------------


def write_results(plan: Plan, rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Writes table.json, table.md and report.html; returns the lines of table.md."""
    results = [read_row(plan, row) for row in rows]
    about = dict(settings) | {"versions": versions()}
    write_json(
        plan.out / TABLE_JSON, {"about": about, "rows": [_json(r, results) for r in results]}
    )
    main, splits, told = table(results), split_table(results), orderings(results)
    lines = [
        *_markdown(*main), "", *_markdown(*splits), "", *(f"- {line}" for line in told), "",
        _LEGEND, "", f"Settings: `{json.dumps(about)}`",
    ]  # fmt: skip
    (plan.out / TABLE_MD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    sections = [
        Section("Rows", [_LEGEND, *told], *main),
        Section("Success by split and task", (), *splits),
        Section("Over training", curves=_plots(results)),
        Section("Settings", [json.dumps(about)]),
    ]
    write_report(plan.out / REPORT, "Ablation in miniature", sections)
    return lines


def _plots(results: Sequence[RowResult]) -> dict[str, dict[str, Curve]]:
    plots = {
        f"IoU@0.5, {domain}": {
            one.name: [
                (step, _rate(hits).value) for step, hits in sorted(one.boxes[domain].items())
            ]
            for one in results
        }
        for domain in DOMAINS
    }
    return plots | {
        title: {one.name: one.curves[title] for one in results if one.curves.get(title)}
        for title in _CURVES
    }


def _json(one: RowResult, results: Sequence[RowResult]) -> dict[str, Any]:
    first = results[0]
    return {
        "row": one.name,
        "what": one.says,
        "success": {
            "in_distribution": _rate_json(one.success(held_out=False)),
            "held_out": _rate_json(one.success(held_out=True)),
            "split": {name: _rate_json(rate) for name, rate in one.by(1).items()},
            "task": {name: _rate_json(rate) for name, rate in one.by(0).items()},
        },
        "iou50": {
            domain: {str(step): _rate_json(_rate(hits)) for step, hits in by_step.items()}
            for domain, by_step in one.boxes.items()
        },
        "against_first": {
            "success": paired(one.episodes, first.episodes).p_value,
            **{d: paired(one.last_boxes(d), first.last_boxes(d)).p_value for d in DOMAINS},
        },
        "pss": None if math.isnan(one.pss) else one.pss,
        "curves": {
            title: [[x, y] for x, y in curve if math.isfinite(y)]
            for title, curve in one.curves.items()
        },
        "train_seconds": one.seconds,
    }


def _rate_json(rate: Rate) -> dict[str, float | int | None]:
    low, high = rate.interval()
    value = rate.value if rate.trials else None
    return {"p": value, "low": low, "high": high, "n": rate.trials}


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = (header, ["---"] * len(header), *rows)
    return ["| " + " | ".join(line) + " |" for line in lines]
