"""A small policy on real Bridge episodes in a folder: the whole path on a laptop.

python -m st4vla_jax.train --config=configs/bridgedata_debug.py --workdir=runs/bridge \
    --config.data.sets.bridge.path=DIR/bridge_dataset/1.0.0 \
    --config.data.sets.llava.path=DIR/llava_demo/single_images.json \
    --config.data.sets.llava.images=DIR/llava_demo
"""

from ml_collections import ConfigDict

from configs.common import tiny, train_config


def get_config() -> ConfigDict:
    config = tiny(
        train_config(
            bridge={
                "kind": "rlds", "path": "data/bridge_dataset/1.0.0", "spec": "bridge_orig",
                "holdout": 0.2,
            },
            llava={
                "kind": "grounding", "path": "data/llava_demo/single_images.json",
                "images": "data/llava_demo",
            },
        )
    )  # fmt: skip
    config.steps = 1500
    config.save_every = 500
    config.loss.text = 1.0
    config.data.schedule.update({"robot_samples": 16, "grounding_samples": 3, "window": 8})
    config.evaluation.update({"every": 500, "train_batches": 4})
    config.log.every = 10
    return config
