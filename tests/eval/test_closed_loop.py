"""Closed loop with made-up environments that fail in every way, and with the tabletop."""

import time

import jax
import numpy as np
import pytest

from st4vla_jax.checkpoint import Meta
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec, Statistics
from st4vla_jax.eval.chunk_sampler import ChunkSampler
from st4vla_jax.eval.closed_loop import (
    Episode,
    LoopConfig,
    causes,
    run_episodes,
    success_rates,
)
from st4vla_jax.policy.ensemble import AdaptiveEnsemble, RecedingHorizon
from st4vla_jax.policy.policy import Policy, PolicyError
from st4vla_jax.tabletop.environment import Observation, Tabletop, Transition
from tests.reference.policy import PROMPT, TOKENIZER, random_params, tiny_policy

SHAPE = (4, 2)
IMAGE = np.zeros((4, 4, 3), np.uint8)


class Counter:
    """The state must be brought to the seed by adding actions; done when it is there.

    Tasks: "count", and "raise", "hang", "reset", "never" misbehave at state 2.
    """

    tasks, splits = ("count", "raise", "hang", "reset", "never"), ("train",)
    made = 0

    def __init__(self):
        Counter.made += 1

    def reset(self, seed, task, split):
        if task == "reset":
            raise RuntimeError("no such scene")
        self.seed, self.task, self.state = seed, task, 0.0
        return self.observe()

    def observe(self):
        images = {"primary": IMAGE + int(self.state)}
        return Observation(images, f"count to {self.seed}", np.array([self.state, self.seed]))

    def step(self, action):
        self.state += float(action[0])
        if self.state >= 2 and self.task == "raise":
            raise ZeroDivisionError("physics exploded")
        if self.state >= 2 and self.task == "hang":
            time.sleep(3)
        done = self.state >= self.seed and self.task != "never"
        return Transition(self.observe(), done, done, {"failure": ""})


def one_by_one(calls=None):
    """A policy that adds 1 at each step, and remembers how many it was asked for at a time."""

    def policy(observations, noise):
        assert noise.shape == (len(observations), *SHAPE)
        if calls is not None:
            calls.append(len(observations))
        return np.ones((len(observations), *SHAPE), np.float32)

    return policy


def run(episodes, policy=None, executor=lambda: RecedingHorizon(2), **limits):
    cfg = LoopConfig(**({"num_envs": 3} | limits))
    policy = policy or one_by_one()
    return list(run_episodes(policy, SHAPE, Counter, episodes, executor, cfg))


