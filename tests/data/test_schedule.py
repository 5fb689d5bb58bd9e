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
from st4vla_jax.data.layout import (
    DIMENSIONS,
    LayoutError,
    deal,
    even_fit,
    first_fit_decreasing,
    fullest_fit,
    lay_out,
)
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


sizes_of_places = st.lists(
    st.tuples(
        st.integers(1, 60), st.sampled_from([0, 64, 128]), st.integers(0, 20), st.integers(0, 1)
    ),
    min_size=1,
    max_size=60,
)


@given(sizes_of_places)
@settings(max_examples=100, deadline=None)
def test_packers_place_every_item_within_capacity(items):
    sizes, capacity = np.array(items), np.array([100, 256, 30, 4])
    rows = first_fit_decreasing(sizes, capacity)
    packed = [rows, even_fit(sizes, capacity, int(rows.max()) + 1)]
    for found in packed:
        if found is not None:
            assert len(found) == len(items) and found.min() >= 0
            used = np.zeros((found.max() + 1, 4), np.int64)
            np.add.at(used, found, sizes)
            assert (used <= capacity).all() and used[:, 0].all()
    assert even_fit(sizes, capacity, len(items)) is not None
    rows = fullest_fit(sizes[:, 0], 100)
    assert np.bincount(rows, sizes[:, 0]).max() <= 100


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_packers_are_near_the_optimum(items):
    """Against all partitions of a few items: fullest fit within one row, first fit by 11/9 + 1."""
    sizes, room = np.array(items), 50

    def optimum(left, rows):
        if not left:
            return len(rows)
        first, *rest = left
        best = len(items)
        for i, used in enumerate(rows):
            if used + first <= room:
                best = min(best, optimum(rest, [*rows[:i], used + first, *rows[i + 1 :]]))
        return min(best, optimum(rest, [*rows, first])) if len(rows) < best else best

    best = optimum(sorted(items, reverse=True), [])
    assert fullest_fit(sizes, room).max() + 1 <= best + 1
    rows = first_fit_decreasing(sizes[:, None], np.array([room])).max() + 1
    assert rows <= best * 11 / 9 + 6 / 9


@given(sizes_of_places, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_dealing_is_even(items, steps):
    sizes = np.array(items)
    step = deal(sizes, np.zeros(len(sizes), np.int64), steps)
    assert step.min() >= 0 and step.max() < steps
    for own in (step, step[sizes[:, 3] == 1], step[sizes[:, 3] == 0]):
        counts = np.bincount(own, minlength=steps)
        assert counts.max() - counts.min() <= 1


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


@pytest.mark.parametrize(
    ("robot", "grounding", "tokens"), [(256, 64, 1024), (64, 16, 1024), (64, 16, 1152)]
)
def test_packing_efficiency_and_speed(robot, grounding, tokens):
    bridge, _ = robot_lengths(100_000, 2_600)
    config = ScheduleConfig(robot, grounding, tokens)
    own = schedule(config, ("bridge", (bridge,)), ("talk", (grounding_lengths(20_000),)))
    assert own.sequences >= 8
    used = [check_plan(own, step) for step in range(32)]
    assert np.mean(used) / (own.sequences * own.capacity.tokens) >= 0.9
    start = time.process_time()
    for window in range(100, 105):
        own.window(window)
    assert (time.process_time() - start) / 5 < 0.1


def duplicate_share(batches):
    """Share of samples whose batch holds another one of the same episode."""
    hits = total = 0
    for batch in batches:
        counts = np.bincount(batch)
        hits += counts[counts > 1].sum()
        total += len(batch)
    return hits / total


def test_duplicate_episodes_as_in_a_global_shuffle():
    """Lengths follow episodes, so an order or packing by length would put them together."""
    lengths, episode = robot_lengths(40_000, 1_050)
    config = ScheduleConfig(robot_samples=64, grounding_samples=16, tokens=1024)
    own = schedule(config, ("a", (lengths,)), ("talk", (grounding_lengths(9_000),)))
    steps = len(episode) // 64  # one epoch
    found = duplicate_share(
        episode[[d.index for d in draws(own.plan(s)) if d.member == 0]] for s in range(steps)
    )
    rng = np.random.default_rng(0)
    shuffles = [
        duplicate_share(rng.permutation(episode)[: steps * 64].reshape(steps, 64))
        for _ in range(20)
    ]
    assert abs(found - np.mean(shuffles)) < 3 * np.std(shuffles, ddof=1)


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


def test_lay_out_counts_all_dimensions():
    sizes = np.array([[10, 64, 5, 1]] * 8)
    layout = lay_out(sizes, np.zeros(8), 2, np.array([100, 0, 0, 2]))
    assert layout.sequences == 2 and layout.capacity.tolist() == [100, 128, 10, 2]
