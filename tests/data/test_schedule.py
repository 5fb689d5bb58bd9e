"""Packing, dealing, epochs and shares: properties of the batch schedule, by brute force."""

import dataclasses
import itertools
import logging
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.classes import classify
from st4vla_jax.data.encoder import UNUSABLE
from st4vla_jax.data.layout import DIMENSIONS, LayoutError
from st4vla_jax.data.preview import longer_sequences
from st4vla_jax.data.schedule import Member, Schedule, ScheduleConfig, ScheduleError
from st4vla_jax.data.source import Lengths


def robot_lengths(count, episodes, seed=0, low=106, high=122):
    """Bridge at 224 px: 64 image tokens, a prompt, an instruction; equal within an episode."""
    rng = np.random.default_rng(seed)
    episode = np.sort(rng.integers(0, episodes, count))
    tokens = rng.integers(low, high, episodes)[episode].astype(np.int32)
    ones = np.ones(count, np.int32)
    return Lengths(tokens, 256 * ones, 0 * ones, ones), episode


def grounding_lengths(count, seed=1):
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(5.2, 0.4, count), 90, 900).astype(np.int32)
    targets = np.clip(rng.lognormal(3.3, 0.5, count), 8, 80).astype(np.int32)
    slots = rng.choice([192, 256, 320], count).astype(np.int32)
    return Lengths(tokens, slots, targets, np.zeros(count, np.int32))


def schedule(config, *members):
    return Schedule(config, [m if isinstance(m, Member) else Member(*m) for m in members])


def draws(plan):
    return [draw for row in plan for draw in row]


