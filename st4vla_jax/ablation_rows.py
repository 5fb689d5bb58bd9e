"""What the ablation runs: budgets, rows, and the commands of both, in order.

Every job is a command that a user could type: data, `train` with configs/ablation.py, `evaluate`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from st4vla_jax.data.robot_spec import nearest
from st4vla_jax.doctor import usable_cores
from st4vla_jax.tabletop.sampling import SPLITS, splits_of
from st4vla_jax.tabletop.tasks import TASKS
from st4vla_jax.tabletop.words import FOLDER
from st4vla_jax.train_checkpoints import FOLDER as CHECKPOINTS

CONFIG = "configs/ablation.py"
IN_DISTRIBUTION = "val"  # the training distribution under other seeds
HELD_OUT = tuple(split for split in SPLITS if split not in ("train", IN_DISTRIBUTION))
DOMAINS = {"generic": "generic", "robot": "grounding"}  # of questions -> folder of a data set
STAGES = ("stage0", "stage1")
CACHE = "compile_cache"  # jobs of one kind compile the same programs
RUN = "run"  # workdir below a stage's or row's folder
FINAL, SPLITS_FOLDER = "final", "splits"  # of a row's closed loops, in distribution and of the rest


class AblationError(ValueError):
    """Settings that do not fit, or a job that failed; lists every problem and what to do."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
      episodes: demonstrations; grounding: records about robot scenes; generic: others.
      stage0, stage1, row: updates.
      curve: checkpoints of a row that are asked for boxes, evenly spaced, the last among them.
      records: questions of a test, of each domain.
      rollouts: closed-loop episodes of each task in distribution; of each other split, a quarter.
      tasks: of the demonstrations and of the closed loop.
    """

    episodes: int
    grounding: int
    generic: int
    stage0: int
    stage1: int
    row: int
    curve: int
    records: int
    rollouts: int
    tasks: tuple[str, ...] = ("reach",)

    def __post_init__(self) -> None:
        counts = {k: v for k, v in dataclasses.asdict(self).items() if k != "tasks"}
        problems = [f"{name} {count}: at least 1" for name, count in counts.items() if count < 1]
        if min(counts.values()) > 0 and self.row % self.curve:
            problems.append(f"row {self.row} is no multiple of curve {self.curve}")
        problems += [f"task {t!r}{nearest(t, TASKS)}" for t in self.tasks if t not in TASKS]
        if problems:
            raise AblationError("\n  ".join(["budget:", *problems]))

    @property
    def steps(self) -> tuple[int, ...]:
        """Updates after which a row is asked for boxes."""
        return tuple(self.row * (i + 1) // self.curve for i in range(self.curve))


BUDGETS = {
    "smoke": Budget(12, 160, 160, 4, 4, 4, 2, 12, 4),
    "small": Budget(4000, 16_000, 48_000, 1000, 400, 1200, 2, 400, 200, ("reach", "pick")),
    "medium": Budget(8000, 24_000, 48_000, 1000, 400, 2400, 2, 400, 200, ("reach", "pick")),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      name: of the row and its folder.
      says: what it is, in words.
      part: of CONFIG.
      start: of STAGES, whose weights it starts from.
      settings: config keys that differ from the part's.
    """

    name: str
    says: str
    part: str
    start: str = "stage0"
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)


ROWS = {
    row.name: row
    for row in (
        Row("vanilla_vla", "actions alone", "vanilla_vla"),
        Row("cotrain", "actions and grounding", "cotrain"),
        Row("prompt", "+ spatial prompt", "prompt"),
        Row("decay", "+ gradient decay", "decay"),
        Row("full", "+ stage 1", "decay", "stage1"),
        Row("frozen", "VLM of stage 1, frozen", "frozen", "stage1"),
    )
}


def chosen_rows(
    names: Sequence[str], decays: Sequence[float] = (), ratios: Sequence[float] = ()
) -> list[Row]:
    """The named rows (none = all), then the sweeps: ``full`` with another decay or loss ratio.

    Args:
      names: of ROWS.
      decays: factors on the action loss's gradient into the VLM.
      ratios: of the action loss to the next-token loss, each at least 1.

    Raises:
      AblationError: every value that cannot be.
    """
    problems = [f"--rows {name}{nearest(name, ROWS)}" for name in names if name not in ROWS]
    problems += [f"--decay {decay:g}: not in 0..1" for decay in decays if not 0 <= decay <= 1]
    problems += [f"--ratio {ratio:g}: at least 1" for ratio in ratios if not ratio >= 1]
    if problems:
        raise AblationError("\n  ".join(["rows:", *problems]))
    full = ROWS["full"]
    rows = [ROWS[name] for name in dict.fromkeys(names or ROWS)]
    rows += [
        dataclasses.replace(
            full, name=f"full_decay_{decay:g}", says=f"full, decay {decay:g}",
            settings={"model.bridge.gradient_scale": decay},
        )
        for decay in dict.fromkeys(decays)
    ]  # fmt: skip
    return rows + [
        dataclasses.replace(
            full, name=f"full_ratio_{ratio:g}", says=f"full, losses {ratio:g}:1",
            settings={"loss.text": 1 / ratio},
        )
        for ratio in dict.fromkeys(ratios)
    ]  # fmt: skip


# --- Jobs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """One command; ``name`` is "data/train", "stage0/train", "full/in_distribution", ..."""

    name: str
    command: tuple[str, ...]


