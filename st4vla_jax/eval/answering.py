"""Greedy answers to many questions, in batches of few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from st4vla_jax.batch import VISION_BIN
from st4vla_jax.data.answers import render_turns
from st4vla_jax.data.encoder import prepared_size
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.packing import Capacity, pack
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.data.transforms import Encoded, encode
from st4vla_jax.eval.grounding import Question, Score, score
from st4vla_jax.models.decode import generate
from st4vla_jax.models.qwen_vl import QwenVL


class Answerer:
    """Answers questions with a VLM by greedy decoding; one compilation for each padded shape.

    Attributes:
      shapes: padded (tokens, vision slots) that were compiled so far.
    """

    def __init__(
        self,
        vlm: QwenVL,
        tokenizer: Tokenizer,
        *,
        system: str,
        image_config: ImageConfig,
        batch_size: int = 8,
        max_new_tokens: int = 128,
    ) -> None:
        """Prepares the compiled function.

        Args:
          vlm: the functions.
          tokenizer: the one it was trained with.
          system: text of the system turn.
          image_config: sizes of images; its ``size`` is for robots' views and not used.
          batch_size: questions at a time; a multiple of the mesh's batch axes.
          max_new_tokens: of an answer.
        """
        self._tokenizer, self._system, self._batch_size = tokenizer, system, batch_size
        self._image_config = dataclasses.replace(image_config, size=None)
        stop = (tokenizer.im_end, tokenizer.pad)

        def answer(params, inputs):
            return generate(vlm, params, inputs, max_new_tokens=max_new_tokens, stop_ids=stop)

        self._generate = jax.jit(answer)
        self.shapes: set[tuple[int, int]] = set()

    def scores(self, params: Any, questions: Iterable[Question]) -> list[Score]:
        """Asks and scores every question; in the order of the questions.

        Args:
          params: the VLM's parameters, params["vlm"].
          questions: read as they are needed; a batch for each shape is kept in memory.
        """
        scores: dict[int, Score] = {}
        for number, question, text in self._answers(params, questions):
            resized = [prepared_size(*hw, self._image_config) for hw in question.truth.sizes]
            scores[number] = score(question.truth, text, resized)
        return [scores[number] for number in sorted(scores)]

    def _answers(
        self, params: Any, questions: Iterable[Question]
    ) -> Iterator[tuple[int, Question, str]]:
        """(number, question, answer), batch by batch."""
        waiting: dict[tuple[int, int], list[tuple[int, Question, Encoded]]] = {}
        for number, question in enumerate(questions):
            encoded = self._encode(question)
            shape = rung(len(encoded.tokens)), rung(len(encoded.slots.patches))
            batch = waiting.setdefault(shape, [])
            batch.append((number, question, encoded))
            if len(batch) == self._batch_size:
                yield from self._run(params, shape, waiting.pop(shape))
        for shape, batch in waiting.items():
            yield from self._run(params, shape, batch)

    def _encode(self, question: Question) -> Encoded:
        sizes = [(hw, prepared_size(*hw, self._image_config)) for hw in question.truth.sizes]
        record = question.truth.record
        return encode(
            render_turns(question.turns, sizes, record), question.images, self._tokenizer,
            system=self._system, image_config=self._image_config, add_generation_prompt=True,
            supervise=False, record=record,
        )  # fmt: skip

    def _run(self, params: Any, shape: tuple[int, int], batch: list) -> Iterator:
        self.shapes.add(shape)
        rows = [[(encoded, None)] for *_, encoded in batch]
        rows += [[]] * (self._batch_size - len(rows))
        packed = pack(rows, Capacity(*shape), pad_id=self._tokenizer.pad)
        out = jax.device_get(self._generate(params, packed.vlm))
        for (number, question, _), tokens, length in zip(
            batch, out.tokens, out.lengths, strict=False
        ):
            yield number, question, self._tokenizer.decode(tokens[:length].tolist()).strip()


def rung(size: int) -> int:
    """The padded size of ``size`` tokens or slots: multiples of 64, in steps of about a quarter."""
    step = VISION_BIN
    while size > 8 * step:
        step *= 2
    return max(-(-size // step), 1) * step
