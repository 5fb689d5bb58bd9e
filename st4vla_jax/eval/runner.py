"""Suites of the `evaluate` command: each scores a checkpoint, writes its files, makes a section."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from st4vla_jax.batch import Batch
from st4vla_jax.checkpoint import git_revision
from st4vla_jax.data.pipeline import Pipeline
from st4vla_jax.data.settings import DataSettings, open_held_out, open_pipeline
from st4vla_jax.data.sheet import Cell, Strip, contact_sheet
from st4vla_jax.data.source import Region
from st4vla_jax.eval.actions import HeldOut, mean_chunk
from st4vla_jax.eval.answering import Answerer
from st4vla_jax.eval.chunk_sampler import ChunkSampler
from st4vla_jax.eval.closed_loop import (
    Episode,
    EpisodeResult,
    LoopConfig,
    causes,
    run_episodes,
    success_rates,
)
from st4vla_jax.eval.grounding import (
    GroundingSourceLike,
    Prior,
    Question,
    Score,
    Summary,
    questions,
)
from st4vla_jax.eval.neighbour import NearestNeighbour
from st4vla_jax.eval.report import Section
from st4vla_jax.eval.statistics import Rate, compare, paired_bootstrap
from st4vla_jax.policy.ensemble import Executor
from st4vla_jax.policy.policy import Policy
from st4vla_jax.tabletop.environment import Environment

EPISODES_FILE = "episodes.jsonl"
_PICTURES = 24  # answers or episodes that a report shows
_SEED = 0  # of the noise that held-out chunks are sampled from
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Metrics by name, and the report's section."""

    metrics: dict[str, float]
    section: Section


def versions() -> dict[str, str]:
    """What produced the numbers."""
    out = {"python": platform.python_version(), "st4vla_jax": git_revision() or "unknown"}
    return out | {name: version(name) for name in _PACKAGES}


