"""Encoding of one sample: expansion, mRoPE ids, labels, views."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.prompts import PromptConfig, PromptError
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import Tokenizer, byte_level_tokenizer
from st4vla_jax.data.transforms import dino_views, encode, encode_robot, mrope_positions

TOKENIZER = byte_level_tokenizer()
SYSTEM = PromptConfig().system
SIZES = [(140, 196), (84, 1400), (224, 224), (308, 448), (28, 28)]


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(turns, images=(), tokenizer=TOKENIZER, supervise=True, generation=False):
    return encode(
        turns,
        images,
        tokenizer,
        system=SYSTEM,
        image_config=ImageConfig(min_pixels=784),
        add_generation_prompt=generation,
        supervise=supervise,
        group=3,
        record="rec",
    )


@pytest.fixture(scope="module")
def rope_index():
    """HF's get_rope_index as a function of a token sequence and its patch grids."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    model = object.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig()

    def positions(is_image, grids):
        grid = torch.tensor([(1, 2 * rows, 2 * cols) for rows, cols in grids] or [(1, 2, 2)])
        kinds = torch.tensor(is_image, dtype=torch.int32)[None]
        ids, _ = model.get_rope_index(kinds.long(), kinds, image_grid_thw=grid)
        return ids[:, 0].T.numpy()

    return positions


@pytest.mark.parity
@settings(max_examples=80, deadline=None)
@given(
    lead=st.integers(0, 5),
    images=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6)), max_size=4),
)
def test_mrope_positions_equal_hf(rope_index, lead, images):
    parts = [np.zeros(lead + (not images), bool)]
    for rows, cols, text in images:
        parts += [np.ones(rows * cols, bool), np.zeros(text, bool)]
    is_image, grids = np.concatenate(parts), [(rows, cols) for rows, cols, _ in images]
    ours = mrope_positions(is_image, grids)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, rope_index(is_image, grids))


