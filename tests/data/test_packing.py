"""Packing: every sample comes back out of its row; overflows are all named."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.packing import Capacity, PackingError, RobotArrays, pack
from st4vla_jax.data.prompts import PromptConfig
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from st4vla_jax.data.transforms import encode

TOKENIZER = byte_level_tokenizer()
PAD = TOKENIZER.pad
SIZES = [(28, 28), (84, 140), (112, 112), (140, 196), (56, 252)]


def sample(sizes, text="look", answer=None, seed=0):
    """A grounding sample, or a prompt where ``answer`` is None."""
    rng = np.random.default_rng(seed)
    turns = [Turn("user", "<image>" * len(sizes) + text)]
    if answer is not None:
        turns.append(Turn("assistant", answer))
    return encode(
        turns,
        [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes],
        TOKENIZER,
        system=PromptConfig().system,
        image_config=ImageConfig(min_pixels=784),
        add_generation_prompt=answer is None,
        supervise=answer is not None,
        group=seed,
    )


def robot(views=1, seed=0, state=None, chunk=4, side=28):
    rng = np.random.default_rng(seed)
    return RobotArrays(
        dino_images=rng.integers(0, 256, (views, side, side, 3), np.uint8),
        view_mask=np.ones(views, bool),
        state=None if state is None else rng.normal(size=state).astype(np.float32),
        actions=rng.normal(size=(chunk, 7)).astype(np.float32),
        action_mask=rng.random((chunk, 7)) < 0.7,
        embodiment=seed + 1,
        group=seed + 2,
    )


SAMPLES = [sample([SIZES[i % 5]] * (i % 3), "x" * i, "yes" * i if i % 2 else None, i)
           for i in range(6)]  # fmt: skip


def check_row(batch, b, row):
    """Recovers each sample of a row from the packed arrays."""
    vlm = batch.vlm
    robots = windows = images = 0
    for number, (own, action) in enumerate(row, start=1):
        at = np.flatnonzero(vlm.segment_ids[b] == number)
        np.testing.assert_array_equal(vlm.tokens[b, at], own.tokens)
        np.testing.assert_array_equal(vlm.positions[b, at], own.positions)
        np.testing.assert_array_equal(vlm.vision_index[b, at] >= 0, own.vision_index >= 0)
        slots = 4 * vlm.vision_index[b, at][own.vision_index >= 0, None] + np.arange(4)
        before = 4 * own.vision_index[own.vision_index >= 0, None] + np.arange(4)
        for name in ("patches", "patch_hw"):
            packed, source = getattr(vlm, name), getattr(own.slots, name)
            np.testing.assert_array_equal(packed[b][slots], source[before])
        for name, offset in (("patch_image", images), ("patch_window", windows)):
            packed, source = getattr(vlm, name), getattr(own.slots, name)
            np.testing.assert_array_equal(packed[b][slots], source[before] + offset)
            assert (source[before] > 0).all()
        np.testing.assert_array_equal(slots % 64, before % 64)  # windows stay within their bins
        mine = np.isin(vlm.target_index[b], at) & (vlm.target_weight[b] > 0)
        np.testing.assert_array_equal(vlm.targets[b, mine], own.targets)
        np.testing.assert_array_equal(vlm.target_index[b, mine], own.target_index + at[0])
        assert set(vlm.target_group[b, mine]) <= {own.group}
        images += len(own.slots.grids)
        windows += own.slots.patch_window.max(initial=0)
        if action is not None:
            check_robot(batch.action, b, robots, at, action)
            robots += 1
    assert (vlm.segment_ids[b] > 0).sum() == sum(len(own.tokens) for own, _ in row)
    padding = vlm.segment_ids[b] == 0
    assert (vlm.tokens[b, padding] == PAD).all()
    assert (vlm.vision_index[b, padding] == -1).all()
    unused = vlm.target_weight[b] == 0
    assert unused.sum() == vlm.targets.shape[1] - sum(len(own.targets) for own, _ in row)
    assert not vlm.target_index[b, unused].any()
    if batch.action is not None:
        assert batch.action.valid[b].sum() == robots
        assert not batch.action.token_mask[b, robots:].any()


def check_robot(action, b, k, at, own):
    np.testing.assert_array_equal(action.token_index[b, k][action.token_mask[b, k]], at)
    views = len(own.dino_images)
    np.testing.assert_array_equal(action.dino_images[b, k, :views], own.dino_images)
    np.testing.assert_array_equal(np.flatnonzero(action.view_mask[b, k]), np.arange(views))
    for name in ("actions", "action_mask", "embodiment", "state"):
        if getattr(own, name) is not None:
            np.testing.assert_array_equal(getattr(action, name)[b, k], getattr(own, name))
    assert action.sample_group[b, k] == own.group
    assert action.valid[b, k]


@settings(max_examples=60, deadline=None)
@given(
    layout=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=3),
    multiple=st.sampled_from([1, 64]),
    state=st.sampled_from([None, (5,)]),
)
def test_every_sample_comes_back(layout, multiple, state):
    rows = [
        [(SAMPLES[i], robot(1 + i // 2, i, state) if i % 2 == 0 else None) for i in row]
        for row in layout
    ]
    capacity = Capacity.fit(rows, multiple)
    assert capacity.tokens % multiple == capacity.slots % 64 == 0
    batch = pack(rows, capacity, pad_id=PAD)
    assert (batch.action is None) == (capacity.robot == 0)
    for b, row in enumerate(rows):
        check_row(batch, b, row)


def test_shapes_and_dtypes_are_the_contract():
    rows = [[(SAMPLES[2], robot(2, state=(5,))), (SAMPLES[1], None)], []]
    capacity = Capacity(tokens=512, slots=640, targets=9, robot=3, sample_tokens=300, views=2)
    batch = pack(rows, capacity, pad_id=PAD)
    found = {k: (v.dtype.name, v.shape) for k, v in vars(batch.vlm).items()}
    t, p, m = (2, 512), (2, 640), (2, 9)
    assert found == {
        "tokens": ("int32", t), "positions": ("int32", (*t, 3)), "segment_ids": ("int32", t),
        "patches": ("uint8", (*p, 588)), "patch_hw": ("int32", (*p, 2)),
        "patch_image": ("int32", p), "patch_window": ("int32", p), "vision_index": ("int32", t),
        "target_index": ("int32", m), "targets": ("int32", m), "target_weight": ("float32", m),
        "target_group": ("int32", m),
    }  # fmt: skip
    found = {k: (v.dtype.name, v.shape) for k, v in vars(batch.action).items()}
    k = (2, 3)
    assert found == {
        "token_index": ("int32", (*k, 300)), "token_mask": ("bool", (*k, 300)),
        "dino_images": ("uint8", (*k, 2, 28, 28, 3)), "view_mask": ("bool", (*k, 2)),
        "state": ("float32", (*k, 5)), "actions": ("float32", (*k, 4, 7)),
        "action_mask": ("bool", (*k, 4, 7)), "valid": ("bool", k), "embodiment": ("int32", k),
        "sample_group": ("int32", k),
    }  # fmt: skip
    assert not batch.action.token_index[~batch.action.token_mask].any()


def test_text_only_rows_need_no_slots_and_no_targets():
    batch = pack([[(SAMPLES[0], None)]], Capacity(tokens=256, slots=0), pad_id=PAD)
    assert batch.vlm.patches.shape == (1, 0, 588)
    assert batch.vlm.targets.shape == (1, 0)
    assert batch.action is None


def test_every_overflow_is_named():
    rows = [[(SAMPLES[5], None)], [(SAMPLES[2], robot(3)), (SAMPLES[4], robot())]]
    capacity = Capacity(tokens=16, slots=64, targets=1, robot=1, sample_tokens=8, views=2)
    with pytest.raises(PackingError) as e:
        pack(rows, capacity, pad_id=PAD)
    for text in ("row 0 needs tokens", "row 0 needs targets", "row 1 needs tokens",
                 "row 1 needs slots", "row 1 needs robot 2, capacity.robot is 1",
                 "row 1 needs sample_tokens", "row 1 needs views 3"):  # fmt: skip
        assert text in str(e.value)
    assert "row 0 needs robot" not in str(e.value)


def test_robot_samples_must_agree():
    others = [robot(state=(5,)), robot(chunk=8), robot(side=42)]
    rows = [[(SAMPLES[0], own) for own in (robot(), *others)]]
    with pytest.raises(PackingError) as e:
        pack(rows, Capacity.fit(rows), pad_id=PAD)
    for name in ("views", "state", "actions"):
        assert f"shape of {name}" in str(e.value)
    bad = dataclasses.replace(robot(), action_mask=np.ones((3, 7), bool))
    rows = [[(SAMPLES[0], bad)]]
    with pytest.raises(PackingError, match="robot sample 0: view_mask and action_mask"):
        pack(rows, Capacity.fit(rows), pad_id=PAD)


def test_a_batch_whose_robot_samples_are_all_missing():
    rows = [[(SAMPLES[1], None)]]
    capacity = Capacity(512, 640, 9, robot=1, sample_tokens=300, views=2)
    with pytest.raises(PackingError, match="like"):
        pack(rows, capacity, pad_id=PAD)
    batch = pack(rows, capacity, pad_id=PAD, like=robot(state=(5,)))
    assert not batch.action.valid.any()
    assert batch.action.state.shape == (1, 1, 5)


def test_unused_token_indices_can_point_at_padding():
    rows = [[(SAMPLES[0], robot()), (SAMPLES[2], robot())]]
    used = sum(len(s.tokens) for s, _ in rows[0])
    capacity = dataclasses.replace(Capacity.fit(rows), tokens=used + 2)
    action = pack(rows, capacity, pad_id=PAD, pad_robot_tokens_at_padding=True).action
    assert (~action.token_mask).any()
    assert (action.token_index[~action.token_mask] == used).all()
    plain = pack(rows, capacity, pad_id=PAD).action
    np.testing.assert_array_equal(action.token_mask, plain.token_mask)
    np.testing.assert_array_equal(
        action.token_index[action.token_mask], plain.token_index[plain.token_mask]
    )
    full = dataclasses.replace(capacity, tokens=used)
    with pytest.raises(PackingError, match="row 0 has no padding token"):
        pack(rows, full, pad_id=PAD, pad_robot_tokens_at_padding=True)


def test_capacity_errors():
    with pytest.raises(PackingError, match="slots 100 is not a multiple of 64"):
        Capacity(tokens=8, slots=100)
    with pytest.raises(PackingError, match="no rows"):
        Capacity.fit([])
    with pytest.raises(PackingError, match="no rows"):
        pack([], Capacity(tokens=8, slots=0), pad_id=PAD)
