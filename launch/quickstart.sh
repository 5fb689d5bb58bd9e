#!/usr/bin/env bash
# From nothing to a trained, evaluated and exported policy on a laptop: bash launch/quickstart.sh
#   --smoke    a few updates a stage only, as CI runs it
#   OUT=DIR    folder of everything that it makes (default runs/quickstart, runs/quickstart_smoke)
#   VENV=DIR   virtual environment to make or reuse (default .venv)
#   PYTHON=EXE interpreter to make it with (default python3; 3.11 or newer)
# Run again, it goes on where it stopped.  Training goes on from the tiny weights in
# st4vla_jax/tabletop/weights, as real training starts from Qwen2.5-VL and DINOv2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-runs/quickstart${1:+_smoke}}
episodes=400 grounding=4000 stage1=60 stage2=80 test_records=128 test_episodes=25
batches=4 samples=32
if [[ ${1:-} == --smoke ]]; then
    episodes=24 grounding=96 stage1=4 stage2=4 test_records=8 test_episodes=2
    batches=1 samples=2
elif [[ $# -gt 0 ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi

weights=st4vla_jax/tabletop/weights
venv=${VENV:-.venv}
if [[ ! -x $venv/bin/python ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
fi
python=$venv/bin/python
"$python" -m pip install --quiet --editable .
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

say() { printf '\n== %s\n' "$*"; }
run() {
    printf '$ %s\n' "${*/#"$python"/python}"
    "$@"
}
train() { # STAGE UPDATES [more settings]
    local stage=$1 updates=$2
    shift 2
    run "$python" -m st4vla_jax.train --config="configs/tabletop.py:stage$stage" \
        --workdir="$out/stage$stage" --config.steps="$updates" \
        --config.save_every="$((updates / 2))" --config.evaluation.every="$updates" \
        --config.optim.warmup=10 \
        --config.data.tokenizer="$out/data/tokenizer" \
        --config.data.sets.grounding.path="$out/data/grounding/records.jsonl" \
        --config.data.sets.grounding.images="$out/data/grounding" "$@"
}

say "1 of 6: a data set of robot episodes and grounding records, made here"
run "$python" -m st4vla_jax.tabletop.dataset --episodes "$episodes" --grounding "$grounding" \
    --tasks reach pick --out "$out/data"

say "2 of 6: stage 1, the VLM learns to answer with boxes, points and trajectories"
train 1 "$stage1" --config.init.checkpoint="$weights" \
    --config.optim.groups.vlm.lr=1e-3 --config.optim.groups.words.lr=5e-4

say "3 of 6: stage 2, actions and grounding together"
train 2 "$stage2" --config.init.checkpoint="$weights" --config.init.vlm="$out/stage1" \
    --config.data.sets.tabletop.path="$out/data/tabletop/1.0.0"
checkpoint=$(find "$out/stage2/checkpoints" -maxdepth 1 -name '[0-9]*' | sort | tail -n 1)

say "4 of 6: scores on scenes that were not trained on"
run "$python" -m st4vla_jax.tabletop.dataset --grounding "$test_records" --seed 1 --split val \
    --tasks reach pick --out "$out/test"
run "$python" -m st4vla_jax.evaluate --checkpoint "$checkpoint" --out "$out/evaluation" \
    --suite actions grounding tabletop --batches "$batches" --samples "$samples" \
    --data "$out/test/grounding/records.jsonl" --prior "$out/data/grounding/records.jsonl" \
    --tasks reach pick --splits val --episodes "$test_episodes" --execute 1

say "5 of 6: export to PyTorch"
run "$python" -m convert_weights.to_torch --checkpoint "$checkpoint" --out "$out/exported" \
    --format both --safetensors --allow-custom-sizes --overwrite

say "6 of 6: one action chunk"
"$python" - "$out/snapshot" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

from st4vla_jax.tabletop.environment import Tabletop

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
observation = Tabletop(112, ("primary",)).reset(seed=7, task="reach", split="val")
Image.fromarray(observation.images["primary"]).save(folder / "primary.png")
(folder / "instruction.txt").write_text(observation.instruction)
(folder / "state.txt").write_text(",".join(map(str, observation.state.tolist())))
PYTHON
run "$python" -m st4vla_jax.predict action --checkpoint "$checkpoint" \
    --image "$out/snapshot/primary.png" \
    --instruction "$(cat "$out/snapshot/instruction.txt")" \
    --state="$(cat "$out/snapshot/state.txt")" --out "$out/action.json"

say "everything is in $out"
cat <<TEXT
  data/                    episodes (RLDS) and grounding records
  stage1/, stage2/         metrics.jsonl, tensorboard/, images/first_batch_0.png, checkpoints/
  evaluation/report.html   scores with pictures; summary.json has the numbers
  exported/                PyTorch checkpoint of upstream's layout, and a Hugging Face folder
  action.json              an action chunk
TEXT
