"""Tokenizer: names to ids, round trips, folders that transformers loads."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st4vla_jax.config import VLM_PRESETS
from st4vla_jax.data.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TOOL_TOKENS,
    Tokenizer,
    TokenizerError,
    byte_level_tokenizer,
)

TOKENIZER = byte_level_tokenizer()
TEXTS = ["pick up the cup", "  Höhe\t≤ 3 ☕\n\n", "e\u0301 (not NFC)", "\x00\x7f\u2028", ""]


def test_byte_level_ids_are_bytes_then_qwens_tokens():
    assert len(TOKENIZER) == 256 + 22
    assert TOKENIZER.encode("aé\n") == list("aé\n".encode())
    ids = [TOKENIZER.encode(t) for t in SPECIAL_TOKENS + TOOL_TOKENS]
    assert ids == [[256 + i] for i in range(22)]
    assert (TOKENIZER.pad, TOKENIZER.im_start, TOKENIZER.im_end) == (256, 257, 258)
    assert (TOKENIZER.vision_start, TOKENIZER.vision_end, TOKENIZER.image_pad) == (265, 266, 268)


def test_byte_level_vocabulary_fits_the_tiny_preset():
    assert len(TOKENIZER) <= VLM_PRESETS["tiny"][1].vocab_size


@pytest.mark.parity
def test_added_tokens_equal_qwens(shared):
    path = shared / "data/qwen2_5_tokenizer/tokenizer.json"
    theirs = json.loads(path.read_text())["added_tokens"]
    expected = [(t, True) for t in SPECIAL_TOKENS] + [(t, False) for t in TOOL_TOKENS]
    assert [(t["content"], t["special"]) for t in theirs] == expected
    assert not any(t["normalized"] for t in theirs)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_byte_level_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode()) or any(i >= 256 for i in ids)
    assert TOKENIZER.decode(ids, skip_special=False) == text


@given(st.binary(max_size=40))
def test_byte_level_decodes_any_bytes(data):
    assert TOKENIZER.decode(list(data)) == data.decode(errors="replace")


def test_decode_leaves_out_special_tokens_only():
    ids = TOKENIZER.encode("<|im_start|>user\nhi<tool_call><|im_end|>")
    assert TOKENIZER.decode(ids) == "user\nhi<tool_call>"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|im_start|>user\nhi<tool_call><|im_end|>"


def test_save_load_keeps_bytes_and_fingerprint(tmp_path):
    TOKENIZER.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.fingerprint() == TOKENIZER.fingerprint() == byte_level_tokenizer().fingerprint()
    assert pickle.loads(pickle.dumps(again)).encode("ab<|im_end|>") == [97, 98, 258]
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE


def test_stored_padding_is_not_applied(tmp_path):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    assert len(Tokenizer.load(tmp_path).encode("hello")) == 5


@pytest.mark.parity
@pytest.mark.parametrize("loader", ["AutoTokenizer", "Qwen2TokenizerFast"])
def test_transformers_loads_the_saved_folder(tmp_path, loader):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = getattr(transformers, loader).from_pretrained(tmp_path)
    for text in ("hi <|im_start|>user\n x <|image_pad|>", "Höhe ≤ 3\t\n"):
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
    if loader == "AutoTokenizer":
        for text in TEXTS:
            assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
    assert theirs.pad_token_id == TOKENIZER.pad
    assert theirs.eos_token_id == TOKENIZER.im_end
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parity
def test_qwen_ids_and_encodings(shared):
    transformers = pytest.importorskip("transformers")
    folder = shared / "data/qwen2_5_tokenizer"
    ours = Tokenizer.load(folder)
    assert (ours.pad, ours.im_start, ours.im_end) == (151643, 151644, 151645)
    assert (ours.vision_start, ours.vision_end, ours.image_pad) == (151652, 151653, 151655)
    assert len(ours) == 151665
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "<|im_start|>user\nHello world<|im_end|>\n", "日本語 12345 don't"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_missing_control_tokens_are_all_named(tmp_path):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    gone = ("<|im_end|>", "<|image_pad|>")
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in gone]
    tree["model"]["vocab"] = {k: v for k, v in tree["model"]["vocab"].items() if k not in gone}
    path.write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match=r"<\|im_end\|>, <\|image_pad\|>") as e:
        Tokenizer.load(tmp_path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"model": {}}'])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="not a tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="convert_weights.tokenizer"):
        Tokenizer.load(tmp_path)
