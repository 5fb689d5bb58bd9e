"""Folders of arrays that are built once and read by many: complete or absent, never in between.

A folder is written to a temporary sibling and takes its name when its manifest, which lists every
file's size, is on disk.  A lock file (flock: the kernel frees it when its holder dies) makes a
second builder wait and use what the first one made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "index.json"

_LOG = logging.getLogger(__name__)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def cache_root(data: Path, index_dir: str | Path | None) -> Path:
    """Where what is derived from the data set at ``data`` is kept.

    Args:
      data: folder (or file) of the data set.
      index_dir: the user's choice; None: ``.st4vla_index`` in the folder, or, where that cannot be
        written, a folder of the user's cache named after the data set and a hash of its path.
    """
    if index_dir is not None:
        return Path(index_dir).absolute()
    data = data.absolute()
    folder = data if data.is_dir() else data.parent
    beside = folder / ".st4vla_index"
    if os.access(beside if beside.exists() else folder, os.W_OK):
        return beside
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "st4vla_jax" / f"{folder.name}-{digest(str(folder))[:12]}"


def digest(*parts: Any) -> str:
    """sha256 over arrays (dtype, shape and bytes) and JSON-able values."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = [part.dtype.str, *part.shape], np.ascontiguousarray(part).data
        else:
            head, body = part, b""
        result.update(json.dumps(head, sort_keys=True).encode() + b"\0")
        if len(body):
            result.update(body)
    return result.hexdigest()


def build_once(folder: Path, build: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Builds ``folder`` unless a complete one is there.

    Args:
      folder: its name must tell all that decides its contents: one that is there is not rebuilt.
      build: writes the files into the folder that it is given and returns what the manifest says.

    Returns:
      the manifest.

    Raises:
      OSError: the folder cannot be written, e.g. the disk is full; nothing is left behind.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    work = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            manifest = read_manifest(folder)
            if manifest is None:
                # Under the lock both are leftovers: of a killed builder, of a copy in part.
                shutil.rmtree(work, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
                work.mkdir()
                try:
                    _seal(work, build(work))
                    work.rename(folder)
                    sync(folder.parent)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                manifest = read_manifest(folder)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise OSError(
            error.errno,
            f"{folder}: cannot be written ({error.strerror}); make room, or set index_dir to "
            "another folder",
        ) from error
    if manifest is None:
        raise OSError(errno.EIO, f"{folder}: just written, yet not complete; is the disk sound?")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where anything is missing or of another size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file."""
    with ArrayWriter(path, array.dtype, array.shape[1:]) as writer:
        writer.append(array)


class ArrayWriter:
    """An .npy file that grows along its first axis, so that an index need not fit in memory."""

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
        self._dtype, self._shape, self.rows = np.dtype(dtype), tuple(shape), 0
        self._file = path.open("wb")
        self._write_header()
        self._start = self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        """Adds [n,...] rows of the file's row shape."""
        if rows.shape[1:] != self._shape:
            raise ValueError(f"{self._file.name}: rows of {rows.shape[1:]}, not {self._shape}")
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.rows += len(rows)

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis may grow to 21 digits in place.
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.rows, *self._shape),
            },
        )

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._write_header()
                if self._file.tell() != self._start:
                    raise ValueError(f"{self._file.name}: NumPy's header grew; cannot be kept")


def open_array(path: Path) -> np.ndarray:
    """Memory-maps an .npy file; processes share its pages."""
    # A plain view: indexing np.memmap itself costs microseconds more each time.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _seal(work: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest last, everything down on disk."""
    files = sorted(path for path in work.iterdir())
    for path in files:
        sync(path)
    manifest = {**content, "files": {path.name: path.stat().st_size for path in files}}
    target = work / MANIFEST
    target.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(target)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("%s: another process builds it; waiting", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
