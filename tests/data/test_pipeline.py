"""The same batches on any hosts and threads; trouble in reading is counted, named or raised."""

import dataclasses
import logging
import pickle
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from st4vla_jax.data.augment import Augment
from st4vla_jax.data.pipeline import DataSet, Pipeline, concatenate
from st4vla_jax.data.reading import ReadError, ReadPolicy
from st4vla_jax.data.schedule import ScheduleConfig, ScheduleError
from st4vla_jax.data.source import BadRecordError
from tests.reference.sources import ArmSource, BoxSource, encoder

CONFIG = ScheduleConfig(
    robot_samples=12, grounding_samples=8, tokens=640, multiple=8, window=4, seed=3
)
FAST = ReadPolicy(backoff_s=0.001)


def mixture(*changed, **settings):
    """Two robot sets, one with paraphrases, and a grounding set; weights 3 : 1 and 1."""
    robot = encoder(**settings)
    other = encoder("upstream", **settings)
    sets = [
        DataSet(ArmSource(), (robot, other), 3.0),
        DataSet(ArmSource(12, "small", seed=5), (robot,), 1.0),
        DataSet(BoxSource(), (robot,), 1.0),
    ]
    for number, source in changed:
        sets[number] = dataclasses.replace(sets[number], source=source)
    return sets


def take(pipeline, count, step=0):
    batches = pipeline.batches(step)
    result = [next(batches) for _ in range(count)]
    batches.close()
    return result


