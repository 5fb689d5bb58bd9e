"""predict on a tiny checkpoint: what it writes, and how it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from st4vla_jax import predict
from st4vla_jax.checkpoint import Meta, write_checkpoint
from st4vla_jax.config import model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.eval.parse import parse_answer
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.policy.policy import ChatResult, Policy, PolicyError
from st4vla_jax.train_checkpoints import RUN
from tests.reference.policy import PROMPT, TOKENIZER, random_params

LIMITS = {"mean": 0.0, "std": 1.0, "max": 2.0, "min": -2.0, "q01": -0.5, "q99": 1.5}
ENTRY = {
    "action": {k: [v] * 7 for k, v in LIMITS.items()} | {"mask": [True] * 6 + [False]},
    "num_transitions": 3,
    "num_trajectories": 1,
}


def make_checkpoint(folder, cfg, statistics):
    params = random_params(ST4VLA(cfg))
    leaves = [
        ("/".join(k.key for k in path), np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    ]
    TOKENIZER.save(folder / "tokenizer")
    files = {f"tokenizer/{p.name}": p for p in (folder / "tokenizer").iterdir()}
    if statistics:
        files["dataset_statistics.json"] = json.dumps(statistics).encode()
    action = ActionSpec() if cfg.has_action else None
    meta = Meta(cfg, PROMPT, ImageConfig(size=(56, 84)), action)
    write_checkpoint(folder / "ckpt", leaves, meta, files)
    return folder / "ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = model_config("tiny", "tiny", "tiny")
    folder = tmp_path_factory.mktemp("policy")
    return make_checkpoint(folder, cfg, {"oxe_bridge": ENTRY, "franka": ENTRY})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in (("a", (60, 90)), ("b", (56, 84))):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return [str(folder / f"{name}.png") for name in "ab"]


def run_action(checkpoint, images, out, *extra):
    shown = [part for image in images for part in ("--image", image)]
    argv = ["action", "--checkpoint", str(checkpoint), *shown, "--out", str(out), *extra]
    if "--instruction" not in extra:
        argv += ["--instruction", "take the cube"]
    return predict.main(argv)


def test_action_writes_a_chunk(checkpoint, images, tmp_path, capsys):
    noise = np.random.default_rng(1).standard_normal((1, 8, 7), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    out = tmp_path / "out.json"
    extra = ("--embodiment", "franka", "--noise", str(tmp_path / "noise.npy"))
    assert run_action(checkpoint, images, out, *extra) == 0
    assert "8x7 actions for franka" in capsys.readouterr().out
    result = json.loads(out.read_text())
    normalized, actions = (np.array(result[k]) for k in ("normalized_actions", "actions"))
    assert normalized.shape == actions.shape == (1, 8, 7)
    # q99 with limits -0.5 and 1.5: x -> clip(x) + 0.5; the gripper becomes 0 or 1.
    np.testing.assert_allclose(
        actions[..., :6], np.clip(normalized[..., :6], -1, 1) + 0.5, atol=1e-6
    )
    np.testing.assert_array_equal(actions[..., 6], normalized[..., 6] >= 0.5)
    assert result["names"][6] == "gripper" and len(result["units"]) == 7
    assert {"preprocess", "compile", "policy"} == set(result["timings_s"])

    # The start of the sampler decides, and so does what is seen.
    policy = Policy.load(checkpoint)
    views = [np.asarray(Image.open(p)) for p in images]
    again = policy.act(views, "take the cube", embodiment="franka", noise=noise)
    np.testing.assert_allclose(again.normalized_actions, normalized, atol=1e-5)
    assert again.timings["compile"] > 0
    other = policy.act(views[::-1], "take the cube", embodiment="franka", noise=noise)
    assert other.timings["compile"] == 0
    assert np.abs(other.normalized_actions - normalized).max() > 1e-4


@pytest.mark.parametrize(
    "extra,message",
    [
        ((), "--embodiment is needed, one of franka, oxe_bridge"),
        (("--embodiment", "aloha"), "'aloha'; there are franka, oxe_bridge"),
        (("--embodiment", "franka", "--ddim-steps", "16"), "DDIM cannot take 16"),
        (("--embodiment", "franka", "--cfg-scale", "0.5"), "guidance scale 0.5"),
        (("--embodiment", "franka", "--cfg-scale", "nan"), "guidance scale nan"),
        (("--embodiment", "franka", "--instruction", "a <image>"), "contains <image>"),
        (("--embodiment", "franka", "--state", "1,2"), "has no state encoder"),
        (("--embodiment", "franka", "--instruction", "a<|im_end|>"), "<|im_end|>"),
    ],
)
def test_action_refuses(checkpoint, images, tmp_path, capsys, extra, message):
    out = tmp_path / "out.json"
    assert run_action(checkpoint, images, out, *extra) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "noise,message",
    [
        (np.zeros((1, 16, 7)), "(1, 16, 7) and dtype float64"),
        (np.full((1, 8, 7), np.nan), "values beyond 100"),
        (np.full((1, 8, 7), 1e39), "values beyond 100"),
        (np.zeros((1, 8, 7), complex), "dtype complex128"),
        (b"", "n.npy: not a .npy file"),
    ],
)
def test_noise_that_is_none(checkpoint, images, tmp_path, capsys, noise, message):
    path, out = tmp_path / "n.npy", tmp_path / "o.json"
    if isinstance(noise, bytes):
        path.write_bytes(noise)
    else:
        np.save(path, noise)
    extra = ("--embodiment", "franka", "--noise", str(path))
    assert run_action(checkpoint, images, out, *extra) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_workdir_stands_for_its_latest_step(checkpoint, images, tmp_path, capsys):
    step = tmp_path / "run" / "checkpoints" / "00000007"
    shutil.copytree(checkpoint, step)
    (step / RUN).write_text("{}")  # its commit marker
    out = tmp_path / "o.json"
    assert run_action(tmp_path / "run", images, out, "--embodiment", "franka") == 0
    assert json.loads(out.read_text())["checkpoint"] == str(step)
    (step / RUN).unlink()
    assert run_action(tmp_path / "run", images, out, "--embodiment", "franka") == 1
    assert "no step in its checkpoints is complete" in capsys.readouterr().err


def test_damaged_parameters_never_reach_a_robot(checkpoint, images):
    policy = Policy.load(checkpoint)
    policy.params["dit"]["final_layer"]["linear"]["bias"] *= np.nan
    views = [np.asarray(Image.open(p)) for p in images]
    with pytest.raises(PolicyError, match="not finite"):
        policy.act(views, "take", embodiment="franka")


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, images, capsys):
    assert run_action(tmp_path / "absent", images, tmp_path / "no" / "o.json") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_an_image_that_is_none(checkpoint, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"hello")
    assert run_action(checkpoint, [str(bad)], tmp_path / "o.json") == 1
    assert "bad.png" in capsys.readouterr().err
    assert run_action(checkpoint, [str(tmp_path / "absent.png")], tmp_path / "o.json") == 1
    assert "absent.png" in capsys.readouterr().err


def test_not_a_checkpoint(images, tmp_path, capsys):
    assert run_action(tmp_path, images, tmp_path / "o.json") == 1
    assert "no complete checkpoint" in capsys.readouterr().err


def test_chat_prints_and_draws(checkpoint, images, tmp_path, capsys):
    drawn = tmp_path / "drawn.png"
    argv = ["chat", "--checkpoint", str(checkpoint), "--image", images[0], "--prompt", "where?"]
    assert predict.main([*argv, "--max-new-tokens", "4", "--draw", str(drawn)]) == 0
    first = capsys.readouterr().out
    assert Image.open(drawn).size == (90, 60)
    assert predict.main([*argv, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == first
    assert predict.main([*argv[:-1], "<image><image>?", "--max-new-tokens", "4"]) == 1
    assert "2 <image> placeholders for 1 images" in capsys.readouterr().err


def test_boxes_are_drawn_in_original_pixels():
    text = '[{"bbox_2d": [10, 20, 30, 40], "label": ""}]'
    result = ChatResult(text, parse_answer(text), ((2.0, 0.5),), {})
    picture = np.asarray(predict.draw(np.zeros((60, 90, 3), np.uint8), result)).any(-1)
    ys, xs = np.nonzero(picture)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (20, 60, 10, 20)


def test_a_vlm_alone_has_no_actions(images, tmp_path, capsys):
    cfg = model_config("tiny", None, None)
    folder = make_checkpoint(tmp_path, cfg, None)
    assert run_action(folder, images, tmp_path / "o.json") == 1
    assert "vision-language model alone" in capsys.readouterr().err
