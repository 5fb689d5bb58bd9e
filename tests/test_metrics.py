"""Metrics: JSON lines over resumes, event files parsed by protobuf's own runtime, wandb's calls."""

import io
import json
import logging
import math
import os
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.unknown_fields import UnknownFieldSet
from PIL import Image

from st4vla_jax import metrics
from st4vla_jax.data.tfrecord import read_records
from st4vla_jax.metrics import MetricWriter, WandbSettings, is_wall_clock, read_metrics


def write_steps(workdir, steps, first=0, **kwargs):
    with_defaults = {"process_index": 0, "first_step": first, **kwargs}
    writer = MetricWriter(workdir, **with_defaults)
    for step in steps:
        writer.write(step, {"loss/total": 1 / (step + 1), "time/step": time.time()})
        if step % 2:
            writer.write(step, {"eval/error": step})
    writer.close()


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [{k: v for k, v in json.loads(line).items() if not is_wall_clock(k)}
            for line in text.splitlines()]  # fmt: skip


# --- metrics.jsonl ------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [3, 4, 6])
@pytest.mark.parametrize("saved", [0, 3])
def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path, killed_after, saved):
    """Lines 1 to 6; what was written at step 3 stands before the checkpoint of step 3."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_steps(whole, range(1, 7))
    write_steps(parts, range(1, killed_after + 1))
    write_steps(parts, range(saved + 1, 7), first=saved)
    assert lines(parts) == lines(whole) and len(lines(whole)) == 9


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    write_steps(tmp_path, range(3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write_steps(tmp_path, range(2))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 1]
    assert (tmp_path / "metrics.old.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [b'{"step": 2, "time": 17', b'{"step": 2, "time": 17.0}'])
def test_a_line_cut_off_by_a_kill_goes(tmp_path, cut):
    write_steps(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + cut)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 1, 2]
    metrics.drop_steps(path, 3)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("crash_in", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_dropping_leaves_the_old_file(tmp_path, monkeypatch, crash_in):
    write_steps(tmp_path, range(4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(crash_in, crash)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path, process_index=0, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_numbers_that_are_not_finite(tmp_path):
    writer = MetricWriter(tmp_path, process_index=0)
    found = {"a": math.nan, "b": -math.inf, "c": jnp.inf, "d": np.float32(0.1), "e": jnp.ones(())}
    writer.write(7, found)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    # Readable at once, without close: a killed run keeps what it has written.
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [line[k] for k in "abce"] == ["NaN", "-Infinity", "Infinity", 1.0]
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"]) and read["b"] == -math.inf and read["c"] == math.inf
    assert read["step"] == 7 and abs(read["time"] - time.time()) < 60
    assert read["d"] == float(np.float32(0.1))


def test_bad_metrics_are_all_named_and_nothing_is_written(tmp_path):
    writer = MetricWriter(tmp_path, process_index=0)
    with pytest.raises(ValueError, match=r"'time' is a field.*'loss' has shape \(2,\)"):
        writer.write(0, {"time": 1.0, "loss": np.zeros(2), "fine": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    (tmp_path / "metrics.jsonl").write_text("[}\n")
    with pytest.raises(ValueError, match="metrics.jsonl: not JSON lines"):
        read_metrics(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    writer = MetricWriter(tmp_path / "run", process_index=1, wandb=WandbSettings())
    writer.write(0, {"loss/total": 1.0})
    writer.text(0, "config", "x")
    assert writer.image(0, "batch", np.zeros((2, 2, 3), np.uint8)) is None
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name,expected",
    [
        ("time", True), ("time/step", True), ("data/wait", True), ("goodput/ratio", True),
        ("memory/host", True), ("mfu", True), ("loss/total", False), ("data/packing", False),
        ("timestep/mean", False), ("step", False),
    ],
)  # fmt: skip
def test_wall_clock_names(name, expected):
    assert is_wall_clock(name) is expected


# --- TensorBoard --------------------------------------------------------------------------------

FIELD = descriptor_pb2.FieldDescriptorProto
KINDS = {
    name: getattr(FIELD, f"TYPE_{name.upper()}")
    for name in ("double", "float", "int64", "int32", "string", "bytes")
}
# From tensorflow/core/util/event.proto, framework/summary.proto and framework/tensor.proto.
MESSAGES = {
    "Event": "1 wall_time double, 2 step int64, 3 file_version string, 5 summary Summary, "
             "7 session_log SessionLog",
    "SessionLog": "1 status int32, 2 checkpoint_path string",
    "Summary": "1 value *Value",
    "Value": "1 tag string, 2 simple_value float, 4 image Image, 8 tensor Tensor, "
             "9 metadata Metadata",
    "Image": "1 height int32, 2 width int32, 3 colorspace int32, 4 encoded_image_string bytes",
    "Metadata": "1 plugin_data PluginData, 2 display_name string",
    "PluginData": "1 plugin_name string, 2 content bytes",
    "Tensor": "1 dtype int32, 2 tensor_shape Shape, 8 string_val *bytes",
    "Shape": "2 dim *Dim",
    "Dim": "1 size int64, 2 name string",
}  # fmt: skip


@pytest.fixture(scope="module")
def event_class():
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            number, label, kind = field.split()
            repeated, kind = kind.startswith("*"), kind.lstrip("*")
            made = message.field.add(name=label, number=int(number))
            made.label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
            if kind in KINDS:
                made.type = KINDS[kind]
            else:
                made.type, made.type_name = FIELD.TYPE_MESSAGE, f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def events(workdir, event_class):
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        assert path.name.startswith("events.out.tfevents.")
        for _, data, _, intact in read_records(path):
            assert intact
            event = event_class.FromString(data)
            assert not len(UnknownFieldSet(event))
            found.append(event)
    return found


def test_event_file(tmp_path, event_class):
    writer = MetricWriter(tmp_path, process_index=0)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writer.write(5, {"loss/total": 0.1, "é": math.nan, "big": 1e300})
    writer.text(6, "config", "a: 1\nb: ü")
    path = writer.image(2**40, "first/batch", picture)
    head, start, scalars, text, image = events(
        tmp_path, event_class
    )  # before close: all is flushed

    assert head.file_version == "brain.Event:2" and abs(head.wall_time - time.time()) < 60
    assert start.session_log.status == 1 and start.step == 0
    assert scalars.step == 5 and [v.tag for v in scalars.summary.value] == [
        "loss/total",
        "é",
        "big",
    ]
    values = [v.simple_value for v in scalars.summary.value]
    assert values[0] == np.float32(0.1) and math.isnan(values[1]) and values[2] == math.inf
    (value,) = text.summary.value
    assert value.metadata.plugin_data.plugin_name == "text" and value.tensor.dtype == 7
    assert [d.size for d in value.tensor.tensor_shape.dim] == [1]
    assert [s.decode() for s in value.tensor.string_val] == ["a: 1\nb: ü"]
    (value,) = image.summary.value
    assert image.step == 2**40 and (value.image.height, value.image.width) == (4, 6)
    assert value.image.colorspace == 3 and value.tag == "first/batch"
    for source in (io.BytesIO(value.image.encoded_image_string), path):
        assert (np.asarray(Image.open(source)) == picture).all()
    assert path == tmp_path / "images" / f"first_batch_{2**40}.png"


def test_a_resumed_run_tells_viewers_to_forget_later_steps(tmp_path, event_class):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(3, 4), first=2)
    found = events(tmp_path, event_class)
    starts = [e for e in found if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(0, 1), (3, 1)]
    assert [e.step for e in found if e.HasField("summary")] == [1, 1, 2, 3, 3, 3, 3]


def test_no_event_files_if_not_wanted(tmp_path):
    write_steps(tmp_path, range(1), tensorboard=False)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_tensorboard_reads_it(tmp_path):
    """TensorBoard's own reader, where it is installed."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module).EventAccumulator
    write_steps(tmp_path, range(4))
    writer = MetricWriter(tmp_path, process_index=0, first_step=1)
    writer.write(2, {"loss/total": 8.0})
    writer.text(2, "config", "a: 1")
    writer.image(2, "batch", np.zeros((4, 6, 3), np.uint8))
    read = accumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    found = [(e.step, e.value) for e in read.Scalars("loss/total")]
    assert found == [(0, 1.0), (1, 0.5), (2, 8.0)]
    assert read.Images("batch")[0].width == 6
    assert read.Tensors("config")[0].tensor_proto.string_val[0] == b"a: 1"


