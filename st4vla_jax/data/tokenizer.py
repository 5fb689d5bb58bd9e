"""Qwen's tokenizer around the `tokenizers` library, and a byte-level one built in code.

Ids of control tokens come from the tokenizer by name, never from constants (DESIGN.md D11).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

# Qwen2.5's added tokens in the order of their ids.  `decode` leaves out the special ones.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TOOL_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

# Qwen2.5-VL's chat format for turns of text and images; `prompts.chat_text` writes the same text.
CHAT_TEMPLATE = """\
{%- macro turn(role, body) -%}
{{ '<|im_start|>' + role + '\\n' + body + '<|im_end|>\\n' }}
{%- endmacro -%}
{%- if messages and messages[0].role != 'system' -%}
{{ turn('system', 'You are a helpful assistant.') }}
{%- endif -%}
{%- for message in messages -%}
{%- set parts = [message.content] if message.content is string else message.content -%}
{%- set body -%}
{%- for part in parts -%}
{%- if part is string -%}{{ part }}
{%- elif part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{{ turn(message.role, body) }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; says what is missing and where."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      im_start, im_end, vision_start, vision_end, image_pad, pad: token ids by name; ``pad`` is
        ``<|endoftext|>``, as in Qwen.
    """

    def __init__(self, content: str, name: str = "tokenizer.json") -> None:
        """Reads the content of a tokenizer.json.

        Args:
          content: JSON text; kept, so that `save` writes the same bytes again.
          name: what error messages call it.

        Raises:
          TokenizerError: not a tokenizer, or without some of Qwen's control tokens (all listed).
        """
        try:
            self._backend = Backend.from_str(content)
        except Exception as e:  # the library raises bare Exception
            raise TokenizerError(f"{name}: not a tokenizer.json ({e})") from e
        self._content = content
        # A stored padding or truncation rule would silently change every encoding.
        self._backend.no_padding()
        self._backend.no_truncation()
        names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "endoftext")
        ids = {n: self._backend.token_to_id(f"<|{n}|>") for n in names}
        missing = [f"<|{n}|>" for n, i in ids.items() if i is None]
        if missing:
            raise TokenizerError(
                f"{name}: no token {', '.join(missing)}; this is not Qwen2.5-VL's tokenizer (make "
                "its folder with python -m convert_weights.tokenizer)"
            )
        self.im_start: int = ids["im_start"]
        self.im_end: int = ids["im_end"]
        self.vision_start: int = ids["vision_start"]
        self.vision_end: int = ids["vision_end"]
        self.image_pad: int = ids["image_pad"]
        self.pad: int = ids["endoftext"]

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Reads ``folder/tokenizer.json``; raises TokenizerError if it is missing or unusable."""
        path = Path(folder) / "tokenizer.json"
        try:
            content = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as e:
            raise TokenizerError(
                f"{path}: no such file; make one with python -m convert_weights.tokenizer"
            ) from e
        except UnicodeDecodeError as e:
            raise TokenizerError(f"{path}: not a tokenizer.json ({e})") from e
        return cls(content, str(path))

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json and chat_template.json for transformers.

        The chat template is ours, which renders as Qwen2.5-VL's does: it is what `prompts` writes.
        """
        config = {
            # Not Qwen2Tokenizer: transformers 5 would put Qwen's normaliser and splitting in the
            # place of those in tokenizer.json, which changes the byte-level tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131_072,
            "chat_template": CHAT_TEMPLATE,
        }
        trees = {"tokenizer_config": config, "chat_template": {"chat_template": CHAT_TEMPLATE}}
        texts = {f"{name}.json": json.dumps(tree, indent=2) + "\n" for name, tree in trees.items()}
        texts["tokenizer.json"] = self._content
        return {name: text.encode("utf-8") for name, text in texts.items()}

    def save(self, folder: Path | str) -> None:
        """Writes `files` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Token ids; control tokens written in ``text`` are recognised, none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def __len__(self) -> int:
        """Number of ids; the model's embedding has at least as many rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def fingerprint(self) -> str:
        """sha256 of the tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self._content.encode("utf-8")).hexdigest()

    def bpe(self) -> dict[str, Any]:
        """The BPE model: ``vocab`` by id and ``merges`` as pairs, however the file wrote them.

        Raises:
          TokenizerError: another kind of model.
        """
        model = json.loads(self._content)["model"]
        if model.get("type") != "BPE":
            raise TokenizerError(f"a tokenizer of type {model.get('type')!r}, expected 'BPE'")
        vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        return {"vocab": vocab, "merges": [tuple(pair) for pair in pairs]}

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._content,)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files (GPT-2's table).

    Bytes that print as Latin-1 stand for themselves, the others for 256, 257, ... in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def add_qwen_tokens(backend: Backend) -> None:
    """Appends Qwen's 22 added tokens to a vocabulary, in Qwen's order."""
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(t, normalized=False) for t in TOOL_TOKENS])


def byte_level_tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """Tokenizer of the ``tiny`` presets: ids 0..255 are the bytes, then Qwen's 22 tokens.

    Each of ``words`` is one more token wherever it stands; of two that fit, the longer one.

    differs: no Unicode normalisation (Qwen's is NFC), so that every text comes back unchanged.
    """
    backend = Backend(BPE(vocab={c: i for i, c in enumerate(byte_characters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    add_qwen_tokens(backend)
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return Tokenizer(backend.to_str(), "byte-level tokenizer")