def check_plan(own, step):
    """No sequence of a step is over any capacity; returns the tokens used."""
    plan = own.plan(step)
    assert len(plan) == own.sequences
    used = np.zeros((own.sequences, 4), np.int64)
    for row, placed in enumerate(plan):
        for d in placed:
            table = own.members[d.member].lengths[d.paraphrase]
            used[row] += [getattr(table, name)[d.index] for name in DIMENSIONS]
    limits = [getattr(own.capacity, name) for name in DIMENSIONS]
    assert (used <= limits).all()
    return used[:, 0].sum()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_nothing_is_cut_or_lost_in_random_mixtures(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    members = []
    for number in range(data.draw(st.integers(1, 4))):
        count = int(rng.integers(1, 300))
        robot = number % 2 == 0
        tables = []
        slots = rng.choice([64, 128], count).astype(np.int32)
        targets = np.where(robot, 0, rng.integers(1, 60, count)).astype(np.int32)
        for _ in range(int(rng.integers(1, 4)) if robot else 1):
            tokens = rng.integers(20, 420, count).astype(np.int32)
            tables.append(Lengths(tokens, slots, targets, np.full(count, robot, np.int32)))
        members.append(Member(f"set{number}", tuple(tables), float(rng.uniform(0.1, 3))))
    config = ScheduleConfig(
        robot_samples=int(rng.integers(1, 20)),
        grounding_samples=int(rng.integers(1, 20)) if len(members) > 1 else 0,
        tokens=512, window=int(rng.integers(1, 9)), multiple=int(rng.integers(1, 4)),
        seed=int(rng.integers(100)),
    )  # fmt: skip
    own = Schedule(config, members)
    assert own.sequences % config.multiple == 0
    for window in (0, 1, 7, 123_456_789):
        first = window * config.window
        seen = Counter()
        for step in range(first, first + config.window):
            check_plan(own, step)
            seen.update(members[d.member].is_robot for d in draws(own.plan(step)))
        assert seen[True] == config.window * config.robot_samples
        assert seen[False] == config.window * config.grounding_samples


BRIDGE, _ = robot_lengths(4_000, 110)
ROBOT, _ = robot_lengths(1_777, 50, seed=2)
TALK = grounding_lengths(1_500)
CONFIG = ScheduleConfig(robot_samples=48, grounding_samples=12, tokens=1024, window=8, seed=1)


def test_every_sample_once_in_each_epoch():
    own = schedule(CONFIG, ("a", (BRIDGE,), 3.0), ("b", (ROBOT,), 1.0), ("talk", (TALK,), 1.0))
    seen = [Counter() for _ in own.members]
    for step in range(260):
        for d in draws(own.plan(step)):
            seen[d.member][d.epoch, d.index] += 1
    for member, counts in zip(own.members, seen, strict=True):
        size = len(member.lengths[0].tokens)
        assert set(counts.values()) == {1}
        per_epoch = Counter(epoch for epoch, _ in counts)
        last = max(per_epoch)
        assert last >= 1  # more than one epoch was seen
        assert all(per_epoch[e] == size for e in range(last))


def test_epochs_have_other_orders():
    """A window a whole epoch later draws the same classes, but other samples."""
    lengths, _ = robot_lengths(10 * CONFIG.robot_samples * CONFIG.window, 110)
    own = schedule(dataclasses.replace(CONFIG, grounding_samples=0), ("a", (lengths,)))
    for window in (0, 3, 20):
        one, other = (
            {d.index for plan in own.window(w) for row in plan for d in row}
            for w in (window, window + 10)
        )
        assert len(one) == len(lengths.tokens) // 10
        assert len(one & other) < 0.2 * len(one)


def test_shares_over_10_000_samples():
    weights = [0.55, 0.3, 0.15]
    members = [(f"s{i}", (robot_lengths(900 + i, 30, i)[0],), w) for i, w in enumerate(weights)]
    own = schedule(dataclasses.replace(CONFIG, grounding_samples=0), *members)
    for start in (0, 1_000_003):
        counts = Counter()
        for step in itertools.count(start):
            counts.update(d.member for d in draws(own.plan(step)))
            if counts.total() >= 10_000:
                break
        shares = np.array([counts[i] for i in range(3)]) / counts.total()
        assert np.abs(shares - weights).max() < 0.005


def test_shares_are_exact_over_windows():
    weights = np.array([np.pi, np.e, 1.0])
    members = [(f"s{i}", (robot_lengths(500, 30, i)[0],), w) for i, w in enumerate(weights)]
    config = dataclasses.replace(CONFIG, grounding_samples=0, robot_samples=3, window=2)
    own = schedule(config, *members)
    counts = Counter()
    for step in range(600):
        counts.update(d.member for d in draws(own.plan(step)))
        if step % 2:
            exact = counts.total() * weights / weights.sum()
            assert np.abs(exact - [counts[i] for i in range(3)]).max() <= 1 + 1e-6


def test_all_steps_are_alike():
    own = schedule(CONFIG, ("a", (BRIDGE,)), ("talk", (TALK,)))
    for step in range(40):
        counts = Counter(d.member for d in draws(own.plan(step)))
        assert counts[0] == CONFIG.robot_samples
        assert abs(counts[1] - CONFIG.grounding_samples) <= 2


@pytest.mark.parametrize("hosts", [2, 4])
def test_all_hosts_are_alike(hosts):
    config = dataclasses.replace(CONFIG, robot_samples=256, grounding_samples=64, multiple=hosts)
    own = schedule(config, ("a", (BRIDGE,)), ("talk", (TALK,)))
    for step in range(4):
        blocks = np.array_split(np.arange(own.sequences), hosts)
        plan = own.plan(step)
        counts = [sum(d.member == 0 for i in block for d in plan[i]) for block in blocks]
        assert max(counts) - min(counts) <= 0.25 * 256 / hosts


LARGE, LARGE_EPISODE = robot_lengths(100_000, 2_600)
LONG_TALK = grounding_lengths(20_000)


def efficiency(own, steps=16):
    """Of the tokens, by adding up what every step holds."""
    used = np.mean([check_plan(own, step) for step in range(steps)])
    assert own.efficiency == pytest.approx(used / (own.sequences * own.capacity.tokens), rel=0.01)
    return used / (own.sequences * own.capacity.tokens)


@pytest.mark.parametrize("share", [2, 4, 8])
def test_packing_efficiency_of_small_updates(share):
    """All updates of 48 to 128 robot samples in steps of 16, with 1/2, 1/4 and 1/8 of grounding."""
    found = {}
    for robot in range(48, 129, 16):
        config = ScheduleConfig(robot, robot // share, 1024)
        own = schedule(config, ("bridge", (LARGE,)), ("talk", (LONG_TALK,)))
        if own.sequences >= 8:
            found[robot] = efficiency(own)
    assert len(found) > 4 and min(found.values()) >= 0.9, found


def test_packing_efficiency_and_speed_of_the_papers_update():
    own = schedule(ScheduleConfig(), ("bridge", (LARGE,)), ("talk", (LONG_TALK,)))
    assert efficiency(own, 32) >= 0.95
    start = time.process_time()
    for window in range(100, 105):
        own.window(window)
    assert (time.process_time() - start) / 5 < 0.1


@pytest.mark.parametrize("multiple", [1, 8])
def test_what_whole_sequences_cost_is_said(multiple, caplog):
    """A multiple of sequences can forbid 90 %; then a warning and the preview say what helps."""
    for robot, grounding in ((76, 38), (56, 12)):
        caplog.clear()
        config = ScheduleConfig(robot, grounding, 1024, multiple=multiple)
        own = schedule(config, ("bridge", (LARGE,)), ("talk", (LONG_TALK,)))
        found, tokens = efficiency(own), own.capacity.tokens
        used = found * own.sequences * tokens
        whole = multiple * tokens
        assert own.bound == pytest.approx(used / (np.ceil(used / whole) * whole), rel=0.01)
        # Beside the whole number of sequences, nothing costs more than 4 % of the tokens.
        assert own.sequences <= np.ceil(1.04 * used / whole) * multiple
        assert (found < 0.9) == ("allows" in caplog.text)
        for longer, sequences, better in longer_sequences(own):
            other = schedule(dataclasses.replace(config, tokens=longer, sequences=sequences),
                             ("bridge", (LARGE,)), ("talk", (LONG_TALK,)))  # fmt: skip
            assert sequences % multiple == 0 and longer % 128 == 0
            assert efficiency(other) == pytest.approx(better, rel=0.01) and better > found


def test_a_shorter_length_is_taken_where_it_packs_better():
    """Eight devices, samples for five sequences of 1024: eight shorter ones, the same samples."""
    short = dataclasses.replace(LONG_TALK, tokens=np.minimum(LONG_TALK.tokens, 500))
    members = ("bridge", (LARGE,)), ("talk", (short,))
    config = ScheduleConfig(30, 8, 1024, multiple=8)
    own = schedule(config, *members)
    assert own.capacity.tokens < 1024 and own.capacity.tokens % 128 == 0 and own.sequences == 8
    exact = schedule(dataclasses.replace(config, sequences=8), *members)
    assert exact.capacity.tokens == 1024 and efficiency(own) > 1.2 * efficiency(exact)
    one = schedule(dataclasses.replace(config, multiple=1), *members)
    for step in (0, 77):
        assert sorted(map(repr, draws(one.plan(step)))) == sorted(map(repr, draws(own.plan(step))))


def duplicate_share(batches):
    """Share of the samples i64[steps,K] whose step holds another one of the same episode."""
    batches = np.sort(batches, axis=1)
    same = batches[:, 1:] == batches[:, :-1]
    none = np.zeros((len(batches), 1), bool)
    return (np.hstack([none, same]) | np.hstack([same, none])).mean()


def test_duplicate_share_by_hand():
    assert duplicate_share(np.array([[1, 2, 1, 3], [5, 5, 5, 5], [1, 2, 3, 4]])) == 6 / 12


def test_duplicate_episodes_as_in_a_global_shuffle():
    """Lengths follow episodes, so an order or packing by length would put them together.

    Of eight runs none is 3 sigma from true shuffles, nor is the mean of all eight.
    """
    scores = []
    for seed in range(8):
        lengths, episode = robot_lengths(30_000, 800, seed=seed)
        config = ScheduleConfig(robot_samples=64, grounding_samples=16, tokens=1024, seed=seed)
        own = schedule(config, ("a", (lengths,)), ("talk", (TALK,)))
        steps = len(episode) // 64  # one epoch
        drawn = [[d.index for d in draws(own.plan(s)) if d.member == 0] for s in range(steps)]
        rng = np.random.default_rng(seed)
        shuffles = [
            duplicate_share(rng.permutation(episode)[: steps * 64].reshape(steps, 64))
            for _ in range(60)
        ]
        found = duplicate_share(episode[np.array(drawn)])
        scores.append((found - np.mean(shuffles)) / np.std(shuffles, ddof=1))
    assert np.abs(scores).max() < 3 and abs(np.mean(scores)) < 3 / np.sqrt(8), scores


def test_paraphrases_take_turns():
    tables = tuple(dataclasses.replace(BRIDGE, tokens=BRIDGE.tokens + extra) for extra in (0, 9, 4))
    own = schedule(CONFIG, ("a", tables), ("talk", (TALK,)))
    seen, first = {}, Counter()
    for step in range(260):
        check_plan(own, step)
        for d in draws(own.plan(step)):
            if d.member == 0:
                seen.setdefault(d.index, {})[d.epoch] = d.paraphrase
                first[d.paraphrase] += d.epoch == 0
    assert len(seen) == len(BRIDGE.tokens)
    assert all({p[0], p[1], p[2]} == {0, 1, 2} for p in seen.values())
    assert min(first.values()) > 0.3 * len(BRIDGE.tokens)


def test_samples_that_fit_nowhere_are_named(caplog):
    tokens = BRIDGE.tokens.copy()
    tokens[[5, 77]] = 1025, UNUSABLE
    with caplog.at_level(logging.WARNING):
        own = schedule(
            CONFIG, ("a", (dataclasses.replace(BRIDGE, tokens=tokens),)), ("talk", (TALK,))
        )
    np.testing.assert_array_equal(own.dropped[0], [5, 77])
    assert "a: 2 of 4000 samples fit no sequence" in caplog.text
    assert "[5] (1025 tokens), [77] (unusable)" in caplog.text
    seen = {d.index for step in range(90) for d in draws(own.plan(step)) if d.member == 0}
    assert len(seen) == 3998


def test_given_sequences_that_do_not_hold_name_what_would():
    members = ("a", (BRIDGE,)), ("talk", (TALK,))
    base = schedule(CONFIG, *members)
    fewer = dataclasses.replace(CONFIG, sequences=base.sequences - 2)
    with pytest.raises(LayoutError, match="it would fit with tokens (\\d+) instead of 1024") as e:
        schedule(fewer, *members)
    tokens = int(str(e.value).split("fit with tokens ")[1].split()[0])
    assert schedule(dataclasses.replace(fewer, tokens=tokens), *members).sequences
    tight = dataclasses.replace(CONFIG, sequences=base.sequences + 2, robot=3)
    with pytest.raises(LayoutError, match="it would fit with robot \\d instead of 3"):
        schedule(tight, *members)
    more = dataclasses.replace(CONFIG, sequences=base.sequences + 3)
    assert schedule(more, *members).sequences == base.sequences + 3


def test_given_capacities_are_kept():
    config = dataclasses.replace(CONFIG, slots=1536, targets=200, robot=6)
    own = schedule(config, ("a", (BRIDGE,)), ("talk", (TALK,)))
    assert (own.capacity.slots, own.capacity.targets, own.capacity.robot) == (1536, 200, 6)
    for step in range(8):
        check_plan(own, step)


def test_steps_hold_the_same_samples_whatever_the_devices():
    members = ("a", (BRIDGE,)), ("talk", (TALK,))
    one, other = (schedule(dataclasses.replace(CONFIG, multiple=m), *members) for m in (1, 3))
    assert one.sequences != other.sequences
    for step in (0, 5, 1_000_000):
        assert sorted(map(repr, draws(one.plan(step)))) == sorted(
            map(repr, draws(other.plan(step)))
        )


def test_mixture_problems_are_all_named():
    empty = Lengths(*(np.zeros(0, np.int32),) * 4)
    both = dataclasses.replace(BRIDGE, robot=np.arange(4000, dtype=np.int32) % 2)
    other = dataclasses.replace(BRIDGE, slots=BRIDGE.slots + 64)
    with pytest.raises(ScheduleError) as e:
        schedule(
            dataclasses.replace(CONFIG, grounding_samples=0),
            ("none", (empty,)), ("both", (both,)), ("odd", (BRIDGE, other)),
            ("zero", (BRIDGE,), 0.0),
        )  # fmt: skip
    for text in (
        "none: it has no samples", "both: robot and grounding", "odd: paraphrases may",
        "zero: weight 0.0 is not positive", "grounding_samples is 0, but none",
    ):  # fmt: skip
        assert text in str(e.value)
    with pytest.raises(ScheduleError, match="no sample of a fits a sequence of 64 tokens"):
        schedule(dataclasses.replace(CONFIG, tokens=64, grounding_samples=0), ("a", (BRIDGE,)))
    with pytest.raises(ScheduleError, match="both 0.*multiple of 64.*sequences 5"):
        ScheduleConfig(0, 0, slots=65, sequences=5, multiple=2)


def test_classes_hold_their_members():
    tables = [TALK, dataclasses.replace(TALK, tokens=TALK.tokens[::-1].copy())]
    kept = np.arange(3, 1400)
    classes = classify(tables, kept, 200)
    assert len(classes.boxes) > 8
    for order in classes.order:
        np.testing.assert_array_equal(np.sort(order), kept)
    table, order = tables[0], classes.order[0]
    for i, (begin, end) in enumerate(itertools.pairwise(classes.starts)):
        own = np.stack([table.tokens, table.slots, table.targets], 1)[order[begin:end]]
        assert (own <= classes.boxes[i]).all()
    chain = classes.kinds[:-1] == classes.kinds[1:]
    assert (classes.boxes[:-1][chain] >= classes.boxes[1:][chain]).all()
    waste = classes.boxes[np.searchsorted(classes.starts, np.arange(len(kept)), "right") - 1, 0]
    assert waste.sum() / table.tokens[kept].sum() < 1.1
