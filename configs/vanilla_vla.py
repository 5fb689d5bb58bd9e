"""Ablation: actions alone, no spatial prompt, no decay, from plain Qwen2.5-VL (paper table 4).

python -m st4vla_jax.train --config=configs/vanilla_vla.py --workdir=runs/vanilla_vla \
    --config.init.checkpoint=dino_and_qwen
"""

from ml_collections import ConfigDict

from configs.common import robot_sets, train_config


def get_config() -> ConfigDict:
    config = train_config(**robot_sets("bridge_rt_1"))
    config.model.bridge.gradient_scale = 1.0
    config.data.prompts = ("none",)
    config.data.schedule.grounding_samples = 0
    return config
