"""Every key of a training config with its default: the paper's stage 2 at 3B.

python -m st4vla_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

Other configs take `train_config` and change what they need.  What a key means stands at the field
of the same name in st4vla_jax/train_config.py, optim.py and data/settings.py.
"""

from ml_collections import ConfigDict

from configs.data import data_config
from st4vla_jax import train_config as sections
from st4vla_jax.data.mixtures import mixture
from st4vla_jax.optim import Group, OptimConfig
from st4vla_jax.train_checkpoints import CheckpointSettings

# spec upstream.md 3.2: learning rates by module, one cosine to 1 % of each.
PAPER_GROUPS = {
    "vlm": Group("vlm/", lr=1e-5, weight_decay=1e-8),
    "dino": Group("dino/", lr=5e-5, weight_decay=1e-8),
    "bridge": Group("bridge/", lr=5e-5, weight_decay=1e-8),
    "dit": Group("dit/", lr=1e-4, weight_decay=1e-8),
}
DECIDED_BY_MODEL = ("dino_size", "chunk", "action_dim", "state_dim")


def robot_sets(mixture_name: str, root: str = "data") -> dict:
    """Sets of a registered mixture, each in ROOT/NAME (the folder with its versions)."""
    return {
        name: {"kind": "rlds", "path": f"{root}/{name}", "spec": name, "weight": weight}
        for name, weight in mixture(mixture_name).items()
    }


def grounding_sets(root: str = "data/grounding") -> dict:
    """The paper's groups of grounding data (spec upstream.md 4.5), weights by their sizes.

    Each is one JSONL file in LLaVA form; data.convert makes them of RefCOCO and the like.
    """
    sizes = {"general": 637, "box": 879, "trajectory": 684, "point": 832}  # thousand samples
    return {
        name: {
            "kind": "grounding", "path": f"{root}/{name}.jsonl", "images": f"{root}/images",
            "weight": float(size),
        }
        for name, size in sizes.items()
    }  # fmt: skip


def train_config(**sets: dict) -> ConfigDict:
    """All keys, with these data sets by name."""
    optim = vars(OptimConfig({})) | {"groups": {k: vars(g) for k, g in PAPER_GROUPS.items()}}
    data = data_config(**sets)
    for key in DECIDED_BY_MODEL:
        del data[key]
    config = ConfigDict(
        {
            "steps": 50_000,
            "seed": 0,
            "accumulation": 1,
            "save_every": 1000,
            "model": vars(sections.ModelSettings()),
            "runtime": vars(sections.RuntimeSettings()),
            "mesh": vars(sections.MeshSettings()),
            "init": vars(sections.InitSettings()),
            "loss": vars(sections.LossSettings()),
            "optim": optim,
            "lora": {},
            "data": data,
            "checkpoint": vars(CheckpointSettings()),
            "evaluation": vars(sections.EvaluationSettings()),
            "log": vars(sections.LogSettings()),
        }
    )
    config.model.bridge = ConfigDict({"gradient_scale": 0.5})
    return config


def vlm_alone(config: ConfigDict) -> ConfigDict:
    """Stage 1: no robot samples, no action expert."""
    config.model.update({"dino": "", "dit": "", "bridge": ConfigDict()})
    config.data.schedule.robot_samples = 0
    for group in ("dino", "bridge", "dit"):
        del config.optim.groups[group]
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Any config at the size of a laptop: the same stages on a tiny model and small images."""
    config.model.update({"vlm": "tiny", "dino": "tiny", "dit": "tiny"})
    config.runtime.update({"compute": "float32", "remat": "none", "vocab_tile": 512})
    config.data.image.update({"size": (112, 112), "max_pixels": 12_544})
    config.data.update({"tokenizer": "", "threads": 2})
    config.data.schedule.update({"tokens": 640, "robot_samples": 24, "grounding_samples": 8})
    config.optim.update({"warmup": 100, "b2": 0.99})
    for name, group in config.optim.groups.items():
        group.update({"lr": 3e-4 if name == "vlm" else 1e-3, "min_ratio": 0.05})
    return config
