"""One action chunk, or one answer, from a checkpoint.

python -m st4vla_jax.predict action --checkpoint DIR --image A.png [--image B.png]
    --instruction TEXT [--embodiment KEY] [--noise N.npy] --out OUT.json
python -m st4vla_jax.predict chat --checkpoint DIR --image A.png --prompt TEXT [--draw OUT.png]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from st4vla_jax.data.image import decode_image
from st4vla_jax.data.sheet import COLOURS, draw_region
from st4vla_jax.data.source import Region
from st4vla_jax.policy.policy import ChatResult, Policy
from st4vla_jax.resume import find_checkpoint


def action(args: argparse.Namespace) -> None:
    """Samples one chunk and writes it as JSON."""
    check_writable(args.out)
    images = [decode_image(path) for path in args.image]
    noise = None if args.noise is None else read_noise(args.noise)
    checkpoint = find_checkpoint(args.checkpoint)
    policy = Policy.load(checkpoint)
    result = policy.act(
        images,
        args.instruction,
        embodiment=args.embodiment,
        state=args.state,
        noise=noise,
        seed=args.seed,
        cfg_scale=args.cfg_scale,
        ddim_steps=args.ddim_steps,
    )
    spec = policy.meta.action
    write_json(
        args.out,
        {
            "normalized_actions": result.normalized_actions.tolist(),
            "actions": result.actions.tolist(),
            "names": spec.names,
            "units": spec.units,
            "control_hz": spec.control_hz,
            "embodiment": result.embodiment,
            "normalization": result.mode,
            "instruction": args.instruction,
            "prompt_template": policy.meta.prompt.template,
            "images": [str(path) for path in args.image],
            "cfg_scale": args.cfg_scale,
            "ddim_steps": args.ddim_steps,
            "checkpoint": str(checkpoint),
            "timings_s": result.timings,
        },
    )
    chunk = "x".join(map(str, result.actions.shape[1:]))
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in result.timings.items())
    print(f"{args.out}: {chunk} actions for {result.embodiment} ({seconds})")


def chat(args: argparse.Namespace) -> None:
    """Prints an answer and what was found in it; draws it if asked to."""
    if args.draw:
        check_writable(args.draw)
    images = [decode_image(path) for path in args.image]
    policy = Policy.load(find_checkpoint(args.checkpoint))
    result = policy.chat(
        images,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(result.text)
    for box in result.answer.boxes:
        print(f"box {box.x1:g} {box.y1:g} {box.x2:g} {box.y2:g} {box.label}".rstrip())
    for point in result.answer.points:
        print(f"point {point.x:g} {point.y:g} {point.label}".rstrip())
    if result.answer.reason:
        print(f"no box or point: {result.answer.reason}", file=sys.stderr)
    if args.draw:
        draw(images[0], result).save(args.draw)
        print(f"drawn on {args.image[0]}: {args.draw}", file=sys.stderr)


def draw(image: np.ndarray, result: ChatResult) -> Image.Image:
    """The answer's boxes and points on the first image, in its original pixels."""
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    answer, scale = result.answer, np.array(result.scales[0])
    regions = [
        Region("box", np.array([[b.x1, b.y1], [b.x2, b.y2]]) * scale, label=b.label)
        for b in answer.boxes
    ] + [Region("point", np.array([[p.x, p.y]]) * scale, label=p.label) for p in answer.points]
    for i, region in enumerate(regions):
        draw_region(pen, region, 1.0, COLOURS[i % len(COLOURS)])
    return picture


def read_noise(path: Path) -> np.ndarray:
    """A .npy file's array; raises ValueError, naming the file, for anything else."""
    try:
        noise = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
    if not isinstance(noise, np.ndarray):
        raise ValueError(f"{path}: several arrays (.npz); give one .npy")
    return noise


def check_writable(path: Path) -> None:
    """Fails now rather than after the model has run."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise OSError(f"{path}: cannot be written (no such folder, not writable, or a folder)")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside ``path`` and renames it: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a checkpoint, or a workdir (its latest step)",
    )
    common.add_argument(
        "--image", type=Path, action="append", default=[], help="repeat for more views, in order"
    )
    common.add_argument("--seed", type=int, default=0)

    act = commands.add_parser("action", parents=[common], help="sample one action chunk")
    act.add_argument("--instruction", required=True)
    act.add_argument("--embodiment", help="key of the statistics (default: the only one)")
    act.add_argument("--state", type=_floats, help="raw proprioception, comma-separated")
    act.add_argument("--noise", type=Path, help=".npy of f32[1,C,A], start of the sampler")
    act.add_argument("--cfg-scale", type=float, default=1.5)
    act.add_argument("--ddim-steps", type=int, default=10)
    act.add_argument("--out", type=Path, required=True)
    act.set_defaults(run=action)

    talk = commands.add_parser("chat", parents=[common], help="answer a prompt about images")
    talk.add_argument("--prompt", required=True)
    talk.add_argument("--max-new-tokens", type=int, default=128)
    talk.add_argument("--temperature", type=float, default=0.0)
    talk.add_argument("--top-p", type=float, default=1.0)
    talk.add_argument("--draw", type=Path, help="picture of the first image with boxes and points")
    talk.set_defaults(run=chat)
    args = parser.parse_args(argv)
    if args.command == "chat" and args.draw and not args.image:
        parser.error("--draw needs an --image")
    return args


def _floats(text: str) -> np.ndarray:
    return np.array([float(part) for part in text.split(",")], np.float32)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; bad input gives one line on stderr and exit code 1."""
    args = parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:  # every error class of this package is a ValueError
        print(f"predict: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