# --- Weights & Biases ---------------------------------------------------------------------------


class FakeWandb(SimpleNamespace):
    """Notes what is called; refuses the modes in ``broken``."""

    class Error(Exception):
        pass

    Html = Image = staticmethod(lambda x: ("media", x))

    def __init__(self, broken=()):
        super().__init__(calls=[], broken=broken)

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))
        if kwargs["mode"] in self.broken:
            raise self.Error("no network")
        return SimpleNamespace(**{
            name: lambda *a, n=name, **k: self.calls.append((n, a, k))
            for name in ("log", "finish", "define_metric")
        })  # fmt: skip


def test_wandb_continues_the_run_of_the_workdir(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = WandbSettings(project="p", name="n", tags=("a",), config={"lr": 1.0})
    for first in (0, 2):
        writer = MetricWriter(tmp_path, process_index=0, first_step=first, wandb=settings)
        writer.write(first, {"loss/total": 1.5})
        writer.text(first, "config", "<b>")
        writer.image(first, "batch", np.zeros((2, 2, 3), np.uint8))
        writer.close()
        writer.close()
    inits = [c[1] for c in fake.calls if c[0] == "init"]
    assert inits[0] == inits[1] and inits[0]["resume"] == "allow" and inits[0]["project"] == "p"
    assert inits[0]["id"] == (tmp_path / "wandb_run_id.txt").read_text()
    assert inits[0]["dir"] == str(tmp_path) and inits[0]["config"] == {"lr": 1.0}
    logged = [c[1][0] for c in fake.calls if c[0] == "log"]
    assert logged[0] == {"step": 0, "loss/total": 1.5} and logged[3]["step"] == 2
    assert logged[1] == {"step": 0, "config": ("media", "<pre>&lt;b&gt;</pre>")}
    assert [c[0] for c in fake.calls].count("finish") == 2


@pytest.mark.parametrize(
    "broken,modes", [(("online",), ["online", "offline"]), (("online", "offline"), None)]
)
def test_wandb_that_does_not_start_costs_a_warning(tmp_path, monkeypatch, caplog, broken, modes):
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(2), wandb=WandbSettings())
    assert [c[1]["mode"] for c in fake.calls if c[0] == "init"] == (modes or list(broken))
    assert "wandb does not start (mode online): no network" in caplog.text
    assert len(read_metrics(tmp_path)) == 3


def test_without_the_wandb_package(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(2), wandb=WandbSettings())
    assert "wandb is not installed" in caplog.text and len(read_metrics(tmp_path)) == 3


@pytest.mark.slow
def test_real_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    settings = WandbSettings(project="p", mode="offline", config={"lr": 1.0})
    for first in (0, 2):
        writer = MetricWriter(tmp_path, process_index=0, first_step=first, wandb=settings)
        writer.write(first, {"loss/total": 1.5, "x": math.nan})
        writer.text(first, "config", "<b>")
        writer.image(first, "batch", np.zeros((2, 2, 3), np.uint8))
        writer.close()
    run_id = (tmp_path / "wandb_run_id.txt").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))) >= 1
