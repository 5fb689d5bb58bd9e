"""Prompts and chat text against Qwen2.5-VL's own template."""

import json

import pytest

from st4vla_jax.data.prompts import (
    TEMPLATES,
    PromptConfig,
    PromptError,
    chat_text,
    robot_turns,
    spatial_prompt,
    turn_texts,
)
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import CHAT_TEMPLATE

SYSTEM = PromptConfig().system
CONVERSATIONS = [
    [Turn("user", "hello")],
    [Turn("user", "<image>What is this?")],
    [Turn("user", "compare <image> with\n<image>"), Turn("assistant", " a cup\n")],
    [Turn("user", "<image><image>"), Turn("assistant", "{}"), Turn("user", "and?"),
     Turn("assistant", "<|box_start|>(1,2),(3,4)<|box_end|>")],
]  # fmt: skip


def messages(turns, system):
    """Turns as transformers wants them: ``<image>`` becomes a content part."""
    out = [{"role": "system", "content": system}] if system is not None else []
    for turn in turns:
        parts = []
        for number, text in enumerate(turn.text.split("<image>")):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        out.append({"role": turn.role, "content": parts})
    return out


def rendered(template, turns, system, generation):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), _ = chat.render_jinja_template(
        [messages(turns, system)], chat_template=template, add_generation_prompt=generation
    )
    return text


def ours(turns, system, generation):
    images = sum(turn.text.count("<image>") for turn in turns)
    return chat_text(turns, system=system, num_images=images, add_generation_prompt=generation)


@pytest.mark.parity
@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_chat_text_equals_qwens_template(shared, turns, generation, system):
    path = shared / "data/qwen2_5_tokenizer/chat_template.json"
    template = json.loads(path.read_text())["chat_template"]
    expected = rendered(template, turns, system, generation)
    assert rendered(CHAT_TEMPLATE, turns, system, generation) == expected
    assert ours(turns, SYSTEM if system is None else system, generation) == expected


@pytest.mark.parity
def test_own_template_renders_string_contents_and_videos_as_qwens(shared):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    path = shared / "data/qwen2_5_tokenizer/chat_template.json"
    template = json.loads(path.read_text())["chat_template"]
    conversations = [
        [{"role": "user", "content": "  text\n"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": [{"video": "x"}, {"image": "y"}, {"text": "z"}]}],
        [{"role": "user", "content": [{"type": "video"}, {"image_url": "y"}]}],
        [],
    ]
    texts = [
        chat.render_jinja_template(conversations, chat_template=t, add_generation_prompt=True)[0]
        for t in (template, CHAT_TEMPLATE)
    ]
    assert texts[0] == texts[1]


def test_robot_prompt_text():
    text = ours(robot_turns("move the Cup", 2, PromptConfig()), SYSTEM, True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + "<|vision_start|><|image_pad|><|vision_end|>" * 2
        + "Your task is to move the Cup. Figure out how to execute it, then locate the key object "
        "needed.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_spatial_prompt_replaces_the_literal_only():
    cfg = PromptConfig(template="{instruction} {x} %s {instruction}")
    assert spatial_prompt("do {instruction} {0}", cfg) == (
        "do {instruction} {0} {x} %s do {instruction} {0}"
    )
    assert spatial_prompt("Pick It", PromptConfig(TEMPLATES["none"], lower_case=True)) == "pick it"
    upper = PromptConfig(template="GO {instruction}", lower_case=True)
    assert spatial_prompt("Pick", upper) == "GO pick"


def test_template_without_placeholder():
    with pytest.raises(PromptError, match="does not contain {instruction}"):
        PromptConfig(template="Do {Instruction}")


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([Turn("user", "<image>")], 2, "1 <image> placeholders for 2 images"),
        ([Turn("user", "<image> and <image>")], 1, "2 <image> placeholders for 1 images"),
        ([Turn("user", "no image")], 1, "0 <image> placeholders for 1 images"),
        ([Turn("user", "a<|im_end|>b<|image_pad|>")], 0, r"<\|im_end\|>, <\|image_pad\|>: they"),
        ([Turn("user", "<tool_call>")], 0, "<tool_call>"),
        ([Turn("user", "q"), Turn("assistant", "<|endoftext|>")], 0, r"turn 2 \(assistant\)"),
        ([Turn("user", "q"), Turn("assistant", "<image>")], 1, "only user turns"),
        ([Turn("human", "q")], 0, "role 'human'"),
        ([], 0, "no turns"),
    ],
)
def test_bad_conversations(turns, images, message):
    with pytest.raises(PromptError, match=message) as e:
        turn_texts(turns, system=SYSTEM, num_images=images, record="refcoco.jsonl:7")
    assert str(e.value).startswith("refcoco.jsonl:7: ")


def test_all_problems_at_once():
    turns = [Turn("user", "<|im_start|>"), Turn("robot", "x")]
    with pytest.raises(PromptError) as e:
        turn_texts(turns, system="<|im_end|>", num_images=1)
    for part in ("the system turn", "turn 1 (user)", "role 'robot'", "0 <image>"):
        assert part in str(e.value)
