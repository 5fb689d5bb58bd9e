"""Data of a run: the mixture, what an update holds, how samples become batches.

python -m st4vla_jax.data.preview --config=configs/data.py --steps 100 \
    --config.data.sets.bridge.path=/data/bridge_dataset/1.0.0

Other configs take `data_config` and change what they need; every key is explained in
st4vla_jax/data/settings.py.
"""

from ml_collections import ConfigDict

from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.reading import ReadPolicy
from st4vla_jax.data.schedule import ScheduleConfig


def data_config(**sets: dict) -> ConfigDict:
    """The data section with these sets by name; defaults are the paper's 256 + 64 samples."""
    return ConfigDict(
        {
            "sets": sets,
            "alpha": 0.0,
            "schedule": vars(ScheduleConfig()),
            "read": vars(ReadPolicy()),
            "image": {**vars(ImageConfig(min_pixels=784, max_pixels=50_176)), "size": (224, 224)},
            "augment": ConfigDict(),
            "prompts": ("paper",),
            "system": "You are a helpful assistant.",
            "lower_case": False,
            "tokenizer": "",
            "statistics": "",
            "dino_size": 224,
            "chunk": 16,
            "action_dim": 7,
            "state_dim": 0,
            "threads": 8,
            "index_dir": "",
        }
    )


def get_config() -> ConfigDict:
    """Bridge alone."""
    bridge = {"kind": "rlds", "path": "data/bridge_dataset/1.0.0", "spec": "bridge_orig"}
    config = ConfigDict({"data": data_config(bridge=bridge)})
    config.data.schedule.grounding_samples = 0
    return config