def checkpoint_hash(folder: Path) -> str:
    """sha256 over names and contents of a checkpoint's parameters and meta files."""
    total = hashlib.sha256()
    for path in sorted(p for part in ("params", "meta") for p in (folder / part).rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


# --- Actions ------------------------------------------------------------------------------------


def run_actions(
    policy: Policy, data: DataSettings, *, batches: int = 16, samples: int = 32
) -> Outcome:
    """Error and energy score of sampled chunks on held-out episodes, beside all baselines.

    Args:
      policy: with an action expert.
      data: with a holdout; tokenizer, statistics and image sizes are the checkpoint's.
      batches: held-out batches, at most, and training batches that the baselines see.
      samples: chunks for each robot sample.

    Raises:
      SettingsError, SourceError, ...: see `settings.open_pipeline`.
      HeldOutError: no robot samples are held out.
    """
    pipeline = open_pipeline(data, own_statistics=False)
    train, held_out = (_first(p, batches) for p in (pipeline, open_held_out(data, pipeline)))
    size = policy.meta.model.dit.action_dim
    names = policy.meta.action.names
    names = (*names, *(f"action_{i}" for i in range(len(names), size)))
    groups = max(int(b.vlm.target_group.max(initial=0)) for b in held_out) + 1
    scores = HeldOut(
        policy.model, held_out, mean_chunk(train), names, _SEED, samples, ("",) * groups
    )
    metrics = scores(policy.params)
    metrics |= NearestNeighbour(train).metrics(held_out)
    rows = [(name, f"{value:.5g}") for name, value in metrics.items()]
    curves = {
        f"{what} by horizon step": {
            what: [(t, metrics[f"eval/{what}/h{t}"]) for t in range(policy.meta.model.dit.chunk)
                   if f"eval/{what}/h{t}" in metrics]
        }
        for what in ("action_mse", "crps")
    }  # fmt: skip
    lines = [f"{len(held_out)} held-out batches, {samples} chunks a sample, normalised units"]
    return Outcome(metrics, Section("Actions", lines, ("metric", "value"), rows, curves=curves))


def _first(pipeline: Pipeline, count: int) -> list[Batch]:
    stream = pipeline.batches(0)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


# --- Grounding ----------------------------------------------------------------------------------


def grounding_file(name: str) -> str:
    """File of a source's answers below OUT, one line an answer."""
    return f"grounding_{name}.jsonl"


def run_grounding(
    policy: Policy,
    source: GroundingSourceLike,
    out: Path,
    *,
    masks: Path | None = None,
    prior: Prior | None = None,
    against: Path | None = None,
    limit: int | None = None,
    by: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
) -> Outcome:
    """Asks every question of a source and scores the answers.

    Args:
      policy: any checkpoint; its VLM answers.
      source: records.
      out: folder for `grounding_file`.
      masks: folder of Where2Place's masks.
      prior: of the training set, for the floor.
      against: folder of another checkpoint's run of the same records.
      limit: first records only.
      by: key of the records; scores are told for each of its values too.
      batch_size: questions at a time.
      max_new_tokens: of an answer.

    Raises:
      BadRecordError, ValueError: see `questions`.
    """
    answerer = Answerer(
        policy.model.vlm, policy.tokenizer, system=policy.meta.prompt.system,
        image_config=policy.meta.image, batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    asked: list[Question] = []

    def shown() -> Iterable[Question]:
        for question in questions(source, masks=masks, limit=limit, by=by):
            keep = question.images if len(asked) < _PICTURES else ()
            asked.append(dataclasses.replace(question, images=keep))
            yield question

    scores = answerer.scores(policy.params["vlm"], shown())
    lines = [_answer_line(score) for score in scores]
    summary, name = Summary.of(scores), source.name
    _write_lines(out / grounding_file(name), lines)
    metrics = summary.metrics(name)
    rows = _summary_rows(summary, "policy")
    groups = {score.group for score in scores} if by else set()
    for group in sorted(groups, key=lambda text: (len(text), text)):  # 2 before 10
        part = Summary.of([score for score in scores if score.group == group])
        metrics |= part.metrics(f"{name}/{by}_{group}")
        rows += _summary_rows(part, f"policy, {by} {group}")
    if prior is not None:
        floor = prior.floor([question.truth for question in asked])
        metrics |= floor.metrics(name, "_floor")
        rows += _summary_rows(floor, "drawn from the training prior")
    notes = [f"{count} x {reason}" for reason, count in summary.reasons.items()]
    if against is not None:
        notes += _compare_answers(lines, _read_lines(against / grounding_file(name)))
    pictures = [_answer_sheet(asked, scores)] if any(q.images for q in asked) else []
    return Outcome(
        metrics,
        Section(f"Grounding: {name}", notes, ("who", "what", "value"), rows, pictures),
    )


def _answer_line(score: Score) -> dict[str, Any]:
    line = dataclasses.asdict(score)
    return line | {"found": [c.round(2).tolist() for c in score.found]}


def _summary_rows(summary: Summary, who: str) -> list[tuple[str, str, str]]:
    rates = {"IoU@0.5": summary.iou50, "exact words": summary.exact, "answered": summary.answered}
    rows = [(who, what, str(rate)) for what, rate in rates.items() if rate is not None]
    return rows + [(who, f"mean {name}", f"{v:.4g}") for name, v in summary.means.items()]


def _compare_answers(lines: Sequence[dict], others: Sequence[dict]) -> list[str]:
    """McNemar on IoU@0.5 and a bootstrap on IoU, over the records that both answered."""
    theirs = {line["record"]: line["values"].get("iou") for line in others}
    pairs = [
        (mine, other)
        for line in lines
        if (ious := line["values"].get("iou")) and (found := theirs.get(line["record"]))
        for mine, other in zip(ious, found, strict=True)
    ]
    if not pairs:
        return ["nothing to compare: no box records in common"]
    first, second = zip(*pairs, strict=True)
    paired = compare([iou >= 0.5 for iou in first], [iou >= 0.5 for iou in second])
    mean, low, high = paired_bootstrap(first, second)
    return [
        f"against the other checkpoint, {len(pairs)} boxes: IoU@0.5 {paired.first} and "
        f"{paired.second}, McNemar p = {paired.p_value:.3g}; mean IoU differs by {mean:+.3f} "
        f"[{low:+.3f}, {high:+.3f}]"
    ]


def _answer_sheet(asked: Sequence[Question], scores: Sequence[Score]):
    cells = []
    for question, score in zip(asked, scores, strict=True):
        if not question.images:
            continue
        found = tuple(Region(score.kind, c) for c in score.found)
        values = ", ".join(f"{k} {v[0]:.2f}" for k, v in score.values.items())
        caption = f"{values or score.reason}: {score.answer}"
        cells.append(Cell(question.images[0], caption, question.truth.regions + found))
    strips = [Strip("", tuple(cells[i : i + 6])) for i in range(0, len(cells), 6)]
    return "truth first, then the answer; numbers below", contact_sheet(strips)


# --- Closed loop --------------------------------------------------------------------------------


def run_closed_loop(
    sampler: ChunkSampler,
    make_environment: Callable[[], Environment],
    episodes: Sequence[Episode],
    make_executor: Callable[[], Executor],
    out: Path,
    *,
    settings: dict[str, Any],
    cfg: LoopConfig,
    against: Path | None = None,
    say: Say = print,
) -> Outcome:
    """Runs the episodes that EPISODES_FILE does not hold yet, and scores all of them.

    Args:
      sampler: the policy.
      make_environment: of one environment.
      episodes: what to run.
      make_executor: of one episode.
      out: folder for EPISODES_FILE.
      settings: versions, checkpoint hash and everything else that decides results; kept in each
        line.
      cfg: limits.
      against: folder of another checkpoint's run of the same episodes.
      say: told of progress.

    Raises:
      ValueError: EPISODES_FILE holds episodes of other settings.
    """
    path = out / EPISODES_FILE
    old = _read_lines(path)
    if any(line["settings"] != settings for line in old):
        raise ValueError(f"{path}: holds episodes of other settings; choose another --out")
    _write_lines(path, old)  # without a line that was cut off
    done = {_key(line): line for line in old}
    todo = [e for e in episodes if _key(dataclasses.asdict(e)) not in done]
    if done:
        say(f"{path}: {len(episodes) - len(todo)} of {len(episodes)} episodes are there already")
    results = []
    with open(path, "a", encoding="utf-8") as file:
        loop = run_episodes(
            sampler, sampler.chunk_shape, make_environment, todo, make_executor, cfg
        )
        for result in loop:
            results.append(result)
            line = result.to_json() | {"settings": settings}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if len(results) % max(1, len(todo) // 10) == 0:
                rate = Rate(sum(r.success for r in results), len(results))
                say(f"{len(results)} of {len(todo)} episodes, success {rate}")
    wanted = {_key(dataclasses.asdict(e)) for e in episodes}
    kept = [_result(line) for key, line in done.items() if key in wanted]
    return _loop_outcome(results, kept, against)


def _loop_outcome(
    fresh: list[EpisodeResult], kept: list[EpisodeResult], against: Path | None
) -> Outcome:
    results = kept + fresh
    overall = Rate(sum(r.success for r in results), len(results))
    metrics, rows = {"eval/success": overall.value}, [("all", "", str(overall))]
    for by in ("split", "task"):
        for name, rate in success_rates(results, by).items():
            metrics[f"eval/success/{by}/{name}"] = rate.value
            rows.append((by, name, str(rate)))
    notes = [f"{count} episodes ended by: {cause}" for cause, count in causes(results).items()]
    if against is not None:
        notes += _compare_episodes(results, _read_lines(against / EPISODES_FILE))
    failed = [r for r in fresh if not r.success and r.frames][:_PICTURES]
    strips = [
        Strip(
            f"{r.episode.task}, {r.episode.split}, seed {r.episode.seed}: {r.failure}",
            tuple(Cell(frame, r.instruction if i == 0 else "") for i, frame in enumerate(r.frames)),
        )
        for r in failed
    ]
    pictures = [("failures, from first to last picture", contact_sheet(strips))] if strips else []
    section = Section("Closed loop", notes, ("by", "name", "success"), rows, pictures)
    return Outcome(metrics, section)


def _compare_episodes(results: Sequence[EpisodeResult], others: Sequence[dict]) -> list[str]:
    theirs = {_key(line): line["success"] for line in others}
    mine = {_key(r.to_json()): r.success for r in results}
    shared = [key for key in mine if key in theirs]
    if not shared:
        return ["nothing to compare: no episodes in common"]
    paired = compare([mine[k] for k in shared], [theirs[k] for k in shared])
    return [
        f"against the other checkpoint, the same {len(shared)} episodes: {paired.first} and "
        f"{paired.second}; solved by one alone {paired.first_only} and {paired.second_only}, "
        f"McNemar p = {paired.p_value:.3g}"
    ]


def _key(line: dict[str, Any]) -> tuple[int, str, str]:
    return line["seed"], line["task"], line["split"]


def _result(line: dict[str, Any]) -> EpisodeResult:
    """An episode of an earlier start; its pictures are gone."""
    names = ("success", "steps", "failure", "cause", "instruction")
    return EpisodeResult(Episode(*_key(line)), *(line[n] for n in names), frames=())


# --- Files --------------------------------------------------------------------------------------


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes JSONL beside ``path`` and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; [] without one.  A last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: not JSON lines ({error}); move it away") from error
