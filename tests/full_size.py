"""Round trip of a full-size random model, by hand (about 35 GB of disk, 10 minutes on 2 cores).

    python tests/full_size.py --work DIR --tokenizer DIR

Writes Qwen2.5-VL-3B in bf16 (sharded safetensors) and a torch.hub DINOv2-S with random weights,
runs to_jax and to_torch in processes of their own, samples their anonymous memory, and compares
every tensor byte for byte with what was written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from convert_weights.qwen2_5_vl import canonical_key
from convert_weights.rules import Rule, dino_rules, text_rules, vision_rules
from convert_weights.safetensors_io import open_weights, write_sharded
from convert_weights.st4vla import DINO, VLM
from st4vla_jax.config import model_config

CFG = model_config("3b", "s", "b")
HF_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "in_chans": 3,
    },
}


def disk_rules() -> list[Rule]:
    """The VLM's rules under the names of Hugging Face's files."""
    text = [r for r in text_rules(CFG.text) if r.torch != "lm_head.weight"]
    text = [
        Rule(r.torch.replace("language_model.", "model.", 1), r.jax, r.layout, r.sizes, r.layers)
        for r in text
    ]
    return vision_rules(CFG.vision) + text


def random_tensors(rules: list[Rule], dtype, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for rule in rules:
        for key in rule.torch_keys:
            x = rng.standard_normal(rule.torch_shape, dtype=np.float32) * np.float32(0.02)
            yield key, x.astype(dtype)


def run(name: str, *args: str) -> None:
    """Runs a converter; prints its seconds and the peak of its anonymous memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", *args])
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        peak = max([peak] + [int(line.split()[1]) for line in lines if line.startswith("RssAnon")])
        time.sleep(0.1)
    if process.wait():
        sys.exit(f"{name} failed")
    seconds = time.perf_counter() - start
    print(
        f"{name}: {seconds:.0f} s, {peak / 2**20:.2f} GiB of anonymous memory at most", flush=True
    )


def compare(name: str, original: Path, converted: Path, rename: Callable[[str], str]) -> None:
    """Byte equality of every tensor of ``original`` with the one of its new name."""
    a, b = open_weights(original), open_weights(converted)
    for key, tensor in a.items():
        x, y = tensor.read(), b[rename(key)].read()
        if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
            sys.exit(f"{name}: {key} differs")
    print(f"{name}: {len(a)} tensors bit-identical", flush=True)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Qwen's tokenizer folder")
    args = parser.parse_args()
    work = args.work
    vlm, dino, jax_dir, torch_dir = (work / n for n in ("vlm", "dino.pth", "jax", "torch"))
    vlm.mkdir(parents=True)
    rules = disk_rules()
    shapes = {k: (r.torch_shape, ml_dtypes.bfloat16) for r in rules for k in r.torch_keys}
    write_sharded(vlm, shapes, random_tensors(rules, ml_dtypes.bfloat16, 0))
    (vlm / "config.json").write_text(json.dumps(HF_CONFIG))
    for file in args.tokenizer.iterdir():
        (vlm / file.name).write_bytes(file.read_bytes())
    hub = dict(random_tensors(dino_rules(CFG.dino), np.float32, 1))
    hub["mask_token"] = np.zeros((1, CFG.dino.hidden_size), np.float32)
    torch.save({k: torch.from_numpy(v) for k, v in hub.items()}, dino)
    to_jax = ("convert_weights.to_jax", "--vlm", vlm, "--dino", dino, "--dit", "b")
    run("to_jax", *map(str, to_jax), "--out", str(jax_dir))
    to_torch = ("convert_weights.to_torch", "--checkpoint", jax_dir, "--format", "both")
    run("to_torch", *map(str, to_torch), "--out", str(torch_dir))
    (run_file,) = torch_dir.glob("upstream/checkpoints/*.pt")
    compare("Hugging Face folder", vlm, torch_dir / "hf", lambda key: key)
    compare("VLM in the run folder", vlm, run_file, lambda key: VLM + canonical_key(key))
    compare("DINOv2 in the run folder", dino, run_file, lambda key: DINO + key)


if __name__ == "__main__":
    main()
