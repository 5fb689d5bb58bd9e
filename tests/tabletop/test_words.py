"""Every text comes back, and what the tabletop says takes few tokens."""

import numpy as np
import pytest

from st4vla_jax.config import VLM_PRESETS
from st4vla_jax.data.answers import render_turns
from st4vla_jax.data.prompts import turn_texts
from st4vla_jax.data.tokenizer import Tokenizer, byte_level_tokenizer
from st4vla_jax.tabletop.dataset import write_dataset
from st4vla_jax.tabletop.generic import generic_example
from st4vla_jax.tabletop.grounding import robot_example
from st4vla_jax.tabletop.words import FOLDER, NUMBERS, word_tokenizer

TOKENIZER = word_tokenizer()


def texts(example):
    turns = render_turns(example.turns, [((28, 28), (112, 112))])
    return [text for _, text in turn_texts(turns, system="tabletop", num_images=1)]


@pytest.mark.parametrize("make", [generic_example, robot_example])
def test_records_are_words_and_numbers(make):
    lengths = []
    for number in range(40):
        for text in texts(make(0, number, size=28)):
            ids = TOKENIZER.encode(text)
            assert TOKENIZER.decode(ids, skip_special=False) == text
            letters = [i for i in ids if i < 256 and TOKENIZER.decode([i]).isalpha()]
            assert not letters, TOKENIZER.decode(letters)
            lengths.append((len(ids), len(byte_level_tokenizer().encode(text))))
    ours, theirs = np.sum(lengths, axis=0)
    assert 3 * ours < theirs


def test_any_text_comes_back():
    for text in ("Stra\u00dfe, \u673a\u5668", "redder reddest\t\n 128 0127 1270", "the  the", ""):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_numbers_of_pixels_are_one_token():
    assert len({*(tuple(TOKENIZER.encode(str(n))) for n in range(NUMBERS))}) == NUMBERS
    assert all(len(TOKENIZER.encode(str(n))) == 1 for n in range(NUMBERS))
    assert len(TOKENIZER.encode(str(NUMBERS))) == 2


def test_it_fits_the_preset_and_lies_beside_the_data(tmp_path):
    assert len(TOKENIZER) <= VLM_PRESETS["tabletop"][1].vocab_size
    write_dataset(tmp_path / "set", episodes=0, generic=1, image_size=28)
    read = Tokenizer.load(tmp_path / "set" / FOLDER)
    assert read.fingerprint() == TOKENIZER.fingerprint()
