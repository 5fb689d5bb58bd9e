"""Stages and rows of the paper's ablation in miniature (st4vla_jax.ablation runs them all).

python -m st4vla_jax.train --config=configs/ablation.py:stage0 --workdir=runs/ablation/stage0
python -m st4vla_jax.train --config=configs/ablation.py:decay --workdir=runs/ablation/decay \
    --config.init.checkpoint=runs/ablation/stage0

Stage 0 is of generic pictures and stands in for Qwen2.5-VL; stage 1 adds robot scenes.
"""

from ml_collections import ConfigDict

from configs.tabletop import grounding_set, make_config, robot_set

ROOT = "data/ablation"
STAGES = ("stage0", "stage1")
ROWS = ("vanilla_vla", "cotrain", "prompt", "decay", "frozen")


def get_config(part: str = "decay") -> ConfigDict:
    if part not in (*STAGES, *ROWS):
        raise ValueError(f"configs/ablation.py:{part}: there are {', '.join((*STAGES, *ROWS))}")
    sets = {"tabletop": robot_set(ROOT)} if part in ROWS else {}
    if part not in ("vanilla_vla", "frozen"):
        sets["generic"] = grounding_set("generic", ROOT)
    if part not in ("vanilla_vla", "frozen", "stage0"):
        sets["grounding"] = grounding_set("grounding", ROOT)
    config = make_config(part in STAGES, **sets)
    config.data.tokenizer = f"{ROOT}/tokenizer"
    if part in STAGES:
        return config
    config.evaluation.diagnostics = 50
    config.model.bridge.gradient_scale = 0.5 if part == "decay" else 1.0
    if part in ("vanilla_vla", "cotrain"):
        config.data.prompts = ("none",)
    if part in ("vanilla_vla", "frozen"):
        config.data.schedule.grounding_samples = 0
        config.evaluation.diagnostics = 0
    if part == "frozen":
        config.optim.groups.vlm.freeze = config.optim.groups.words.freeze = True
    return config
