"""Closed-loop evaluation: many environments at a time, one batched policy, nothing lost to a crash.

Every environment lives in a thread of its own, so that a step that hangs can be given up.  An
environment that raises or hangs, and a policy whose action is not finite, end their episode as a
failure with a name; the others go on.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from st4vla_jax.eval.statistics import Rate
from st4vla_jax.policy.ensemble import Executor
from st4vla_jax.tabletop.environment import Environment, Observation

FRAMES = 4  # pictures that a result keeps of its episode

# (observations, noise f32[n,C,A]) -> chunks f32[n,C,A] in raw units
ChunkFn = Callable[[Sequence[Observation], np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Episode:
    """What to run; equal ones give equal scenes and noise, so that checkpoints can be paired."""

    seed: int
    task: str
    split: str


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """How an episode went.

    Attributes:
      episode: what was run.
      success: the task was done.
      steps: control steps taken.
      failure: why not, in words; "" after success.
      cause: "task" (it was not done), "policy" (an action that is not finite), "error" (the
        environment raised) or "timeout" (it hung); "" after success.
      instruction: of the episode; "" if it never started.
      frames: up to FRAMES pictures u8[h,w,3] of the first view, from first to last.
    """

    episode: Episode
    success: bool
    steps: int
    failure: str
    cause: str
    instruction: str
    frames: tuple[np.ndarray, ...]

    def to_json(self) -> dict[str, Any]:
        """One line of the per-episode file, without pictures."""
        out = dataclasses.asdict(self.episode)
        names = ("success", "steps", "failure", "cause", "instruction")
        return out | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How episodes are run.

    Attributes:
      num_envs: environments at a time.
      max_steps: of an episode, for environments that set no limit of their own.
      timeout_s: after which a reset or step has hung.
    """

    num_envs: int = 8
    max_steps: int = 1000
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if min(self.num_envs, self.max_steps) < 1 or not self.timeout_s > 0:
            raise ValueError(f"{self}: every number must be above 0")


def run_episodes(
    policy: ChunkFn,
    chunk_shape: tuple[int, int],
    make_environment: Callable[[], Environment],
    episodes: Sequence[Episode],
    make_executor: Callable[[], Executor],
    cfg: LoopConfig = LoopConfig(),  # noqa: B008 (frozen)
) -> Iterator[EpisodeResult]:
    """Runs every episode once; results come in the order in which they end.

    The noise of a step depends on the episode and the step alone, not on the other environments.

    Args:
      policy: samples chunks for up to ``cfg.num_envs`` observations.
      chunk_shape: (C, A) of its chunks.
      make_environment: called in the environment's own thread, again after an error or a hang.
      episodes: what to run.
      make_executor: of an episode (`policy.ensemble`).
      cfg: limits.
    """
    waiting = deque(episodes)
    slots = [_Slot(make_environment, cfg) for _ in range(min(cfg.num_envs, len(episodes)))]
    try:
        while True:
            for slot in slots:
                if slot.idle and waiting:
                    slot.start(waiting.popleft(), make_executor())
            if all(slot.idle for slot in slots):
                return
            yield from _results(slots)
            hungry = [slot for slot in slots if not slot.idle and slot.executor.hungry]
            if hungry:
                noise = np.stack([slot.noise(chunk_shape) for slot in hungry])
                chunks = policy([slot.observation for slot in hungry], noise)
                for slot, chunk in zip(hungry, chunks, strict=True):
                    slot.executor.add(chunk)
            for slot in slots:
                if not slot.idle:
                    slot.act()
            yield from _results(slots)
    finally:
        for slot in slots:
            slot.close()


def _results(slots: Sequence[_Slot]) -> Iterator[EpisodeResult]:
    """Waits for what the environments were asked, all at once; results of episodes that ended."""
    for slot in slots:
        if (result := slot.collect()) is not None:
            yield result


