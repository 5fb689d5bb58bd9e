"""A kinematic tabletop in NumPy and PIL: environment, demonstrator and data set."""

from pathlib import Path

# A small trained policy, a checkpoint: what Qwen2.5-VL and DINOv2 are to a real run.
WEIGHTS = Path(__file__).parent / "weights"
