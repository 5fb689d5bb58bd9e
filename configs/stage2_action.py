"""Stage 2, spatially guided action post-training (ST4VLA): 256 robot + 64 grounding samples.

python -m st4vla_jax.train --config=configs/stage2_action.py --workdir=runs/stage2 \
    --config.init.checkpoint=dino_and_qwen --config.init.vlm=runs/stage1

Bridge and RT-1 for SimplerEnv (paper 4.1).  ``init.checkpoint`` is a converted policy
(convert_weights.to_jax --vlm --dino), ``init.vlm`` the workdir of stage 1.
"""

from ml_collections import ConfigDict

from configs.common import grounding_sets, robot_sets, train_config


def get_config() -> ConfigDict:
    return train_config(**robot_sets("bridge_rt_1"), **grounding_sets())
