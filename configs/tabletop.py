"""Both stages at the size of a laptop, on the built-in tabletop (launch/quickstart.sh runs them).

python -m st4vla_jax.tabletop.dataset --episodes 400 --grounding 2000 --out data/tabletop
python -m st4vla_jax.train --config=configs/tabletop.py:stage1 --workdir=runs/tabletop1
python -m st4vla_jax.train --config=configs/tabletop.py:stage2 --workdir=runs/tabletop2 \
    --config.init.checkpoint=runs/tabletop1
"""

from ml_collections import ConfigDict

from configs.common import tiny, train_config, vlm_alone

ROOT = "data/tabletop"


def get_config(stage: str = "stage2") -> ConfigDict:
    grounding = {
        "kind": "grounding", "path": f"{ROOT}/grounding/records.jsonl",
        "images": f"{ROOT}/grounding", "holdout": 0.1,
    }  # fmt: skip
    robot = {
        "kind": "rlds", "path": f"{ROOT}/tabletop/1.0.0", "spec": "tabletop", "holdout": 0.1,
        "views": ("primary", "wrist"),
    }  # fmt: skip
    if stage not in ("stage1", "stage2"):
        raise ValueError(f"configs/tabletop.py:{stage}: there are stage1 and stage2")
    both = stage == "stage2"
    config = tiny(train_config(grounding=grounding, **({"tabletop": robot} if both else {})))
    config.data.system = "tabletop"
    config.data.prompts = ("{instruction}. Locate the key object.",)
    config.data.schedule.update({"tokens": 640, "robot_samples": 24, "grounding_samples": 12})
    config.steps, config.save_every = 400, 200
    config.evaluation.every = 200
    config.evaluation.samples = 16
    if both:
        config.data.schedule.views = 2
        config.evaluation.diagnostics = 100
        config.loss.repeats = 2
        return config
    config = vlm_alone(config)
    config.data.schedule.grounding_samples = 32
    config.loss.text = 1.0
    config.optim.groups.vlm.lr = 1e-3
    return config
