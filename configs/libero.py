"""Fine-tuning on one LIBERO suite: 128 robot samples, 30,000 updates, two views (paper 4.1).

python -m st4vla_jax.train --config=configs/libero.py:goal --workdir=runs/libero_goal \
    --config.init.checkpoint=runs/stage2

The suite is goal, object, spatial, 10 or 90; chunks of 8 steps as upstream's LIBERO config.
"""

from ml_collections import ConfigDict

from configs.common import grounding_sets, robot_sets, train_config


def get_config(suite: str = "goal") -> ConfigDict:
    sets = robot_sets(f"libero_{suite}")
    for entry in sets.values():
        entry["views"] = ("primary", "wrist")
    config = train_config(**sets, **grounding_sets())
    config.steps = 30_000
    config.model.action = ConfigDict({"chunk": 8})
    config.data.schedule.update({"robot_samples": 128, "grounding_samples": 32, "views": 2})
    for name, group in config.optim.groups.items():
        group.min_ratio = 0.04
        if name in ("dino", "bridge"):
            group.lr = 2.5e-5
    return config
