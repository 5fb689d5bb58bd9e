"""Conversions as such and their faults; test_convert_*.py compare what each format becomes."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from st4vla_jax.data import conversion
from st4vla_jax.data.convert import detect_format, main
from st4vla_jax.data.convert_rlds import rlds_conversion
from tests.reference import shards as reference

SHARDS = 4


def folder(root, **options):
    rng = np.random.default_rng(0)
    episodes = [reference.bridge(rng, 3 + n, f"task {n}") for n in range(2 * SHARDS)]
    splits = {"train": episodes}
    return reference.write_folder(root, reference.BRIDGE, splits, shards=SHARDS, **options)


def convert(source, out, *more):
    main(["--from", str(source), "--out", str(out), *map(str, more)])


def fails(capsys, source, out, *more):
    """The error of a conversion that must fail and leave no folder of that name."""
    with pytest.raises(SystemExit) as error:
        convert(source, out, *more)
    assert not out.exists()
    return str(error.value.code)


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if "array_record" in path.name
    }


def shard(root, number=0):
    return sorted(root.glob("*tfrecord*"))[number]


# --- What is written ----------------------------------------------------------------------------


def test_manifest_counts_and_hashes(tmp_path):
    root, out = folder(tmp_path / "in/1.2.3"), tmp_path / "out/1.2.3"
    convert(root.parent, out)
    manifest = json.loads((out / conversion.MANIFEST).read_text())
    train = manifest["splits"]["train"]
    assert (manifest["version"], train["records"], len(train["shards"])) == ("1.2.3", 8, SHARDS)
    assert train["steps"] == sum(3 + n for n in range(8))
    assert [s["steps"] for s in train["shards"]] == [7, 11, 15, 19]
    assert {s["name"]: s["sha256"] for s in train["shards"]} == hashes(out)
    for row in manifest["sources"]:
        data = (root / row["path"]).read_bytes()
        assert (row["size"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {row["path"] for row in manifest["sources"]} == {p.name for p in root.iterdir()}
    assert [p.name for p in out.parent.iterdir()] == ["1.2.3"]


def test_again_is_a_check(tmp_path, capsys):
    root, out = folder(tmp_path / "in"), tmp_path / "out"
    convert(root, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    convert(root, out)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    first = next(out.glob("*array_record*"))
    os.truncate(first, 100)
    with pytest.raises(SystemExit, match="missing or of another size"):
        convert(root, out)


def test_threads_do_not_change_the_bytes(tmp_path):
    root = folder(tmp_path / "in")
    convert(root, tmp_path / "a", "--threads", 1)
    convert(root, tmp_path / "b", "--threads", 4)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_name_and_version(tmp_path):
    root = folder(tmp_path / "in")
    convert(root, tmp_path / "x/3.0.1", "--name", "other")
    info = json.loads((tmp_path / "x/3.0.1/dataset_info.json").read_text())
    assert (info["name"], info["version"]) == ("other", "3.0.1")
    assert len(list((tmp_path / "x/3.0.1").glob("other-train.array_record-*-of-00004"))) == 4


def test_formats_are_told_apart(tmp_path):
    (tmp_path / "lerobot/meta").mkdir(parents=True)
    (tmp_path / "lerobot/meta/info.json").write_text("{}")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite/a.hdf5").write_bytes(b"")
    assert detect_format(folder(tmp_path / "set/1.0.0")) == "rlds"
    assert detect_format(tmp_path / "set") == "rlds"
    assert detect_format(tmp_path / "lerobot") == "lerobot"
    assert detect_format(tmp_path / "suite") == "hdf5"
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert detect_format(tmp_path / "a.jsonl") == "grounding"
    for path, words in ((tmp_path / "gone", "no such file"), (tmp_path, "neither RLDS")):
        with pytest.raises(conversion.ConversionError, match=words):
            detect_format(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard_records", "3"], "--shard_records: rlds has no such setting"),
        (["--name", "a-b"], "a letter, then"),
        (["--format", "lerobot"], "is this a LeRobot folder"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, capsys, options, words):
    assert words in fails(capsys, folder(tmp_path / "in"), tmp_path / "out", *options)
    assert not list(tmp_path.glob(".*"))


def test_array_record_is_not_converted_again(tmp_path, capsys):
    root = folder(tmp_path / "in", file_format="array_record")
    assert "nothing to convert" in fails(capsys, root, tmp_path / "out")


# --- Faults -------------------------------------------------------------------------------------


def test_broken_shards_are_all_named(tmp_path, capsys):
    root = folder(tmp_path / "in")
    flipped, cut = shard(root, 1), shard(root, 2)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, cut.stat().st_size - 5)
    words = fails(capsys, root, tmp_path / "out")
    assert f"{flipped} record" in words and "fails its checksum" in words
    assert f"{cut}: truncated record" in words


def test_a_missing_shard_is_named(tmp_path, capsys):
    root = folder(tmp_path / "in")
    gone = shard(root, 3)
    gone.unlink()
    assert f"missing shard {gone.name}" in fails(capsys, root, tmp_path / "out")


def test_counts_must_agree(tmp_path, capsys):
    root = folder(tmp_path / "in")
    info = json.loads((root / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"][2] = "3"
    (root / "dataset_info.json").write_text(json.dumps(info))
    words = fails(capsys, root, tmp_path / "out")
    assert "the source says 3 records, 2 were read" in words and "00002-of-00004" in words


def test_a_record_that_is_no_episode(tmp_path, capsys):
    columns = reference.BRIDGE
    root = reference.write_folder(tmp_path / "in", columns, {"train": [b"\x07\x99 nonsense"]})
    assert "record 0" in fails(capsys, root, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(SystemExit, match="already there"):
        convert(folder(tmp_path / "in"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_other_data_do_not_continue_a_conversion(tmp_path, capsys):
    root, out = folder(tmp_path / "in"), tmp_path / "out"
    cut = shard(root)
    whole = cut.read_bytes()
    os.truncate(cut, 50)
    fails(capsys, root, out)
    cut.write_bytes(whole)  # mended: another size and time of change
    words = fails(capsys, root, out)
    assert "unfinished conversion of other data" in words and str(tmp_path / ".out.conv") in words


def test_two_at_once_do_not_collide(tmp_path, capsys):
    work = tmp_path / ".out.converting"
    work.mkdir()
    with (work / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        words = fails(capsys, folder(tmp_path / "in"), tmp_path / "out")
    assert "another process converts there" in words


def test_sources_that_change_meanwhile(tmp_path, monkeypatch, capsys):
    root = folder(tmp_path / "in")
    plan = rlds_conversion(root)
    write = conversion._Shards.write

    def slow(self):
        rows = write(self)
        os.utime(shard(root), ns=(1, 1))
        return rows

    monkeypatch.setattr(conversion._Shards, "write", slow)
    with pytest.raises(conversion.ConversionError, match="changed meanwhile"):
        conversion.run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Killed, full -------------------------------------------------------------------------------


def big_folder(root):
    """Shards of some MB that do not compress, so that a conversion takes a while."""
    rng = np.random.default_rng(0)

    def episode():
        images = [rng.bytes(300_000) for _ in range(4)]
        return reference.bridge(rng, 4) | {"observation/image_0": images}

    episodes = [episode() for _ in range(48)]
    return reference.write_folder(root, reference.BRIDGE, {"train": episodes}, shards=8)


def start(source, out, limit=None, cwd=None):
    code = "import resource, sys\n"
    if limit:
        code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from st4vla_jax.data.convert import main\nmain(sys.argv[1:])"
    args = ["--from", str(source), "--out", str(out), "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stderr=subprocess.PIPE, text=True, cwd=cwd,
    )  # fmt: skip


def test_killed_and_continued_gives_the_same_bytes(tmp_path, pytestconfig):
    root, out = big_folder(tmp_path / "in"), tmp_path / "out"
    process = start(root, out, cwd=pytestconfig.rootpath.parent)
    notes = tmp_path / ".out.converting/notes"
    deadline = time.monotonic() + 60
    while len(list(notes.glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    data = tmp_path / ".out.converting/data"
    assert not out.exists() and not (data / "dataset_info.json").exists()
    done = sorted(data.glob("*-of-00008"))
    assert 2 <= len(done) < 8
    kept, broken = done[0], done[1]
    written = kept.stat().st_mtime_ns
    with broken.open("r+b") as file:  # same size, other bytes: is not taken for finished
        file.seek(1000)
        file.write(b"\0\1\2\3")
    convert(root, out)
    assert (out / kept.name).stat().st_mtime_ns == written
    convert(root, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole") and len(hashes(out)) == 8
    assert not list(out.glob("*.part")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("killed_at", ["description", "rename"])
def test_killed_at_the_end(tmp_path, monkeypatch, killed_at):
    """The last moments, which a signal seldom hits: complete shards, an unfinished folder."""
    root, out = folder(tmp_path / "in"), tmp_path / "out"

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if killed_at == "description":
            patch.setattr(conversion, "write_description", kill)
        else:
            patch.setattr(conversion.Path, "rename", _rename_but(conversion.Path.rename, out, kill))
        with pytest.raises(Killed):
            convert(root, out)
    assert not out.exists()
    (tmp_path / ".out.converting/data/x.part").write_bytes(b"half")
    convert(root, out)
    convert(root, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def _rename_but(rename, out, kill):
    return lambda self, target: kill() if target == out else rename(self, target)


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path, pytestconfig):
    root, out = big_folder(tmp_path / "in"), tmp_path / "out"
    process = start(root, out, limit=2_000_000, cwd=pytestconfig.rootpath.parent)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot be written" in words and "make room" in words
    assert "Traceback" not in words
    assert not out.exists()
    assert not list((tmp_path / ".out.converting/data").iterdir())
    assert not list((tmp_path / ".out.converting/notes").iterdir())
    convert(root, out)  # there is room now
    assert len(hashes(out)) == 8
