"""Stage 2 on TPU slices, as README's table has them: --config=configs/tpu.py:NAME

python -m st4vla_jax.plan_presets --out=presets.json [NAME ...]    compiles them, prints the table
python -m st4vla_jax.train --config=configs/tpu.py:3b-v5e-64 --workdir=runs/stage2 ...

A name says model, chip and number of chips; "wide" takes more samples an update than the paper.
"""

from ml_collections import ConfigDict

from configs import stage2_action

PAPER, WIDE = (256, 64), (1024, 256)  # robot and grounding samples of an update
KEEP = "full_keep_weights"

# Name -> slice, number of slices, mesh (data, fsdp, tensor), samples, T at most, remat.
PRESETS = {
    "3b-v5e-64": ("v5e:8x8", 1, (4, 16, 1), PAPER, 704, KEEP),
    "3b-v5p-64": ("v5p:4x4x4", 1, (4, 16, 1), PAPER, 704, "full"),
    "3b-v6e-64": ("v6e:8x8", 1, (4, 16, 1), PAPER, 704, KEEP),
    # 10 samples fill a sequence; with one more in any, all have a tenth more vision slots.
    "3b-v5e-16": ("v5e:4x4", 1, (1, 16, 1), (252, 63), 1216, "dots_decoder_mlp"),
    "3b-v5e-64-wide": ("v5e:8x8", 1, (4, 16, 1), WIDE, 1280, "full"),
    "3b-v5p-64-wide": ("v5p:4x4x4", 1, (4, 16, 1), (2048, 512), 1280, "dots"),
    "7b-v5e-256": ("v5e:16x16", 1, (8, 16, 2), WIDE, 1280, "full"),
    "7b-v5p-64": ("v5p:4x4x4", 1, (4, 16, 1), WIDE, 1280, "full"),
    "32b-v5p-8": ("v5p:2x2x2", 1, (1, 8, 1), PAPER, 1280, "full"),
    "32b-v5p-16": ("v5p:2x2x4", 1, (1, 16, 1), PAPER, 1280, "full"),
    "72b-v5p-16": ("v5p:2x2x4", 1, (1, 16, 1), PAPER, 1280, "full"),
    "72b-v5p-32": ("v5p:2x4x4", 1, (1, 16, 2), PAPER, 1280, "full"),
    "3b-v5e-2x64": ("v5e:8x8", 2, (8, 16, 1), (512, 128), 704, "full"),
    "3b-v5p-1024": ("v5p:8x8x16", 1, (64, 16, 1), (4096, 1024), 704, "full"),
}


def get_config(name: str = "3b-v5e-64") -> ConfigDict:
    if name not in PRESETS:
        raise ValueError(f"configs/tpu.py:{name}: there are {', '.join(PRESETS)}")
    _, _, (data, fsdp, tensor), (robot, grounding), tokens, remat = PRESETS[name]
    config = stage2_action.get_config()
    config.model.vlm = name.split("-")[0]
    config.runtime.remat = remat
    config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
    config.data.schedule.update(
        {"robot_samples": robot, "grounding_samples": grounding, "tokens": tokens}
    )
    return config
