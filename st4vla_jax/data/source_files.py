"""What sources share: files there and unchanged, records left out, lengths kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from st4vla_jax.data.index_folder import build_once, digest, open_array, write_array
from st4vla_jax.data.source import Lengths

_SHOWN = 100  # bad records in one message

_LOG = logging.getLogger(__name__)


class SourceError(ValueError):
    """Data that cannot be used as it is; names files and records and says what to do."""


def file_stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """[absolute path, bytes, mtime in ns] of each file: changes whenever a file does.

    Raises:
      SourceError: files that are missing, all by name.
    """
    stamps, missing = [], []
    for path in paths:
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            missing.append(str(path))
        else:
            stamps.append([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
    if missing:
        raise SourceError(f"{len(missing)} files are missing:\n  " + "\n  ".join(missing))
    return stamps


def check_stamps(stamps: Sequence[Sequence[Any]]) -> None:
    """Raises SourceError naming every file that is missing or changed since ``file_stamps``."""
    now = file_stamps(Path(stamp[0]) for stamp in stamps)
    changed = [old[0] for old, new in zip(stamps, now, strict=True) if list(old) != new]
    if changed:
        raise SourceError(
            "files changed since they were indexed (size or time of change); start again to index "
            "them anew:\n  " + "\n  ".join(changed)
        )


def check_problems(
    what: str, problems: Sequence[str], allowed: int, missing: Sequence[str] = ()
) -> None:
    """Logs what an index leaves out, or refuses it.

    Args:
      what: the data.
      problems: one line for each bad record.
      allowed: how many may be left out.
      missing: names of missing files, listed in full before the rest.

    Raises:
      SourceError: more problems than allowed.
    """
    if not problems:
        return
    lines = [f"missing: {name}" for name in missing] + list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        lines.append(f"... and {len(problems) - _SHOWN} more")
    shown = "\n  ".join(lines)
    if len(problems) > allowed:
        raise SourceError(
            f"{what}: {len(problems)} bad records, max_bad_records is {allowed}:\n  {shown}\n"
            "mend them, or raise max_bad_records to leave them out"
        )
    _LOG.warning("%s: left out %d bad records:\n  %s", what, len(problems), shown)


def kept_lengths(folder: Path, encoder: Any, compute: Callable[[], Lengths]) -> Lengths:
    """Lengths under an encoder, computed once and kept in the index folder."""
    names = [field.name for field in dataclasses.fields(Lengths)]

    def build(work: Path) -> dict[str, Any]:
        lengths = compute()
        for name in names:
            write_array(work / f"{name}.npy", getattr(lengths, name))
        return {}

    kept = folder / f"lengths-{digest(encoder.fingerprint())[:16]}"
    build_once(kept, build)
    return Lengths(*(open_array(kept / f"{name}.npy") for name in names))