class _Slot:
    """One environment and the episode that it runs."""

    def __init__(self, make_environment: Callable[[], Environment], cfg: LoopConfig) -> None:
        self._make, self._cfg = make_environment, cfg
        self._worker: _Worker | None = None
        self._episode: Episode | None = None

    @property
    def idle(self) -> bool:
        return self._episode is None

    def start(self, episode: Episode, executor: Executor) -> None:
        self._worker = self._worker or _Worker(self._make)
        self._episode, self.executor, self._steps = episode, executor, 0
        self.observation: Observation | None = None
        self._frames: list[np.ndarray] = []
        self._refusal = ""
        self._worker.ask("reset", episode.seed, episode.task, episode.split)

    def noise(self, shape: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng([self._episode.seed, self._steps])
        return rng.standard_normal(shape, np.float32)

    def act(self) -> None:
        action = self.executor.next()
        if np.isfinite(action).all():
            self._worker.ask("step", action)
        else:
            self._refusal = f"the policy's action at step {self._steps} is not finite"

    def collect(self) -> EpisodeResult | None:
        """Waits for the answer to what was asked, if anything; the result if the episode ended."""
        if self.idle:
            return None
        if self._refusal:
            return self._end(False, self._refusal, "policy")
        if not self._worker.asked:
            return None
        try:
            answer = self._worker.answer(self._cfg.timeout_s)
        except _HungError:
            self._abandon()
            limit = f"{self._cfg.timeout_s:g} s"
            return self._end(False, f"the environment did not answer within {limit}", "timeout")
        except Exception as error:  # whatever an environment raises is its failure
            self._abandon()
            return self._end(False, f"{type(error).__name__}: {error}", "error")
        if self.observation is None:
            self._observe(answer)
            return None
        self._steps += 1
        self._observe(answer.observation)
        if answer.done:
            failure = "" if answer.success else answer.info.get("failure") or "not done"
            return self._end(answer.success, failure, "" if answer.success else "task")
        if self._steps >= self._cfg.max_steps:
            return self._end(False, f"not done after {self._steps} steps", "task")
        return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def _observe(self, observation: Observation) -> None:
        self.observation = observation
        self._frames.append(next(iter(observation.images.values()), np.zeros((1, 1, 3), np.uint8)))

    def _abandon(self) -> None:
        self._worker.close()
        self._worker = None

    def _end(self, success: bool, failure: str, cause: str) -> EpisodeResult:
        instruction = self.observation.instruction if self.observation else ""
        count = len(self._frames)
        picks = sorted({round(i) for i in np.linspace(0, count - 1, FRAMES)}) if count else []
        frames = tuple(self._frames[i] for i in picks)
        episode, self._episode, self._frames = self._episode, None, []
        return EpisodeResult(
            episode, bool(success), self._steps, failure, cause, instruction, frames
        )


class _HungError(Exception):
    """No answer in time."""


class _Worker:
    """Calls one environment's methods in a daemon thread, so that one that hangs blocks nobody."""

    def __init__(self, make_environment: Callable[[], Environment]) -> None:
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._asked_at: float | None = None
        threading.Thread(target=self._run, args=(make_environment,), daemon=True).start()

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    def ask(self, method: str, *args: Any) -> None:
        self._asked_at = time.monotonic()
        self._inbox.put((method, args))

    def answer(self, timeout_s: float) -> Any:
        """What the method returned or raised; _HungError if it took longer since it was asked."""
        left = max(0.0, self._asked_at + timeout_s - time.monotonic())
        try:
            value, error = self._outbox.get(timeout=left)
        except queue.Empty:
            raise _HungError from None
        self._asked_at = None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Lets the thread end once it is free."""
        self._inbox.put(None)

    def _run(self, make_environment: Callable[[], Environment]) -> None:
        environment = None
        while (call := self._inbox.get()) is not None:
            method, args = call
            try:
                environment = make_environment() if environment is None else environment
                self._outbox.put((getattr(environment, method)(*args), None))
            except Exception as error:
                self._outbox.put((None, error))


# --- Summary ------------------------------------------------------------------------------------


def success_rates(results: Sequence[EpisodeResult], by: str) -> dict[str, Rate]:
    """Rate of success by "task" or "split", in the order of first appearance.

    Episodes that an environment's error or hang ended count as failures: leaving them out would
    favour a policy that breaks environments.
    """
    groups: dict[str, list[bool]] = {}
    for result in results:
        groups.setdefault(getattr(result.episode, by), []).append(result.success)
    return {name: Rate(sum(done), len(done)) for name, done in groups.items()}


def causes(results: Sequence[EpisodeResult]) -> dict[str, int]:
    """How many episodes ended for each cause but success."""
    found = [result.cause for result in results if result.cause]
    return {cause: found.count(cause) for cause in dict.fromkeys(found)}
