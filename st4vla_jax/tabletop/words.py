"""The tokenizer of the tabletop's policies: bytes, and one token for each word and number.

A tiny model on one core pays for every token: with whole words a question with its answer takes a
third of the bytes' tokens, and no layer is spent on putting letters and digits together.  Texts
stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from st4vla_jax.data.answers import (
    COORDINATES,
    REGION,
    answer_opening,
    answer_text,
    labelled_answer,
)
from st4vla_jax.data.importers import BOX_QUESTION, POINT_QUESTION, TRACE_QUESTION
from st4vla_jax.data.prompts import TEMPLATES as PROMPTS
from st4vla_jax.data.tokenizer import Tokenizer, byte_level_tokenizer
from st4vla_jax.tabletop import generic
from st4vla_jax.tabletop.language import PARAPHRASES, PROMPT, RELATIONS, TEMPLATES
from st4vla_jax.tabletop.scene import COLOURS, CONTAINERS, SHAPES

NUMBERS = 128  # pixels of pictures up to this side are one token; larger ones are split
FOLDER = "tokenizer"  # in a data set of `tabletop.dataset`

# What `language`, `grounding` and `generic` say besides their templates.
_PHRASES = """
system tabletop user assistant the a object objects thing things slider largest smallest big small
leftmost rightmost frontmost rearmost nearest to left right in front of behind on then first after
that every Is the gripper open or closed? Where is the seen from the yes no Point to where it
belongs. needed. Which side of What colour How many are there? mat
"""


def word_tokenizer() -> Tokenizer:
    """Bytes and Qwen's tokens first, as `byte_level_tokenizer`; every text comes back unchanged."""
    words = {word for text in _texts() for word in re.findall(r"[A-Za-z]{2,}", text)}
    words |= {f" {word}" for word in words}
    numbers = [str(number) for number in range(10, NUMBERS)]  # a digit is a byte
    # New pieces go to the end: the ids of the others are those of trained weights.
    return byte_level_tokenizer((*_json_pieces(), *numbers, *sorted(words), *_label_pieces()))


def _texts() -> Iterator[str]:
    yield PROMPT.partition("\n")[0]  # then JSON
    yield from (_PHRASES, BOX_QUESTION, POINT_QUESTION, TRACE_QUESTION)
    yield from generic.PROMPTS
    yield from PROMPTS.values()
    yield from (*COLOURS, *SHAPES, *CONTAINERS, *generic.THINGS, *RELATIONS)
    for table in (TEMPLATES, PARAPHRASES):
        yield from (text for texts in table.values() for text in texts)


def _json_pieces() -> list[str]:
    """What stands around an answer's numbers."""
    start, end = answer_text(1).split(REGION)
    between = answer_text(2).split(REGION)[1]
    pieces = [", ", "], [", "]}", f"]}}{end}", '], "label": "', '"}', f'"}}{end}']
    for kind in ("box", "point"):
        opening = answer_opening(kind)
        key = opening.removeprefix(start)
        pieces += [opening, f"{between}{key}", f"]}}{between}{key}", f'"}}{between}{key}']
    return pieces


def _label_pieces() -> list[str]:
    """What stands around the names of a list."""
    name = "<name>"
    start, between, _ = labelled_answer((name, name)).split(name)
    before, after = between.split(COORDINATES)
    return [start, f"{before}[", f"]{after}"]
