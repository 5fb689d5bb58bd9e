"""Eight CPU devices, f32 matmuls at highest precision, and the folder of shared test material."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared beside the checkout; a user's clone has none, so the test is skipped there."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED
