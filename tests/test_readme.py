"""The README's commands name modules, flags and files that exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "launch/README.md")


def commands(page: str) -> list[list[str]]:
    """Words of every `python -m ...` and `bash ...` line in a page's code blocks and spans."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    spans = re.findall(
        r"`(python -m [^`]+|bash [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in (*lines, *(span.replace("\n", " ") for span in spans)):
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"] or words[:1] == ["bash"]:
            found.append(words)
    return found


ALL = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), ALL, ids=lambda x: x if isinstance(x, str) else x[-1])
def test_command_can_be_run(page, words):
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words
        return
    if words[2] in ("pytest", "pip", "venv"):
        return
    spec = importlib.util.find_spec(words[2])
    assert spec is not None, words
    source = Path(spec.origin).read_text()
    package = "".join(p.read_text() for p in Path(spec.origin).parent.glob("*.py"))
    for word in words[3:]:
        if not word.startswith("--") or word == "--config":
            continue
        name = word[2:].partition("=")[0]
        if name.startswith("config"):
            path = word.partition("=")[2].partition(":")[0]
            if name == "config" and "NAME" not in path and path != "...":
                assert (ROOT / path).is_file(), word
            continue
        names = {name, name.removeprefix("no")}  # absl's booleans
        flag = {form.format(n) for n in names for form in ('"--{}"', '"{}"', "'--{}'")}
        assert any(form in source or form in package for form in flag), f"{word} of {words[2]}"


def test_every_config_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    missing = [
        path.stem
        for path in (ROOT / "configs").glob("*.py")
        if path.stem not in ("__init__", "common", "data") and f"`{path.stem}`" not in text
    ]
    assert not missing


def test_map_names_what_is_there():
    """Every module of the package stands in the map, by name or by its prefix with a star."""
    text = (ROOT / "README.md").read_text()
    block = text[text.index("## Map of the code") :]
    words = set(re.findall(r"[\w*]+", block))
    prefixes = tuple(word[:-1] for word in words if word.endswith("*"))
    missing = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "st4vla_jax").rglob("*.py")
        if path.stem != "__init__" and path.stem not in words and not path.stem.startswith(prefixes)
    ]
    assert not missing
