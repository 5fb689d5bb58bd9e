"""What the index promises is what a sample takes; the arrays are those that the policy sees."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.augment import Augment
from st4vla_jax.data.encoder import UNUSABLE, SampleEncoder
from st4vla_jax.data.image import ImageConfig, resize
from st4vla_jax.data.normalize import ActionSpec, StatisticsError
from st4vla_jax.data.prompts import TEMPLATES, PromptConfig
from st4vla_jax.data.source import BadRecordError, Region, RobotStep, Sample, Turn
from st4vla_jax.data.tokenizer import Tokenizer, byte_level_tokenizer
from st4vla_jax.data.transforms import dino_views, encode_robot
from tests.reference.sources import IMAGES, STATISTICS, encoder

RNG = np.random.default_rng


def robot_sample(sizes=((56, 84),), instruction="pick up the cup", seed=0, **step):
    rng = RNG(seed)
    fields = {
        "actions": rng.normal(size=(4, 7)).astype(np.float32), "action_mask": np.ones(4, bool),
        "state": rng.normal(size=5).astype(np.float32), "embodiment": "arm", **step,
    }  # fmt: skip
    return Sample(
        tuple(rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes),
        (Turn("user", instruction),),
        RobotStep(**fields),
        "arm",
        "file record 3",
    )


def box_sample(size, boxes, seed=0):
    rng = RNG(seed)
    corners = [np.sort(rng.uniform(0, min(size), (2, 2)), axis=0) for _ in range(boxes)]
    regions = tuple(Region("box", c.astype(np.float32), label="cup") for c in corners)
    turns = (
        Turn("user", "<image>Where?"),
        Turn("assistant", "<region>" * boxes, regions),
        Turn("user", "And?"),
        Turn("assistant", "no"),
    )
    return Sample((rng.integers(0, 256, (*size, 3), np.uint8),), turns, None, "boxes", "line 1")


side = st.integers(28, 300)


@given(
    st.lists(st.lists(st.tuples(side, side), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(sorted(TEMPLATES)),
    st.sampled_from([None, (56, 84)]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_robot_lengths_are_what_samples_take(views, template, size, augmented):
    own = encoder(
        template, image_config=dataclasses.replace(IMAGES, size=size),
        augment=Augment() if augmented else None,
    )  # fmt: skip
    texts = ["", "Fold the towel", "push " * 9]
    text_id = np.arange(len(views)) % 3
    sizes = np.zeros((len(views), 3, 2), np.int32)
    for row, own_views in zip(sizes, views, strict=True):
        row[: len(own_views)] = own_views
    lengths = own.robot_lengths(texts, text_id, sizes)
    for i, own_views in enumerate(views):
        encoded, robot = own(robot_sample(own_views, texts[text_id[i]]), RNG(0))
        assert lengths.tokens[i] == len(encoded.tokens)
        assert lengths.slots[i] == len(encoded.slots.patches)
        assert lengths.targets[i] == len(encoded.targets) == 0
        assert lengths.robot[i] == 1 and len(robot.dino_images) == len(own_views)


@given(st.tuples(side, side), st.integers(0, 3), st.integers(0, 2**16), st.booleans())
@settings(max_examples=60, deadline=None)
def test_conversation_lengths_bound_what_samples_take(size, boxes, seed, augmented):
    own = encoder(augment=Augment(scale=(0.4, 1.0)) if augmented else None)
    sample = box_sample(size, boxes, seed)
    lengths = own.conversation_lengths([sample.turns], [[size]])
    encoded, robot = own(sample, RNG(seed))
    found = len(encoded.tokens), len(encoded.targets)
    planned = int(lengths.tokens[0]), int(lengths.targets[0])
    assert robot is None and lengths.slots[0] == len(encoded.slots.patches)
    if augmented:
        assert found <= planned and found[1] <= planned[1]
    else:
        assert found == planned


@pytest.mark.parity
def test_lengths_with_qwens_tokenizer(shared):
    own = SampleEncoder(Tokenizer.load(shared / "data/qwen2_5_tokenizer"), image_config=IMAGES)
    sample = box_sample((120, 200), 2)
    lengths = own.conversation_lengths([sample.turns], [[(120, 200)]])
    encoded, _ = dataclasses.replace(own, groups=("boxes",))(sample, RNG(0))
    assert (lengths.tokens[0], lengths.targets[0]) == (len(encoded.tokens), len(encoded.targets))


def test_a_robot_sample_is_what_the_policy_sees():
    """The same steps by hand: resize, prompt, DINO view, normalised actions and state."""
    config = dataclasses.replace(IMAGES, size=(56, 56))
    own = encoder(image_config=config)
    sample = robot_sample(((60, 90), (40, 40)))
    encoded, robot = own(sample, RNG(0))
    views = [resize(image, 56, 56) for image in sample.images]
    expected = encode_robot(
        "pick up the cup", views, own.prompt, own.tokenizer, image_config=config
    )
    np.testing.assert_array_equal(encoded.tokens, expected.tokens)
    np.testing.assert_array_equal(encoded.slots.patches, expected.slots.patches)
    np.testing.assert_array_equal(robot.dino_images, dino_views(views, 28))
    arm = STATISTICS["arm"]
    np.testing.assert_array_equal(robot.actions, arm.action.normalize(sample.robot.actions, "q99"))
    np.testing.assert_array_equal(robot.state, arm.state.normalize(sample.robot.state, "q99"))
    assert robot.action_mask.all() and robot.embodiment == 0 and robot.group == 0
    text = own.tokenizer.decode(list(encoded.tokens))
    assert "pick up the cup. Figure out" in text


def test_prompts_choose_the_text():
    texts = {}
    for name in ("paper", "none", "Do {instruction} now"):
        encoded, _ = encoder(name)(robot_sample(), RNG(0))
        texts[name] = byte_level_tokenizer().decode(list(encoded.tokens))
    assert "Figure out how" in texts["paper"]
    assert "Figure" not in texts["none"] and "pick up the cup" in texts["none"]
    assert "Do pick up the cup now" in texts["Do {instruction} now"]


def test_only_answers_are_supervised():
    encoded, _ = encoder()(box_sample((60, 90), 1), RNG(0))
    text = byte_level_tokenizer().decode(encoded.targets.tolist(), skip_special=False)
    head, tail = text.split("<|im_end|>\n")[:2]
    assert head.startswith('{"bbox_2d": [') and '"label": "cup"' in head and tail == "no"
    np.testing.assert_array_equal(encoded.tokens[encoded.target_index + 1], encoded.targets)
    assert encoded.group == 1


def test_masks_and_narrow_actions_are_widened():
    own = encoder(action_dim=9, state_dim=8)
    mask = np.array([True, True, False, False])
    _, robot = own(robot_sample(action_mask=mask), RNG(0))
    assert robot.actions.shape == (4, 9) and robot.state.shape == (8,)
    np.testing.assert_array_equal(robot.action_mask[:, :7], np.tile(mask[:, None], 7))
    assert not robot.action_mask[:, 7:].any() and not robot.actions[:, 7:].any()
    grid = RNG(0).random((4, 7)) < 0.5
    _, robot = own(robot_sample(action_mask=grid), RNG(0))
    np.testing.assert_array_equal(robot.action_mask[:, :7], grid)
    _, robot = encoder(state_dim=0)(robot_sample(), RNG(0))
    assert robot.state is None


def test_augmentation_moves_boxes_along_and_depends_on_the_rng():
    own = encoder(augment=Augment(scale=(0.5, 0.5), brightness=0, contrast=0, saturation=0, hue=0))
    sample = box_sample((112, 112), 1)
    (one, _), (other, _), (again, _) = (own(sample, RNG(seed)) for seed in (1, 2, 1))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    np.testing.assert_array_equal(one.slots.patches, again.slots.patches)
    assert not np.array_equal(one.slots.patches, other.slots.patches)
    plain, _ = encoder()(sample, RNG(0))
    assert one.targets.tolist() != plain.targets.tolist()


@pytest.mark.parametrize(
    ("text", "cropped"),
    [("at [12, 34]", False), ("(0.25, .5) and (1, 2, 3, 4)", False), ("[cup], 2 (two)", True)],
)
def test_numbers_that_follow_no_crop_hold_it_back(text, cropped):
    """Colours change all the same; without them, the image of a text with numbers is untouched."""
    image = RNG(3).integers(0, 256, (84, 84, 3), np.uint8)
    turns = (Turn("user", "<image>Where?"), Turn("assistant", text))
    sample = Sample((image,), turns, None, "boxes", "a record")
    plain, _ = encoder()(sample, RNG(0))
    gray = Augment((0.5, 0.5), brightness=0, contrast=0, saturation=0, hue=0)
    for augment, same in ((gray, not cropped), (dataclasses.replace(gray, brightness=0.5), False)):
        own = encoder(augment=augment)
        found = [own(sample, RNG(seed))[0].slots.patches for seed in range(3)]
        assert all(np.array_equal(f, plain.slots.patches) == same for f in found)


def test_bad_records_are_named():
    own = encoder()
    nan = robot_sample(actions=np.full((4, 7), np.nan, np.float32))
    forged = robot_sample(instruction="x<|im_end|>")
    flat = dataclasses.replace(robot_sample(), images=(np.zeros((28, 28 * 300, 3), np.uint8),))
    for sample, text in ((nan, "not finite"), (forged, "control tokens"), (flat, "ratio")):
        with pytest.raises(BadRecordError, match=f"file record 3: .*{text}"):
            own(sample, RNG(0))


def test_what_cannot_be_encoded_is_unusable_in_the_index():
    own = encoder()
    sizes = np.array([[[56, 56]], [[56, 56]], [[0, 0]], [[28, 28 * 300]]])
    lengths = own.robot_lengths(["a", "b<|im_end|>"], np.array([0, 1, 0, 0]), sizes)
    assert (lengths.tokens == UNUSABLE).tolist() == [False, True, True, True]
    good = box_sample((56, 56), 1).turns
    lone = (Turn("user", "<image>hm"),)
    miss = (Turn("user", "Where?"), Turn("assistant", "no"))
    lengths = own.conversation_lengths([good, lone, miss], [[(56, 56)]] * 3)
    assert (lengths.tokens == UNUSABLE).tolist() == [False, True, True]
    empty = own.conversation_lengths([], [])
    assert empty.tokens.shape == empty.robot.shape == (0,)


def test_config_errors_are_not_bad_records():
    own = encoder()
    for sample, text in (
        (robot_sample(embodiment="leg"), "embodiment 'leg' is not among arm"),
        (dataclasses.replace(robot_sample(), group="new"), "group 'new' is not among"),
        (robot_sample(actions=np.zeros((5, 7), np.float32)), "a chunk of 5 actions, chunk is 4"),
        (robot_sample(state=None), "no state, state_dim is 5"),
    ):
        with pytest.raises(StatisticsError, match=text):
            own(sample, RNG(0))
    with pytest.raises(StatisticsError) as e:
        encoder(embodiments={"arm": ActionSpec(), "leg": ActionSpec()}, action_dim=6, state_dim=3)
    for text in ("no statistics for embodiment 'leg'", "action_dim is 6", "state_dim is 3"):
        assert text in str(e.value)
    with pytest.raises(StatisticsError, match="needs statistics"):
        SampleEncoder(byte_level_tokenizer(), embodiments={"arm": ActionSpec()})


def test_fingerprints_follow_the_settings():
    base = encoder()
    lengths = [
        encoder("upstream"), encoder(image_config=ImageConfig()), encoder(augment=Augment()),
        dataclasses.replace(base, prompt=PromptConfig(lower_case=True)),
    ]  # fmt: skip
    arrays = [encoder(dino_size=42), encoder(groups=("arm", "x")), encoder(state_dim=0)]
    assert len({base.fingerprint(), *(e.fingerprint() for e in lengths)}) == 5
    assert {base.fingerprint()} == {e.fingerprint() for e in arrays}
    assert len({e.full_fingerprint() for e in (base, *lengths, *arrays)}) == 8
