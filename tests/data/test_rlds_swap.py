"""Views that change places in half of the steps (droid's exterior cameras)."""

import dataclasses
import pickle

import numpy as np
import pytest

from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import SpecError
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from st4vla_jax.data.transforms import encode_robot
from tests.data.test_rlds import BOTH, BRIDGE, folder

SWAPPED = dataclasses.replace(BRIDGE, swap=BOTH)


def test_half_of_the_steps_change_places(tmp_path):
    episodes, root = folder(tmp_path / "set", "bridge", steps=(30,) * 8)
    plain = RldsSource(root, BRIDGE, views=BOTH)
    source, single = (RldsSource(root, SWAPPED, views=v) for v in (BOTH, ("primary",)))
    assert len(source) == len(plain) == len(single) == 8 * 28
    swapped = []
    for index in range(len(plain)):
        first, second = plain[index].images
        found = source[index].images
        swapped.append(np.array_equal(found[0], second))
        expected = (second, first) if swapped[-1] else (first, second)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        # One view alone shows the same camera: both are seen within each episode.
        np.testing.assert_array_equal(single[index].images[0], found[0])
        assert not np.array_equal(first, second)
    counts = np.reshape(swapped, (8, 28)).sum(axis=1)
    assert counts.min() > 0 and counts.max() < 28 and 80 < counts.sum() < 144
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[5].images[0], source[5].images[0])
    assert source.fingerprint() != plain.fingerprint()


def test_lengths_follow_the_camera_that_is_shown(tmp_path):
    """Cameras of other sizes, each view at its own."""

    def edit(episodes):
        from tests.reference.shards import encode_image

        rng = np.random.default_rng(1)
        for episode in episodes:
            episode["observation/image_1"] = [
                encode_image(rng.integers(0, 256, (112, 168, 3), np.uint8))
                for _ in episode["observation/image_1"]
            ]

    _, root = folder(tmp_path / "set", "bridge", steps=(12, 9), edit=edit)
    source = RldsSource(root, SWAPPED, views=("primary",))
    images = ImageConfig(min_pixels=784, max_pixels=50_176)
    encoder = SampleEncoder(byte_level_tokenizer(), image_config=images)
    lengths = source.lengths(encoder)
    found = [
        len(
            encode_robot(
                s.turns[0].text, s.images, encoder.prompt, encoder.tokenizer, image_config=images
            ).tokens
        )
        for s in source
    ]
    np.testing.assert_array_equal(lengths.tokens, found)
    assert len(set(found)) == 2


def test_droid_swaps_and_wrong_swaps_are_refused():
    assert SPECS["droid"].swap == ("primary", "secondary")
    assert [n for n, spec in SPECS.items() if spec.swap] == ["droid"]
    assert SPECS["droid"].partner("wrist") == "wrist"
    for swap in (("primary",), ("primary", "primary"), ("primary", "wrist")):
        with pytest.raises(SpecError, match="swap: .* must be two of the views"):
            dataclasses.replace(BRIDGE, swap=swap)