def assert_equal(one, other):
    leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves[0]) == len(leaves[1]) == 22
    for a, b in zip(*leaves, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("step", [0, 1_000_000])
def test_same_global_batches_on_any_hosts_and_threads(step):
    sets = mixture(augment=Augment())
    reference = take(Pipeline(sets, CONFIG, threads=0), 3, step)
    for hosts, threads in ((1, 8), (2, 0), (4, 8), (8, 2)):
        parts = [
            take(Pipeline(sets, CONFIG, host=h, num_hosts=hosts, threads=threads), 3, step)
            for h in range(hosts)
        ]
        for number, batch in enumerate(reference):
            assert_equal(batch, concatenate([part[number] for part in parts]))
    assert not np.array_equal(reference[0].vlm.patches, reference[1].vlm.patches)


def test_a_jump_equals_the_way_there():
    pipeline = Pipeline(mixture(augment=Augment()), CONFIG)
    assert_equal(take(pipeline, 7)[-1], take(pipeline, 1, 6)[0])


def test_a_jump_takes_under_a_second():
    start = time.monotonic()
    take(Pipeline(mixture(), CONFIG), 1, 1_000_000)
    assert time.monotonic() - start < 1


def test_seed_and_augmentation_matter():
    plain = take(Pipeline(mixture(), CONFIG), 1)[0]
    cropped = take(Pipeline(mixture(augment=Augment()), CONFIG), 1)[0]
    reseeded = take(Pipeline(mixture(), dataclasses.replace(CONFIG, seed=4)), 1)[0]
    assert not np.array_equal(plain.vlm.patches, cropped.vlm.patches)
    assert not np.array_equal(plain.vlm.tokens, reseeded.vlm.tokens)


def test_every_scheduled_sample_arrives_whole():
    pipeline = Pipeline(mixture(augment=Augment()), CONFIG)
    batch = take(pipeline, 1, 2)[0]
    plan = pipeline.schedule.plan(2)
    for row, draws in enumerate(plan):
        segments = np.unique(batch.vlm.segment_ids[row])
        assert segments.max() == len(draws)
        robots = [d for d in draws if d.member < 2]
        assert batch.action.valid[row].sum() == len(robots)
        lengths = batch.action.token_mask[row].sum(axis=-1)
        for k, draw in enumerate(robots):
            table = pipeline.schedule.members[draw.member].lengths[draw.paraphrase]
            assert lengths[k] == table.tokens[draw.index]
    assert sum(map(len, plan)) == CONFIG.robot_samples + CONFIG.grounding_samples


def test_shapes_are_constant():
    pipeline = Pipeline(mixture(), CONFIG)
    shapes = [jax.tree.map(np.shape, b) for b in take(pipeline, 5)]
    assert all(s == shapes[0] for s in shapes)
    capacity = pipeline.schedule.capacity
    assert shapes[0].vlm.tokens == (len(pipeline.rows), capacity.tokens)


def test_without_robot_data_there_is_no_action_side():
    sets = [DataSet(BoxSource(), (encoder(),))]
    pipeline = Pipeline(sets, dataclasses.replace(CONFIG, robot_samples=0))
    assert take(pipeline, 1)[0].action is None
    sets = [DataSet(ArmSource(), (encoder(),))]
    pipeline = Pipeline(sets, dataclasses.replace(CONFIG, grounding_samples=0))
    assert take(pipeline, 1)[0].vlm.targets.shape[1] == 0


def test_fingerprint():
    base = Pipeline(mixture(), CONFIG).fingerprint
    assert base == Pipeline(mixture(), dataclasses.replace(CONFIG, multiple=16)).fingerprint
    others = [
        Pipeline(mixture(), dataclasses.replace(CONFIG, seed=4)),
        Pipeline(mixture((1, ArmSource(13, "small", seed=5))), CONFIG),
        Pipeline(mixture(augment=Augment()), CONFIG),
        Pipeline(mixture(dino_size=42), CONFIG),
    ]
    assert len({base, *(p.fingerprint for p in others)}) == 5


def test_hosts_must_divide_the_sequences():
    with pytest.raises(ScheduleError, match="among 7 hosts; make multiple"):
        Pipeline(mixture(), CONFIG, num_hosts=7)


class Trouble(BoxSource):
    """Records for which ``on_read`` may raise or wait; it gets the index and the attempt."""

    def __init__(self, on_read):
        super().__init__()
        self.on_read, self.attempts = on_read, {}

    def __getitem__(self, index):
        self.attempts[index] = self.attempts.get(index, 0) + 1
        self.on_read(index, self.attempts[index])
        return super().__getitem__(index)


def grounding_draws(pipeline, step):
    return [[d.index for d in row if d.member == 2] for row in pipeline.schedule.plan(step)]


@pytest.mark.parametrize("threads", [0, 4])
def test_a_bad_record_becomes_padding_counted_and_named(threads, caplog):
    probe = Pipeline(mixture(), CONFIG)
    bad = grounding_draws(probe, 0)
    bad = next(i for row in bad for i in row)

    def on_read(index, attempt):
        if index == bad:
            raise BadRecordError(f"boxes.jsonl line {index}: does not decode")

    with caplog.at_level(logging.WARNING):
        pipeline = Pipeline(mixture((2, Trouble(on_read))), CONFIG, threads=threads)
        batch, clean = take(pipeline, 1)[0], take(probe, 1)[0]
    assert f"boxes[{bad}] becomes padding, bad record 1 of at most 100" in caplog.text
    assert pipeline.bad_records == [f"boxes.jsonl line {bad}: does not decode"]
    for row, draws in enumerate(pipeline.schedule.plan(0)):
        hit = any(d.member == 2 and d.index == bad for d in draws)
        count = len(draws) - hit
        assert batch.vlm.segment_ids[row].max() == count
        if not hit:
            np.testing.assert_array_equal(batch.vlm.tokens[row], clean.vlm.tokens[row])
    take(pipeline, 40)
    assert len(pipeline.bad_records) == 1  # once, however often it is drawn


def test_too_many_bad_records_are_an_error():
    def on_read(index, attempt):
        raise BadRecordError(f"line {index} is broken")

    policy = dataclasses.replace(FAST, max_bad_records=3)
    pipeline = Pipeline(mixture((2, Trouble(on_read))), CONFIG, policy=policy, threads=0)
    with pytest.raises(ReadError, match="4 bad records, max_bad_records is 3.*\n.*is broken"):
        take(pipeline, 5)


def test_an_error_is_not_followed_by_batches():
    def on_read(index, attempt):
        raise BadRecordError("broken")

    policy = dataclasses.replace(FAST, max_bad_records=0)
    batches = Pipeline(mixture((2, Trouble(on_read))), CONFIG, policy=policy).batches()
    for _ in range(3):
        with pytest.raises(ReadError, match="max_bad_records is 0"):
            next(batches)
    assert batches.step == 0


def test_non_finite_actions_are_a_bad_record():
    class Broken(ArmSource):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            sample.robot.actions[0, 0] = np.nan
            return sample

    pipeline = Pipeline(mixture((1, Broken(12, "small", seed=5))), CONFIG)
    batch = take(pipeline, 1)[0]
    robots = [d.member for row in pipeline.schedule.plan(0) for d in row if d.member < 2]
    assert batch.action.valid.sum() == robots.count(0)
    assert pipeline.bad_records and "not finite" in pipeline.bad_records[0]


def test_a_read_that_fails_once_changes_nothing(caplog):
    def on_read(index, attempt):
        if attempt == 1:
            raise OSError(5, "Input/output error")

    flaky = Pipeline(mixture((2, Trouble(on_read))), CONFIG, policy=FAST)
    with caplog.at_level(logging.WARNING):
        batch = take(flaky, 1)[0]
    assert_equal(batch, take(Pipeline(mixture(), CONFIG), 1)[0])
    assert "Input/output error; trying again" in caplog.text and not flaky.bad_records


def test_a_read_that_fails_for_ever_is_raised():
    def on_read(index, attempt):
        raise OSError(5, "Input/output error")

    source = Trouble(on_read)
    pipeline = Pipeline(mixture((2, source)), CONFIG, policy=FAST)
    with pytest.raises(ReadError, match=r"boxes\[\d+\]: .*Input/output error \(tried 4 times\)"):
        take(pipeline, 1)
    assert max(source.attempts.values()) == 4 and not pipeline.bad_records


@pytest.mark.parametrize("threads", [0, 2])
def test_a_read_that_hangs_is_announced_then_given_up(threads, caplog):
    release = threading.Event()
    policy = dataclasses.replace(FAST, warn_s=0.05, limit_s=0.3)
    source = Trouble(lambda index, attempt: release.wait())
    pipeline = Pipeline(mixture((2, source)), CONFIG, policy=policy, threads=threads)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(ReadError, match=r"reading boxes\[\d+\]"):
        take(pipeline, 1)
    assert 0.3 <= time.monotonic() - start < 5
    assert "has not returned for 0 s; giving up at 0 s" in caplog.text
    release.set()


def test_slow_reads_that_go_on_are_not_given_up():
    policy = dataclasses.replace(FAST, warn_s=0.2, limit_s=0.4)
    source = Trouble(lambda index, attempt: time.sleep(0.05))
    sets = [DataSet(source, (encoder(),))]
    config = ScheduleConfig(0, 16, tokens=4096, window=2)
    pipeline = Pipeline(sets, config, policy=policy, threads=0)
    assert len(pipeline.rows) == 1  # 16 reads of 0.05 s in one row: longer than the limit
    take(pipeline, 1)


HANGS = """
import time
from st4vla_jax.data.pipeline import DataSet, Pipeline
from st4vla_jax.data.reading import ReadPolicy
from st4vla_jax.data.schedule import ScheduleConfig
from tests.reference.sources import BoxSource, encoder
class Hangs(BoxSource):
    def __getitem__(self, index):
        time.sleep(1000)
pipeline = Pipeline([DataSet(Hangs(), (encoder(),))], ScheduleConfig(0, 8, tokens=640, window=2),
                    policy=ReadPolicy(warn_s=0.1, limit_s=0.5))
next(pipeline.batches())
"""


def test_a_process_with_a_hanging_read_ends():
    result = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "ReadError: reading boxes[" in result.stderr


def test_a_sample_longer_than_its_index_is_an_error():
    class Longer(BoxSource):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            turns = (dataclasses.replace(sample.turns[0], text="<image>" + "?" * 60),)
            return dataclasses.replace(sample, turns=turns + sample.turns[1:])

    with pytest.raises(ScheduleError, match=r"boxes\[\d+\] \(boxes line \d+\) takes .*delete the"):
        take(Pipeline(mixture((2, Longer())), CONFIG), 1)


def test_no_tensorflow_torch_or_jax_in_sources_and_encoder():
    code = (
        "import sys, st4vla_jax.data.source, st4vla_jax.data.shuffle, st4vla_jax.data.layout, "
        "st4vla_jax.data.reading, st4vla_jax.data.pipeline; "
        "print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_fake_sources_are_small_when_pickled():
    assert len(pickle.dumps(BoxSource())) < 1024
