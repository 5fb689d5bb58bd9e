"""Writing and reading checkpoints; what must not happen to folders."""

import dataclasses
import json
import subprocess

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from st4vla_jax import checkpoint as ckpt
from st4vla_jax.checkpoint import CheckpointError, Meta
from st4vla_jax.config import model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.data.prompts import PromptConfig
from st4vla_jax.sharding import make_mesh

META = Meta(
    model=model_config("tiny", "tiny", "tiny"),
    prompt=PromptConfig("Do {instruction}!", lower_case=True),
    image=ImageConfig(size=(56, 84)),
    action=ActionSpec(mode="min_max"),
    source={"a.pt": "00ff"},
    notes={"fresh": "bridge"},
    stored_head=True,
    step=7,
)
LEAVES = {
    "vlm/visual/a/kernel": np.arange(64, dtype=ml_dtypes.bfloat16).reshape(8, 8),
    "vlm/language_model/b": np.arange(3, dtype=np.float32),
    "dit/c": np.float32(np.random.default_rng(0).standard_normal((2, 3, 4))),
}


@pytest.fixture
def written(tmp_path):
    out = tmp_path / "ckpt"
    file = tmp_path / "t.json"
    file.write_text("{}")
    files = {"tokenizer/tokenizer.json": file, ckpt.STATISTICS: b'{"x": 1}'}
    ckpt.write_checkpoint(out, LEAVES.items(), META, files)
    return out


def assert_leaves(found):
    assert set(found) == set(LEAVES)
    for path, array in LEAVES.items():
        assert isinstance(found[path], np.ndarray)
        assert found[path].dtype == array.dtype and np.array_equal(found[path], array)


