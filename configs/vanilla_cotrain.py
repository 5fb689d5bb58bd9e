"""Ablation: actions and grounding together, no spatial prompt, no decay (paper table 4).

python -m st4vla_jax.train --config=configs/vanilla_cotrain.py --workdir=runs/vanilla_cotrain \
    --config.init.checkpoint=dino_and_qwen
"""

from ml_collections import ConfigDict

from configs import stage2_action


def get_config() -> ConfigDict:
    config = stage2_action.get_config()
    config.model.bridge.gradient_scale = 1.0
    config.data.prompts = ("none",)
    return config
