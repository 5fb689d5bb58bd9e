"""A run's averaged weights (optim.ema) as a checkpoint of its own.

    python -m convert_weights.averaged --checkpoint runs/stage2 --out policy

``predict``, ``evaluate`` and ``to_torch`` read the weights that training goes on with; of this
checkpoint they read the moving average, with the frozen parameters as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert_weights.cli import command
from st4vla_jax.checkpoint import (
    EMA,
    META,
    PARAMS,
    TREE,
    CheckpointError,
    check_target,
    param_shapes,
    read_leaf,
    read_meta,
    write_checkpoint,
)
from st4vla_jax.resume import find_checkpoint


def averaged(source: Path | str, out: Path | str, overwrite: bool = False) -> int:
    """Writes the checkpoint of averaged weights; returns how many parameters are averages.

    Args:
      source: workdir (its latest step) or one checkpoint of a run with ``optim.ema``.
      out: folder to make.
      overwrite: replace a checkpoint that is there.

    Raises:
      CheckpointError: the run keeps no average, or ``out`` is taken.
    """
    folder = find_checkpoint(source)
    if not (folder / EMA / TREE).is_file():
        raise CheckpointError(f"{folder}: keeps no moving average; train with optim.ema")
    check_target(out, META, overwrite)
    averages = param_shapes(folder, EMA)

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for path, shape in param_shapes(folder).items():
            item = EMA if path in averages else PARAMS
            yield path, read_leaf(folder, path, item).astype(shape.dtype)

    meta = folder / "meta"
    files = {
        path.relative_to(meta).as_posix(): path
        for path in meta.rglob("*")
        if path.is_file() and path != folder / META
    }
    write_checkpoint(out, leaves(), read_meta(folder), files, overwrite)
    return len(averages)


@command
def main(argv: list[str] | None = None) -> int:
    """Writes the checkpoint and reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convert_weights.averaged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's workdir or step")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
    args = parser.parse_args(argv)
    count = averaged(args.checkpoint, args.out, args.overwrite)
    print(f"{args.out}: {count} averaged parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