def flat(tree):
    return {
        "/".join(k.key for k in keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def test_round_trip(written):
    assert ckpt.read_meta(written) == META
    assert_leaves(dict(ckpt.iter_params(written)))
    assert_leaves(flat(ckpt.read_params(written)))
    shapes = ckpt.param_shapes(written)
    assert {k: (s.shape, s.dtype) for k, s in shapes.items()} == {
        k: (x.shape, x.dtype) for k, x in LEAVES.items()
    }
    assert (written / "meta/tokenizer/tokenizer.json").read_text() == "{}"
    assert (written / "meta" / ckpt.STATISTICS).read_bytes() == b'{"x": 1}'
    assert sorted(p.name for p in written.iterdir()) == ["meta", "params"]
    assert [p.name for p in written.parent.iterdir() if p.name.startswith(".")] == []


def test_large_parameters_are_written_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "_GROUP_BYTES", 100)
    ckpt.write_checkpoint(tmp_path / "c", LEAVES.items(), META, {})
    assert_leaves(dict(ckpt.iter_params(tmp_path / "c")))


def test_standard_checkpointer_reads_it(written):
    tree = ocp.StandardCheckpointer().restore(written / "params")
    assert_leaves({k: np.asarray(v) for k, v in flat(tree).items()})


def test_sharded_restore_casts_and_selects(written):
    mesh = make_mesh(data=1, fsdp=8)
    shardings = {"vlm": {
        "visual": {"a": {"kernel": NamedSharding(mesh, P("fsdp", None))}},
        "language_model": {"b": NamedSharding(mesh, P())},
    }}  # fmt: skip
    params = ckpt.read_params(written, shardings, np.float32, subtrees=("vlm",))
    kernel = params["vlm"]["visual"]["a"]["kernel"]
    assert set(params) == {"vlm"} and kernel.dtype == np.float32
    assert kernel.addressable_shards[0].data.shape == (1, 8)
    assert np.array_equal(kernel, LEAVES["vlm/visual/a/kernel"].astype(np.float32))
    with pytest.raises(CheckpointError, match="no parameters named bridge"):
        ckpt.read_params(written, subtrees=("bridge",))


def test_refuses_what_is_there(written, tmp_path):
    before = sorted(p.relative_to(written) for p in written.rglob("*"))
    with pytest.raises(CheckpointError, match="ckpt: already there; give --overwrite"):
        ckpt.write_checkpoint(written, LEAVES.items(), META, {})
    assert before == sorted(p.relative_to(written) for p in written.rglob("*"))
    ckpt.write_checkpoint(written, [("x/y", np.ones(2))], META, {}, overwrite=True)
    assert set(ckpt.param_shapes(written)) == {"x/y"}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis: holds no meta/meta.json"):
        ckpt.write_checkpoint(tmp_path / "thesis", LEAVES.items(), META, {}, overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def test_failure_leaves_nothing_and_keeps_the_old(written):
    def broken():
        yield from LEAVES.items()
        raise RuntimeError("disk on fire")

    for out, overwrite in ((written, True), (written.with_name("new"), False)):
        with pytest.raises(RuntimeError, match="on fire"):
            ckpt.write_checkpoint(out, broken(), META, {}, overwrite=overwrite)
    assert sorted(p.name for p in written.parent.iterdir()) == ["ckpt", "t.json"]
    assert_leaves(dict(ckpt.iter_params(written)))


def test_output_named_by_a_link(written, tmp_path):
    link, gone = tmp_path / "lnk", tmp_path / "gone"
    link.symlink_to(written)
    gone.symlink_to(tmp_path / "new")
    for out in (link, gone):
        ckpt.write_checkpoint(out, [("x/y", np.ones(2))], META, {}, overwrite=True)
        assert out.is_symlink() and set(ckpt.param_shapes(out)) == {"x/y"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "gone", "lnk", "new", "t.json"]
    with pytest.raises(CheckpointError, match=r"t\.json/c: .*t\.json is a file"):
        ckpt.check_target(tmp_path / "t.json" / "c", ckpt.META)


def test_damaged_parameters_are_named(tmp_path):
    """A truncated file of data: the small parameter beside it lies elsewhere and can be read."""
    large = np.random.default_rng(0).random((300, 300), np.float32)
    leaves = {"vlm/a/kernel": large, "vlm/b": np.ones(3, np.float32)}
    ckpt.write_checkpoint(tmp_path / "c", leaves.items(), META, {})
    data = max((tmp_path / "c").glob("params/**/d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    assert set(ckpt.param_shapes(tmp_path / "c")) == set(leaves)
    assert np.array_equal(ckpt.read_leaf(tmp_path / "c", "vlm/b"), leaves["vlm/b"])
    for read in (ckpt.read_params, lambda folder: ckpt.read_leaf(folder, "vlm/a/kernel")):
        with pytest.raises(CheckpointError, match="c/params: cannot read vlm/a/kernel, .*damaged"):
            read(tmp_path / "c")
    with pytest.raises(CheckpointError, match="c: has no parameter named not/there"):
        ckpt.read_leaf(tmp_path / "c", "not/there")


def test_damaged_tree(written):
    tree = written / "params" / "_METADATA"
    content = tree.read_bytes()
    for bad in (content[: len(content) // 2], b"\xff\xfe", b"[]"):
        tree.write_bytes(bad)
        for read in (ckpt.param_shapes, ckpt.read_params, lambda c: ckpt.read_leaf(c, "dit/c")):
            with pytest.raises(CheckpointError, match="ckpt/params: cannot read (_META|dit/c)"):
                read(written)
    tree.write_bytes(content)
    (written / "params" / "manifest.ocdbt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="ckpt/params: cannot read (vlm|dit)/"):
        ckpt.param_shapes(written)


def git(folder, *args):
    identity = ("-c", "user.name=x", "-c", "user.email=x@y")
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision_is_of_this_packages_checkout(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    own = tmp_path / "st4vla_jax" / "checkpoint.py"
    installed = tmp_path / "venv" / "site-packages" / "st4vla_jax" / "checkpoint.py"
    for file, revision in ((own, git(tmp_path, "rev-parse", "HEAD")), (installed, None)):
        file.parent.mkdir(parents=True)
        monkeypatch.setattr(ckpt, "__file__", str(file))
        assert ckpt.git_revision() == revision


@pytest.mark.parametrize("name", ["meta/meta.json", "params/_METADATA"])
def test_incomplete_folder(written, name):
    (written / name).unlink()
    with pytest.raises(CheckpointError, match=f"no complete checkpoint, lacks {name}"):
        ckpt.read_meta(written)


def test_meta_of_another_version(written):
    path = written / ckpt.META
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format_version": ckpt.FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match="format_version 2 is newer.*update st4vla_jax"):
        ckpt.read_meta(written)
    bad = json.loads(json.dumps(values))
    bad["colour"] = "red"
    del bad["step"], bad["prompt"]["system"]
    path.write_text(json.dumps(bad))
    with pytest.raises(CheckpointError) as error:
        ckpt.read_meta(written)
    for part in ("unknown key colour", "missing key step", "missing key prompt.system"):
        assert part in str(error.value)
    for changed, message in (
        ({"image": {**values["image"], "size": [0, -3]}}, "size .0, -3.: need"),
        ({"image": {**values["image"], "min_pixels": "1"}}, "min_pixels '1'"),
        ({"model": 5}, "meta.json: "),
        ({"format_version": "1"}, "format_version '1' is no number"),
    ):
        path.write_text(json.dumps(values | changed))
        with pytest.raises(CheckpointError, match=message):
            ckpt.read_meta(written)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="meta.json: not readable"):
        ckpt.read_meta(written)


def test_meta_without_action_spec():
    meta = dataclasses.replace(META, model=model_config("tiny", None, None), action=None)
    assert Meta.from_json(json.loads(json.dumps(meta.to_json()))) == meta
