"""Stage 1, spatial grounding pre-training: Qwen2.5-VL answers with boxes, points, trajectories.

python -m st4vla_jax.train --config=configs/stage1_grounding.py --workdir=runs/stage1 \
    --config.init.checkpoint=qwen2_5_vl_3b

The paper gives data (3.0 M samples, spec upstream.md 4.5), not batch, rate or length: 256 samples
and 1e-5 are Qwen's own fine-tuning settings, 20,000 updates the name of a released checkpoint.
"""

from ml_collections import ConfigDict

from configs.common import grounding_sets, train_config, vlm_alone


def get_config() -> ConfigDict:
    config = vlm_alone(train_config(**grounding_sets()))
    config.steps = 20_000
    config.optim.warmup = 600
    config.loss.text = 1.0
    config.data.schedule.update({"grounding_samples": 256, "tokens": 2048})
    config.data.image.max_pixels = 50_176
    return config
