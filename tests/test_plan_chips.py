"""Names of slices, and what is said where there is none."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from st4vla_jax import chips
from st4vla_jax.chips import CHIPS, GIB, TopologyError, marketing_name, parse_slice, slice_devices


@pytest.mark.parametrize(
    "name,topology,count",
    [
        ("v5p-128", "v5p:4x4x4", 64), ("v5p-8", "v5p:2x2x1", 4), ("v5p-2048", "v5p:8x8x16", 1024),
        ("v5e-64", "v5e:8x8", 64), ("v5litepod-256", "v5e:16x16", 256),
        ("v6e-256", "v6e:16x16", 256), ("V4-32", "v4:2x2x4", 16), ("v5e:2x4", "v5e:2x4", 8),
    ],
)  # fmt: skip
def test_names(name, topology, count):
    """A v4's and a v5p's number counts cores, of which a chip has two."""
    tpu = parse_slice(name)
    assert (tpu.name, tpu.chips) == (topology, count)
    assert parse_slice(topology) == tpu
    assert parse_slice(marketing_name(tpu.chip, topology.split(":")[1])) == tpu


@pytest.mark.parametrize(
    "name,message",
    [
        ("v5p:3x3x3", r"does not exist; v5p has .*v5p:4x4x4 \(v5p-128\)"),
        ("v5e:4x4x4", r"does not exist; v5e has v5e:2x2 \(v5litepod-4\)"),
        ("v5e-7", "does not exist"),
        ("v5p-7", "does not exist"),
        ("v5ee:2x2", "did you mean 'v5e'"),
        ("tpu", "write NAME:AxB"),
    ],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(TopologyError, match=message):
        parse_slice(name)


def test_number_of_slices():
    tpu = parse_slice("v5e:8x8", 2)
    assert (tpu.chips, tpu.hosts) == (128, 32)
    with pytest.raises(TopologyError, match="at least 1"):
        parse_slice("v5e:8x8", 0)


def test_rings():
    """v5p's cubes close every axis of whole cubes, v5e's only those of 16."""
    assert [parse_slice("v5p:2x4x4").is_ring(i) for i in range(3)] == [False, True, True]
    assert [parse_slice("v5e:8x16").is_ring(i) for i in range(2)] == [False, True]


@pytest.mark.parametrize(
    "error,message",
    [
        ("JAX TPU support not installed; cannot generate TPU topology", r"pip install '\.\[tpu\]'"),
        ("ABORTED: The TPU is already in use; libtpu multi-process lockfile", "held by another"),
        ("INVALID_ARGUMENT: no", "cannot compile for v5e:8x8: INVALID_ARGUMENT: no"),
    ],
)
def test_libtpu_that_does_not_answer(monkeypatch, error, message):
    def refuse(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(chips.topologies, "get_topology_desc", refuse)
    with pytest.raises(TopologyError, match=message):
        slice_devices(parse_slice("v5e:8x8"))


@pytest.mark.aot
@pytest.mark.parametrize("name", CHIPS)
def test_the_compiler_knows_every_chip(name):
    tpu = parse_slice(f"{name}:{CHIPS[name].shapes[2]}")
    devices = slice_devices(tpu)
    assert len(devices) == tpu.chips
    assert {d.device_kind for d in devices} == {tpu.chip.device_kind}
    assert tuple(max(d.coords[i] for d in devices) + 1 for i in range(len(tpu.shape))) == tpu.shape
    hosts = {d.process_index for d in devices}
    assert len(hosts) == tpu.hosts
    assert len({tuple(d.coords) for d in devices}) == math.prod(tpu.shape)


@pytest.mark.aot
@pytest.mark.parametrize("name", CHIPS)
def test_memory_is_what_the_compiler_allows(name):
    device = slice_devices(parse_slice(f"{name}:{CHIPS[name].shapes[0]}"))[0]
    huge = jax.ShapeDtypeStruct((100, 2**28), jnp.float32, sharding=SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    allowed = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))[1]
    assert CHIPS[name].hbm_bytes == float(allowed) * GIB
