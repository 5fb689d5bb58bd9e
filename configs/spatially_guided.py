"""Ablation: spatially guided co-training without stage 1 (paper table 4).

python -m st4vla_jax.train --config=configs/spatially_guided.py --workdir=runs/spatially_guided \
    --config.init.checkpoint=dino_and_qwen

The same as stage 2; the weights that it starts from are plain Qwen2.5-VL's.
"""

from ml_collections import ConfigDict

from configs import stage2_action


def get_config() -> ConfigDict:
    return stage2_action.get_config()
