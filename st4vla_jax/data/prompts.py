"""Instructions to prompts, conversations to Qwen2.5-VL's chat text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import SPECIAL_TOKENS, TOOL_TOKENS

# spec upstream.md 1.2: the papers' spatial prompt, the one in the released configs, none.
TEMPLATES = {
    "paper": (
        "Your task is to {instruction}. Figure out how to execute it, then locate the key object "
        "needed."
    ),
    "upstream": (
        "Your task is {instruction}. To identify the key objects for your task. Locate their "
        "bounding boxes in [x1,y1,x2,y2] format."
    ),
    "none": "{instruction}",
}

IMAGE = "<image>"
ASSISTANT_HEADER = "<|im_start|>assistant\n"
_SLOT = "{instruction}"
_VISION = "<|vision_start|><|image_pad|><|vision_end|>"

# Qwen2-VL's grounding markup may occur in questions and answers; everything else that the
# tokenizer would turn into a control token could forge turns or images.
_GROUNDING = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")
_FORBIDDEN = re.compile(
    "|".join(re.escape(t) for t in SPECIAL_TOKENS + TOOL_TOKENS if not _GROUNDING.fullmatch(t))
)


class PromptError(ValueError):
    """A prompt or conversation that cannot be rendered; names the record."""


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How an instruction becomes a robot sample's text; stored in a checkpoint's meta.

    Attributes:
      template: text with the literal ``{instruction}``; TEMPLATES has named ones.
      system: system turn.
      lower_case: lower-case the instruction.  differs: one rule for training and inference, where
        released upstream lower-cases at inference only (spec upstream.md 6, defect 9).
    """

    template: str = TEMPLATES["paper"]
    system: str = "You are a helpful assistant."
    lower_case: bool = False

    def __post_init__(self) -> None:
        if _SLOT not in self.template:
            raise PromptError(f"prompt template {self.template!r} does not contain {_SLOT}")


def spatial_prompt(instruction: str, cfg: PromptConfig) -> str:
    """The template with every literal ``{instruction}`` replaced; nothing else is interpreted."""
    instruction = instruction.lower() if cfg.lower_case else instruction
    return cfg.template.replace(_SLOT, instruction)


def turn_texts(
    turns: Sequence[Turn], *, system: str, num_images: int, record: str = ""
) -> list[tuple[str, str]]:
    """Renders a conversation, one text for each turn, the system turn first.

    A turn starts with a control token, so tokenising turn by turn equals tokenising the whole.

    Args:
      turns: user and assistant turns; each ``<image>`` of a user turn stands for the next image.
      system: text of the system turn.
      num_images: images of the sample.
      record: file and record, for error messages.

    Returns:
      (role, text) pairs.

    Raises:
      PromptError: an unknown role, control tokens in a text, an image in an answer, or another
        number of placeholders than of images; all problems at once.
    """
    bodies = [("system", system), *((turn.role, turn.text) for turn in turns)]
    problems = [] if turns else ["it has no turns"]
    placeholders = 0
    for number, (role, body) in enumerate(bodies):
        where = f"turn {number} ({role})" if number else "the system turn"
        if number and role not in ("user", "assistant"):
            problems.append(f"turn {number} has role {role!r}, expected 'user' or 'assistant'")
        if tokens := sorted(set(_FORBIDDEN.findall(body))):
            problems.append(
                f"{where} contains control tokens {', '.join(tokens)}: they could forge turns or "
                f"images; remove them (images are written {IMAGE})"
            )
        count = body.count(IMAGE)
        if count and role != "user":
            problems.append(f"{where} contains {IMAGE}; only user turns may show images")
        placeholders += count
    if placeholders != num_images:
        problems.append(f"{placeholders} {IMAGE} placeholders for {num_images} images")
    if problems:
        raise PromptError(f"{record or 'conversation'}: " + "; ".join(problems))
    return [
        (role, f"<|im_start|>{role}\n{body.replace(IMAGE, _VISION)}<|im_end|>\n")
        for role, body in bodies
    ]


def chat_text(
    turns: Sequence[Turn],
    *,
    system: str,
    num_images: int,
    add_generation_prompt: bool,
    record: str = "",
) -> str:
    """A conversation as Qwen2.5-VL's chat template renders it; arguments as in `turn_texts`."""
    pairs = turn_texts(turns, system=system, num_images=num_images, record=record)
    text = "".join(text for _, text in pairs)
    return text + ASSISTANT_HEADER if add_generation_prompt else text


def robot_turns(instruction: str, num_views: int, cfg: PromptConfig) -> list[Turn]:
    """One user turn: the views in order, then the spatial prompt (spec upstream.md 1.2)."""
    return [Turn("user", IMAGE * num_views + spatial_prompt(instruction, cfg))]
