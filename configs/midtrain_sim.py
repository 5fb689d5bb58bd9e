"""Mid-training of the whole policy on simulated pick-and-place, a LeRobot folder (paper 4.2).

python -m st4vla_jax.train --config=configs/midtrain_sim.py --workdir=runs/midtrain \
    --config.init.checkpoint=runs/stage2 --config.data.statistics=sim/dataset_statistics.json \
    --config.data.sets.sim.path=DIR/lerobot_sim_pick_place

The demonstrations have eight action dimensions (seven joint deltas and a gripper); statistics come
from python -m st4vla_jax.compute_stats.  An action expert of seven dimensions does not fit: set
--config.init.dit=fresh.
"""

from ml_collections import ConfigDict

from configs.common import grounding_sets, train_config


def get_config() -> ConfigDict:
    sim = {
        "kind": "lerobot", "path": "data/lerobot_sim_pick_place", "spec": "sim_pick_place",
    }  # fmt: skip
    config = train_config(sim=sim, **grounding_sets())
    config.steps = 20_000
    config.model.action = ConfigDict({"action_dim": 8})
    return config
