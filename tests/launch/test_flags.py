"""The flags of launch/env.sh against the compilers that they are for."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from st4vla_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]


def flags(platform: str, variable: str, before: str = "") -> str:
    script = f'. launch/env.sh; {before} set_compiler_flags {platform}; printf %s "${variable}"'
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=20,
        check=True,
    ).stdout  # fmt: skip


def start_jax(xla_flags: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    code = "import jax; print(jax.jit(lambda x: x + 1)(1.0))"
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


def test_xla_knows_the_gpu_flags():
    """XLA's flags are parsed on every platform; what they do is not seen here."""
    known = start_jax(flags("gpu", "XLA_FLAGS"))
    assert known.returncode == 0 and known.stdout == "2.0\n", known.stderr
    unknown = start_jax("--xla_gpu_enable_latency_hiding_schedulers=true")
    assert unknown.returncode != 0 and "Unknown flag" in unknown.stderr


def compile_fsdp_scan(options: dict[str, str], topology: str = "v5e:2x2"):
    """Forward and backward of four weight-sharded layers."""
    for key, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except RuntimeError as e:
        pytest.skip(f"needs libtpu (the [tpu] extra): {e}")
    mesh = make_mesh(1, 4, 1, devices=devices)

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w[0]) @ w[1], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32))

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    args = (array((4, 2, 1024, 1024), None, None, "fsdp"), array((2048, 1024), "fsdp"))
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        return jax.jit(jax.grad(loss)).lower(*args).compile(compiler_options=options)


def tpu_flags(generation: str) -> dict[str, str]:
    text = flags(f"tpu {generation}", "LIBTPU_INIT_ARGS")
    return dict(flag.removeprefix("--").split("=") for flag in text.split())


@pytest.mark.aot
@pytest.mark.parametrize(
    "generation,topology,sign",
    [("v5e", "v5e:2x2", "AsyncCollectiveStart"), ("v6e", "v6e:2x2", " call-start(")],
)
def test_tpu_flags_make_collectives_asynchronous(generation, topology, sign):
    """On v5e by steps beside matmuls, on v6e by SparseCores."""
    text = compile_fsdp_scan(tpu_flags(generation), topology).as_text()
    assert sign in text
    assert ("sparsecore" in text) == (generation == "v6e")


@pytest.mark.parametrize(
    "device,generation", [("0x005e", "v4"), ("0x0062", "v5p"), ("0x0063", "v5e"), ("0x006f", "v6e")]
)
def test_the_generation_is_found_out(tmp_path, device, generation):
    for name, vendor, number in (("a", "0x8086", "0x0063"), ("b", "0x1ae0", device)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor)
        (tmp_path / name / "device").write_text(number)
    found = flags("tpu", "LIBTPU_INIT_ARGS", f"PCI_DEVICES={tmp_path};")
    assert found == flags(f"tpu {generation}", "LIBTPU_INIT_ARGS")


def test_unknown_generations_get_what_all_know():
    both = tpu_flags("v5p").items() & tpu_flags("v5e").items()
    assert tpu_flags("v9").items() == both and len(both) == 3


@pytest.mark.aot
def test_an_unknown_tpu_flag_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_fsdp_scan({"xla_tpu_enable_async_collective_fusions": "true"})
