"""All stages at the size of a laptop, on the built-in tabletop (launch/quickstart.sh runs them).

python -m st4vla_jax.tabletop.dataset --episodes 2000 --grounding 16000 --out data/tabletop
python -m st4vla_jax.train --config=configs/tabletop.py:stage1 --workdir=runs/tabletop1 \
    --config.init.checkpoint=st4vla_jax/tabletop/weights
python -m st4vla_jax.train --config=configs/tabletop.py:stage2 --workdir=runs/tabletop2 \
    --config.init.checkpoint=st4vla_jax/tabletop/weights --config.init.vlm=runs/tabletop1
"""

from ml_collections import ConfigDict

from configs.common import tiny, train_config, vlm_alone
from st4vla_jax.tabletop.language import PROMPT

ROOT = "data/tabletop"


def grounding_set(name: str, root: str) -> dict:
    files = {"path": f"{root}/{name}/records.jsonl", "images": f"{root}/{name}"}
    return {"kind": "grounding", "holdout": 0.1, **files}


def robot_set(root: str) -> dict:
    path = f"{root}/tabletop/1.0.0"
    return {"kind": "rlds", "path": path, "spec": "tabletop", "holdout": 0.1}


def make_config(is_vlm: bool, **sets: dict) -> ConfigDict:
    """The VLM alone (stage 1), or the whole policy, on these data sets."""
    config = tiny(train_config(**sets))
    config.model.update(dict.fromkeys(("vlm", "dino", "dit"), "tabletop"))
    config.data.update({"system": "tabletop", "prompts": (PROMPT,)})
    config.data.schedule.update({"tokens": 128, "robot_samples": 32, "grounding_samples": 16})
    config.steps, config.save_every = 400, 200
    config.evaluation.update({"every": 200, "samples": 16, "diagnostics": 0 if is_vlm else 100})
    groups = config.optim.groups
    for group in groups.values():  # AdamW had not learned words in five times the updates
        group.rule, group.lr = "muon", 2e-3
    groups.words = {**groups.vlm, "pattern": "vlm/language_model/embed_tokens/", "rule": "adam"}
    config.optim.update({"b1": 0.95, "warmup": 50})
    if is_vlm:
        config = vlm_alone(config)
        config.data.schedule.grounding_samples = 128
        config.loss.text, config.optim.groups.vlm.lr = 1.0, 4e-3
        return config
    groups.vlm.lr = groups.words.lr = 1e-3
    # The second block of the Q-Former asks with what the first has read of the instruction.
    config.model.bridge.update({"start_layer": 1, "end_layer": 3, "state_dim": 7})
    return config


def get_config(stage: str = "stage2") -> ConfigDict:
    if stage not in ("stage1", "stage2"):
        raise ValueError(f"configs/tabletop.py:{stage}: there are stage1 and stage2")
    sets = {"grounding": grounding_set("grounding", ROOT)}
    if stage == "stage2":
        sets["tabletop"] = robot_set(ROOT)
    config = make_config(stage == "stage1", **sets)
    config.data.tokenizer = f"{ROOT}/tokenizer"
    return config