def test_mrope_positions_by_hand():
    is_image = np.array([0, 1, 1, 1, 1, 1, 1, 0, 0], bool)
    expected = [
        (0, 0, 0),
        (1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (1, 2, 2), (1, 2, 3),
        (4, 4, 4), (5, 5, 5),
    ]  # fmt: skip
    np.testing.assert_array_equal(mrope_positions(is_image, [(2, 3)]), expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_image_tokens_are_expanded_and_indexed(count):
    images = [image(h, w, i) for i, (h, w) in enumerate(SIZES[:count])]
    sample = encoded([Turn("user", "a <image>" * count), Turn("assistant", "b")], images)
    cells = [h * w // 28**2 for h, w in SIZES[:count]]
    pads = sample.tokens == TOKENIZER.image_pad
    assert pads.sum() == sum(cells)
    np.testing.assert_array_equal(pads, sample.vision_index >= 0)
    starts = np.flatnonzero(sample.tokens == TOKENIZER.vision_start)
    ends = np.flatnonzero(sample.tokens == TOKENIZER.vision_end)
    np.testing.assert_array_equal(ends - starts - 1, cells)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        cell = sample.vision_index[start + 1 : end]
        np.testing.assert_array_equal(cell, sample.slots.cells[number])
        assert set(sample.slots.patch_image[4 * cell]) == {number + 1}
    assert len(sample.slots.patches) % 64 == 0
    assert sample.tokens.dtype == sample.positions.dtype == sample.vision_index.dtype == np.int32


def test_supervised_tokens_of_every_assistant_turn():
    turns = [Turn("user", "<image>q"), Turn("assistant", "one"), Turn("user", "r"),
             Turn("assistant", "two<|box_end|>")]  # fmt: skip
    sample = encoded(turns, [image(56, 56)])
    assert TOKENIZER.decode(sample.targets, skip_special=False) == (
        "one<|im_end|>\ntwo<|box_end|><|im_end|>\n"
    )
    np.testing.assert_array_equal(sample.tokens[sample.target_index + 1], sample.targets)
    newline = sample.tokens[sample.target_index[0]]  # the first is predicted from the header's end
    assert newline == ord("\n")
    np.testing.assert_array_equal(sample.target_weight, np.ones(len(sample.targets), np.float32))
    assert sample.group == 3


@pytest.mark.parity
@pytest.mark.parametrize("answer", ["a red cup", "\nnewline first", " ", "", "{\n}"])
def test_labels_equal_upstreams_rule_with_qwens_tokenizer(shared, answer):
    tokenizer = Tokenizer.load(shared / "data/qwen2_5_tokenizer")
    turns = [Turn("user", "what?"), Turn("assistant", answer)]
    sample = encoded(turns, tokenizer=tokenizer)
    # Upstream tokenises turn by turn and masks three header tokens (spec upstream.md 4.5).
    ids, labels = [], []
    for role, text in (("system", SYSTEM), ("user", "what?"), ("assistant", answer)):
        turn = tokenizer.encode(f"<|im_start|>{role}\n{text}<|im_end|>\n")
        ids += turn
        labels += [-100] * 3 + turn[3:] if role == "assistant" else [-100] * len(turn)
    whole = "".join(
        f"<|im_start|>{r}\n{t}<|im_end|>\n"
        for r, t in (("system", SYSTEM), ("user", "what?"), ("assistant", answer))
    )
    assert ids == tokenizer.encode(whole)
    np.testing.assert_array_equal(sample.tokens, ids)
    labels = np.array(labels)
    np.testing.assert_array_equal(sample.target_index + 1, np.flatnonzero(labels >= 0))
    np.testing.assert_array_equal(sample.targets, labels[labels >= 0])


def test_without_supervision_there_are_no_targets():
    turns = [Turn("user", "q"), Turn("assistant", "a")]
    sample = encoded(turns, supervise=False)
    assert sample.targets.shape == sample.target_index.shape == sample.target_weight.shape == (0,)
    assert sample.slots.patches.shape == (0, 588)
    with pytest.raises(PromptError, match="rec: it has no assistant turn"):
        encoded(turns[:1])


def test_robot_sample():
    images = [image(64, 64), image(480, 640)]
    prompt = PromptConfig(template="Do {instruction}!")
    config = ImageConfig(size=(224, 224))
    sample = encode_robot("Lift", images, prompt, TOKENIZER, image_config=config)
    text = TOKENIZER.decode(sample.tokens, skip_special=False)
    views = ("<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>") * 2
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{views}Do Lift!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert sample.slots.grids == ((8, 8), (8, 8))
    assert len(sample.targets) == 0


@pytest.mark.parametrize("instruction", ["a <image>", "x<|vision_start|>"])
def test_robot_instruction_cannot_forge_images(instruction):
    with pytest.raises(PromptError, match="ep 3"):
        encode_robot(
            instruction,
            [image(56, 56)],
            PromptConfig(),
            TOKENIZER,
            image_config=ImageConfig(),
            record="ep 3",
        )


def test_robot_sample_without_views():
    with pytest.raises(PromptError, match="no camera view"):
        encode_robot("x", [], PromptConfig(), TOKENIZER, image_config=ImageConfig())


def test_dino_views():
    same, wide = image(56, 56), image(40, 90, 1)
    views = dino_views([same, wide], 56)
    assert views.shape == (2, 56, 56, 3)
    assert views.dtype == np.uint8
    np.testing.assert_array_equal(views[0], same)
    # PIL's bilinear is antialiased: halving averages neighbours with the triangle filter.
    flat = dino_views([np.repeat(np.arange(112, dtype=np.uint8)[None, :, None], 112, 0)
                       .repeat(3, 2)], 56)[0]  # fmt: skip
    np.testing.assert_allclose(flat[20, 2:-2, 0], 2 * np.arange(2, 54) + 0.5, atol=0.5)
    expected = Image.fromarray(wide).resize((56, 56), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(views[1], np.asarray(expected))
    assert dino_views([], 56).shape == (0, 56, 56, 3)


def test_one_observation_needs_no_framework():
    code = (
        "import sys; import st4vla_jax.data.transforms, st4vla_jax.data.normalize;"
        "assert not {'jax', 'torch', 'tensorflow', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
