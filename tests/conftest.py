"""Eight CPU devices, f32 matmuls at highest precision, and the folder of shared test material."""

import os

# Tests compile much and compute little: LLVM at level 0 halves their time, and fusions by the
# elemental emitters, without MLIR, halve it again.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import jax
import pytest

# Imported first: pytest's importlib mode would take the folder tests/convert_weights for it.
import convert_weights  # noqa: F401

jax.config.update("jax_default_matmul_precision", "highest")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared beside the checkout; a user's clone has none, so the test is skipped there."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a skipped parity or ahead-of-time test is a failure: a green run must have run them."""
    outcome = yield
    report = outcome.get_result()
    required = {m for m in ("parity", "aot") if item.get_closest_marker(m)}
    if report.skipped and required and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, though marked {sorted(required)}: {report.longrepr}"
