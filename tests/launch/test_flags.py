"""The flags of launch/env.sh against the compilers that they are for."""

import os
import re
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


def flags(platform: str, variable: str) -> str:
    script = f'. launch/env.sh; set_compiler_flags {platform}; printf %s "${variable}"'
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


def compile_fsdp_scan(options: dict[str, str]):
    """Forward and backward of four weight-sharded layers on v5p:2x2x1."""
    for key, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    try:
        devices = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
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


@pytest.mark.aot
def test_tpu_flags_make_collectives_asynchronous():
    given = dict(f.removeprefix("--").split("=") for f in flags("tpu", "LIBTPU_INIT_ARGS").split())
    assert len(given) == 5

    def pairs(options):
        return len(re.findall(r"AsyncCollectiveStart", compile_fsdp_scan(options).as_text()))

    assert pairs({}) == 0
    assert pairs(given) > 0


@pytest.mark.aot
def test_an_unknown_tpu_flag_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_fsdp_scan({"xla_tpu_enable_async_collective_fusions": "true"})