class Plan:
    """The jobs of an ablation below its folder.

    Args:
      out: folder of everything; absolute.
      budget: how much.
      stage0: a checkpoint to start from instead of training stage 0.
    """

    def __init__(self, out: Path, budget: Budget, stage0: Path | None = None) -> None:
        self.out, self.budget, self.stage0 = out, budget, stage0

    def shared(self, rows: Sequence[Row]) -> Iterator[Job]:
        """What the rows start from, each job after what it needs."""
        yield from self._data()
        yield from self._stage("stage0")
        if any(row.start == "stage1" for row in rows):
            yield from self._stage("stage1")

    def chains(self, rows: Sequence[Row]) -> list[list[Job]]:
        """The rows' jobs; those of a row follow each other, rows do not need each other."""
        return [list(self._row(row)) for row in rows]

    def checkpoint(self, name: str, step: int | None = None) -> Path:
        """A stage's or row's weights after ``step`` updates, all of them by default."""
        if name == "stage0" and self.stage0 is not None:
            return self.stage0
        step = getattr(self.budget, name) if name in STAGES else step or self.budget.row
        return self.out / name / RUN / CHECKPOINTS / f"{step:08d}"

    def answers(self, name: str) -> dict[str, dict[int, Path]]:
        """Domain -> step -> folder of a stage's or row's answers.

        A stage's are step 0 of the rows that start from it.  Generic questions, which nothing but
        stage 0 teaches in all rows, are asked along the way, those of robot scenes at the end.
        """
        folder = self.out / name
        if name in STAGES:
            return {domain: {0: folder / domain} for domain in DOMAINS}
        generic = {step: folder / f"generic_{step:08d}" for step in self.budget.steps}
        return {"generic": generic, "robot": {self.budget.row: folder / FINAL}}

    def _data(self) -> Iterator[Job]:
        budget = self.budget
        workers = ("--workers", usable_cores())  # the records do not depend on them
        make = (*_python("st4vla_jax.tabletop.dataset"), *workers, "--out")
        train = ("--episodes", budget.episodes, "--grounding", budget.grounding)
        train += ("--generic", budget.generic, "--tasks", *budget.tasks)
        test = ("--grounding", budget.records, "--generic", budget.records)
        test += ("--seed", 1, "--split", IN_DISTRIBUTION, "--tasks", *budget.tasks)
        yield _job("data/train", *make, self.out / "data/train", *train)
        yield _job("data/test", *make, self.out / "data/test", *test)

    def _stage(self, name: str) -> Iterator[Job]:
        if name == "stage1":
            yield self._train(name, name, "stage0", self.budget.stage1, 1, {})
        elif self.stage0 is None:
            yield self._train(name, name, "", self.budget.stage0, 1, {})
        for domain, steps in self.answers(name).items():
            yield self._evaluate(name, None, steps[0], "grounding", *self._questions(domain))

    def _row(self, row: Row) -> Iterator[Job]:
        budget = self.budget
        yield self._train(row.name, row.part, row.start, budget.row, budget.curve, row.settings)
        for step, out in self.answers(row.name)["generic"].items():
            yield self._evaluate(row.name, step, out, "grounding", *self._questions("generic"))
        # The nearer the gripper is, the better it is seen where to go: a new chunk at every step.
        loop = ("--execute", 1, "--tasks", *budget.tasks, "--splits")
        folder = self.out / row.name
        known = [s for s in HELD_OUT if any(s in splits_of(task) for task in budget.tasks)]
        yield self._evaluate(
            row.name, None, folder / FINAL, "grounding", "tabletop", *self._questions("robot"),
            *loop, IN_DISTRIBUTION, "--episodes", budget.rollouts,
        )  # fmt: skip
        yield self._evaluate(
            row.name, None, folder / SPLITS_FOLDER, "tabletop", *loop, *known,
            "--episodes", max(1, budget.rollouts // 4),
        )  # fmt: skip

    def _train(
        self, name: str, part: str, start: str, updates: int, saves: int, more: Mapping[str, float]
    ) -> Job:
        data = self.out / "data/train"
        settings = {
            "steps": updates, "save_every": updates // saves, "checkpoint.keep_last": saves,
            "data.tokenizer": data / FOLDER, "log.cache_dir": self.out / CACHE,
        }  # fmt: skip
        for folder in _grounding_of(part):
            settings[f"data.sets.{folder}.path"] = data / folder / "records.jsonl"
            settings[f"data.sets.{folder}.images"] = data / folder
        if part not in STAGES:
            settings["data.sets.tabletop.path"] = data / "tabletop/1.0.0"
        if start:
            settings["init.checkpoint"] = self.checkpoint(start)
        return _job(
            f"{name}/train", *_python("st4vla_jax.train"), f"--config={CONFIG}:{part}",
            f"--workdir={self.out / name / RUN}",
            *(f"--config.{key}={value}" for key, value in (settings | dict(more)).items()),
        )  # fmt: skip

    def _evaluate(self, name: str, step: int | None, out: Path, *words: object) -> Job:
        return _job(
            f"{name}/{out.name}", *_python("st4vla_jax.evaluate"), "--checkpoint",
            self.checkpoint(name, step), "--out", out, "--suite", *words,
        )  # fmt: skip

    def _questions(self, domain: str) -> tuple[object, ...]:
        test, train = (
            self.out / "data" / part / DOMAINS[domain] / "records.jsonl"
            for part in ("test", "train")
        )
        shapes = ("--batch-size", 32, "--max-new-tokens", 48)
        return ("--name", domain, "--data", test, "--prior", train, *shapes)


def _grounding_of(part: str) -> tuple[str, ...]:
    """Grounding data that a part of CONFIG has, by their folders."""
    if part in ("vanilla_vla", "frozen"):
        return ()
    return ("generic",) if part == "stage0" else ("generic", "grounding")


def _python(module: str) -> tuple[str, ...]:
    return sys.executable, "-m", module


def _job(name: str, *words: object) -> Job:
    return Job(name, tuple(str(word) for word in words))
