"""A plan's memory against the device at hand: python tests/gpu_memory_check.py

By hand, since CPUs do not say what they hold.  Stage 2 on one device, with the paper's parts and
real widths of Qwen2.5-VL 3B but fewer decoder blocks; one update is run, and the device's peak is
compared with the compiler's (what `plan` prints of a compiled step) and with the table from shapes.
Exits with 1 if the compiler's is more than 10 % off.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import stage2_action
from st4vla_jax.chips import GIB
from st4vla_jax.plan_setup import Plan, make_plan
from st4vla_jax.plan_table import memory_table
from st4vla_jax.train_config import TrainConfig
from st4vla_jax.train_setup import step_config
from st4vla_jax.train_start import trace_step
from st4vla_jax.train_step import make_train_step

CASES = (
    (4, "full", 64),
    (4, "dots", 32),
    (8, "full", 64),
    (12, "full", 32),
)  # blocks, remat, samples
TOLERANCE, LIMIT_S = 0.1, 600


def make_case(blocks: int, remat: str, samples: int) -> Plan:
    tree = stage2_action.get_config()
    tree.runtime.remat = remat
    tree.data.schedule.update({"robot_samples": samples, "grounding_samples": samples // 4})
    config = TrainConfig.from_dict(tree)
    model = config.model
    text = dataclasses.replace(model.text, num_hidden_layers=blocks)
    bridge = dataclasses.replace(model.bridge, start_layer=blocks, end_layer=blocks + 1)
    model = dataclasses.replace(model, text=text, bridge=bridge).check()
    return make_plan(dataclasses.replace(config, model=model), jax.devices()[:1])


def compare(blocks: int, remat: str, samples: int) -> float:
    """Prints a line; returns the compiler's figure over the device's."""
    plan = make_case(blocks, remat, samples)
    device = jax.devices()[0]
    names = [entry.name for entry in plan.config.data.sets]
    step = make_train_step(plan.model, plan.optimizer, step_config(plan.config, names))
    with jax.set_mesh(plan.mesh):
        compiled = trace_step(step, plan.state, plan.batch).lower().compile()
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), plan.state)
        batch = jax.device_put(plan.planned.batch, jax.tree.map(lambda x: x.sharding, plan.batch))
        jax.block_until_ready(compiled(state, batch))
    predicted = compiled.memory_analysis().peak_memory_in_bytes
    measured = device.memory_stats()["peak_bytes_in_use"]
    table = memory_table(plan).total
    text = f"{blocks} blocks, remat {remat}, {samples} + {samples // 4} samples: "
    text += f"measured {measured / GIB:.2f} GiB, compiler {predicted / GIB:.2f} "
    text += f"({predicted / measured:.3f}), table {table / GIB:.2f} ({table / measured:.3f})"
    print(device.device_kind, text, flush=True)
    return predicted / measured


def main(argv: list[str]) -> int:
    if argv:
        return int(abs(compare(*CASES[int(argv[0])]) - 1) > TOLERANCE)
    # A device's peak is of the whole process: one for each case.
    commands = [[sys.executable, __file__, str(i)] for i in range(len(CASES))]
    return max(subprocess.run(command, timeout=LIMIT_S).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