def test_every_episode_runs_once_in_batches():
    calls = []
    episodes = [Episode(seed, "count", "train") for seed in (3, 5, 1, 4, 2, 6, 1)]
    results = run(episodes, one_by_one(calls))
    assert sorted(r.episode.seed for r in results) == sorted(e.seed for e in episodes)
    for result in results:
        assert result.success and not result.failure and not result.cause
        assert result.steps == result.episode.seed
        assert result.instruction == f"count to {result.episode.seed}"
        assert len(result.frames) == min(4, result.steps + 1)
        assert result.frames[0].max() == 0 and result.frames[-1].max() == result.steps
    assert max(calls) == 3
    # An action chunk is executed for two steps before the policy is asked again.
    assert sum(calls) == sum(-(-e.seed // 2) for e in episodes)


def test_ensembles_ask_at_every_step():
    calls = []
    run([Episode(5, "count", "train")], one_by_one(calls), executor=lambda: AdaptiveEnsemble(3))
    assert calls == [1] * 5


def test_what_goes_wrong_has_a_name_and_the_others_go_on():
    before = Counter.made
    tasks = ["count", "raise", "hang", "reset", "never"] + ["count"] * 4
    start = time.monotonic()
    results = run([Episode(4, task, "train") for task in tasks], timeout_s=0.5, max_steps=9)
    by_task = {r.episode.task: r for r in results}
    assert len(results) == 9 and time.monotonic() - start < 3
    assert sum(r.success for r in results) == 5
    assert "ZeroDivisionError: physics exploded" in by_task["raise"].failure
    assert "did not answer within 0.5 s" in by_task["hang"].failure
    assert "RuntimeError: no such scene" in by_task["reset"].failure
    assert by_task["never"].failure == "not done after 9 steps"
    assert causes(results) == {"error": 2, "timeout": 1, "task": 1}
    assert by_task["reset"].steps == 0 and by_task["reset"].frames == ()
    # A fresh environment after each error or hang.
    assert Counter.made - before == 3 + 3
    rates = success_rates(results, "task")
    assert str(rates["count"]) == "1.00 [0.57, 1.00] n=5"
    assert rates["hang"].successes == 0


def test_actions_that_are_not_finite_end_the_episode():
    def broken(observations, noise):
        chunks = one_by_one()(observations, noise)
        for chunk, observation in zip(chunks, observations, strict=True):
            if observation.state[1] == 4:
                chunk[1, 0] = np.nan
        return chunks

    results = run([Episode(seed, "count", "train") for seed in (4, 3, 5)], broken)
    failed = {r.episode.seed: r for r in results}
    assert failed[4].failure == "the policy's action at step 1 is not finite"
    assert (failed[4].cause, failed[4].steps) == ("policy", 1)
    assert failed[3].success and failed[5].success


def test_noise_depends_on_the_episode_alone():
    seen = {}

    def policy(observations, noise):
        for observation, own in zip(observations, noise, strict=True):
            seen.setdefault(tuple(observation.state), []).append(own)
        return one_by_one()(observations, noise)

    episodes = [Episode(seed, "count", "train") for seed in (3, 5, 2)]
    run(episodes, policy)
    run(episodes[::-1], policy, num_envs=1)
    assert len(seen) == 2 + 3 + 1
    for first, second in seen.values():
        np.testing.assert_array_equal(first, second)
    draws = np.stack([first for first, _ in seen.values()])
    assert len(np.unique(draws)) == draws.size


def test_no_episodes_and_bad_limits():
    assert run([]) == []
    assert success_rates([], "split") == {} == causes([])
    with pytest.raises(ValueError, match="above 0"):
        LoopConfig(num_envs=0)


# --- The tabletop and a real policy --------------------------------------------------------------

MODES = {"mean": 0.1, "std": 0.5, "max": 1.0, "min": -1.0, "q01": -0.5, "q99": 0.5}
STATISTICS = Statistics.from_dict(
    {
        "tabletop": {
            "action": {name: [value] * 7 for name, value in MODES.items()}
            | {"mask": [True] * 6 + [False]},
            "state": {name: [value] * 7 for name, value in MODES.items()},
            "num_transitions": 1,
            "num_trajectories": 1,
        }
    }
)


@pytest.fixture(scope="module")
def policy():
    model = tiny_policy(state_dim=7)
    image = ImageConfig(size=(56, 56), min_pixels=56 * 56)
    meta = Meta(model.cfg, PROMPT, image, ActionSpec())
    return Policy(model, random_params(model), meta, TOKENIZER, STATISTICS)


@pytest.fixture(scope="module")
def sampler(policy):
    return ChunkSampler(policy, views=("primary", "wrist"), batch_size=3)


def test_sampler_equals_the_policy_one_by_one(policy, sampler):
    environment = Tabletop(56)
    observations = [environment.reset(seed, "reach") for seed in range(2)]
    noise = np.random.default_rng(0).standard_normal((2, *sampler.chunk_shape)).astype(np.float32)
    chunks = sampler(observations, noise)
    assert chunks.shape == (2, 8, 7)
    for observation, own, chunk in zip(observations, noise, chunks, strict=True):
        images = [observation.images[view] for view in ("primary", "wrist")]
        want = policy.act(images, observation.instruction, state=observation.state, noise=own[None])
        np.testing.assert_allclose(chunk, want.actions[0], atol=1e-4)
    assert set(np.unique(chunks[..., 6])) <= {0, 1}
    with pytest.raises(PolicyError, match="no view side; it has primary, wrist"):
        ChunkSampler(policy, views=("side",), batch_size=1)(observations[:1], noise[:1])


def test_random_policy_on_the_tabletop(sampler):
    episodes = [Episode(seed, "reach", "train") for seed in range(3)]

    def rollouts(num_envs):
        results = run_episodes(
            sampler, sampler.chunk_shape, lambda: Tabletop(56), episodes,
            lambda: RecedingHorizon(8), LoopConfig(num_envs=num_envs),
        )  # fmt: skip
        return {r.episode.seed: (r.success, r.steps, r.failure) for r in results}

    both = rollouts(2)
    assert set(both) == {0, 1, 2}
    assert all(failure for success, _, failure in both.values() if not success)
    assert both == rollouts(1)


def test_broken_parameters_are_not_hidden_by_thresholds(policy, sampler, monkeypatch):
    params = policy.params | {"dit": jax.tree.map(lambda x: x * np.nan, policy.params["dit"])}
    monkeypatch.setattr(policy, "params", params)
    noise = np.zeros((1, *sampler.chunk_shape), np.float32)
    assert np.isnan(sampler([Tabletop(56).reset(0, "reach")], noise)).all()


def test_a_policy_without_statistics_is_refused(policy):
    bare = Policy(policy.model, policy.params, policy.meta, TOKENIZER)
    with pytest.raises(PolicyError, match="dataset_statistics"):
        ChunkSampler(bare, views=("primary",), batch_size=1)
