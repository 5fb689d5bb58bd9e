"""torch -> jax -> torch is the identity on bytes, for every kind of source."""

import json

import numpy as np
import pytest
import torch
import yaml
from transformers import Qwen2_5_VLForConditionalGeneration

from convert_weights import to_jax, to_torch, verify
from convert_weights.st4vla import policy_rules
from st4vla_jax.checkpoint import (
    STATISTICS,
    ActionSpec,
    Meta,
    nested,
    param_shapes,
    read_leaf,
    read_meta,
    read_params,
    write_checkpoint,
)
from st4vla_jax.config import model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.prompts import TEMPLATES, PromptConfig
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from tests.reference import checkpoints as tiny

BF16, F32 = torch.bfloat16, torch.float32


def run(main, *args):
    assert main([str(a) for a in args]) == 0


def exported(tmp_path, *source, fmt="upstream", flags=()):
    run(to_jax.main, "--out", tmp_path / "jax", *source)
    if fmt != "hf":
        flags = ("--allow-custom-sizes", *flags)
    run(to_torch.main, "--checkpoint", tmp_path / "jax", "--out", tmp_path / "torch",
        "--format", fmt, *flags)  # fmt: skip
    return tmp_path / "torch"


@pytest.mark.parametrize(
    "kind",
    [
        {"tie": True, "dtype": BF16, "max_shard": "60KB"},
        {"tie": False, "dtype": F32, "max_shard": "200KB"},
        {"tie": False, "dtype": BF16, "memory_keys": True},
        {"tie": True, "dtype": F32, "flat": True},
        {"tie": True, "dtype": BF16, "stored_head": True},
    ],
    ids=["tied-shards", "untied-shards", "memory-keys", "flat-config", "stored-head"],
)
def test_hugging_face_folder(tmp_path, kind):
    tiny.hf_folder(tmp_path / "hf", **kind)
    out = exported(tmp_path, "--vlm", tmp_path / "hf", fmt="hf")
    before, after = tiny.disk_state(tmp_path / "hf"), tiny.disk_state(out)
    tiny.same_tensors(tiny.memory_keys(before), tiny.memory_keys(after))
    assert not any(k.startswith(("model.visual", "model.language_model")) for k in after)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    old, new = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "hf", out))
    assert {k: v for k, v in old.items() if "dtype" not in k} == {
        k: v for k, v in new.items() if "dtype" not in k
    }
    dtypes = {str(s.dtype) for s in param_shapes(tmp_path / "jax").values()}
    assert dtypes == {str(kind["dtype"]).removeprefix("torch.")}


@pytest.mark.parity
@pytest.mark.parametrize("tie", [True, False])
def test_exported_folder_gives_equal_logits_in_transformers(tmp_path, tie):
    tiny.hf_folder(tmp_path / "hf", tie=tie, max_shard="100KB")
    out = exported(tmp_path, "--vlm", tmp_path / "hf", fmt="hf")
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (tmp_path / "hf", out):
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(model.eval()(input_ids=tokens).logits)
    assert logits[0].std() > 0.1
    assert torch.equal(*logits)


class Tree(torch.nn.Module):
    """Modules nested so that their state dict has exactly the given keys."""

    def __init__(self, shapes):
        super().__init__()
        for key, shape in shapes.items():
            *parents, leaf = key.split(".")
            node = self
            for name in parents:
                if not hasattr(node, name):
                    node.add_module(name, torch.nn.Module())
                node = getattr(node, name)
            node.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ({"dtype": F32}, ()),
        ({"dtype": BF16, "old_keys": True}, ()),
        ({"dtype": F32, "name": "checkpoints/steps_70_model.safetensors"}, ("--safetensors",)),
        ({"dtype": BF16, "name": "final_model/pytorch_model.pt"}, ()),
    ],
    ids=["pt", "old-keys", "safetensors", "final-model"],
)
def test_upstream_run_folder(tmp_path, kind, flags, capsys):
    weights, state = tiny.run_folder(tmp_path, **kind)
    out = exported(tmp_path, "--st4vla", weights, flags=flags)
    step = 0 if "final" in str(weights) else 70
    assert ("the files claim step 0" in capsys.readouterr().out) == (step == 0)
    if flags:
        back = tiny.disk_state(out / "checkpoints")
        assert (out / "checkpoints" / f"steps_{step}_model.safetensors").exists()
    else:
        file = out / "checkpoints" / f"steps_{step}_pytorch_model.pt"
        back = torch.load(file, weights_only=True)
        assert [p.name for p in file.parent.iterdir()] == [file.name]
    tiny.same_tensors(state, back)
    Tree({k: v.shape for k, v in state.items()}).load_state_dict(back, strict=True)
    assert (out / "summary.jsonl").read_text() == f'{{"steps": {step}}}\n'
    assert json.loads((out / "dataset_statistics.json").read_text()) == tiny.STATISTICS
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config == json.loads((out / "config.json").read_text())
    source = tiny.run_config(str(tmp_path / "base"))
    assert config["framework"]["name"] == "DinoQFormerACT"
    assert config["framework"]["qwenvl"] == source["framework"]["qwenvl"]
    assert config["framework"]["layer_qformer"] == source["framework"]["layer_qformer"]
    assert config["datasets"] == source["datasets"]
    assert config["framework"]["dino"]["dino_backbone"] == "custom", "width 24 is no hub model"
    assert config["st4vla_jax"] == {"notes": []}
    # What was exported is a source again.
    again = next((out / "checkpoints").iterdir())
    run(to_jax.main, "--out", tmp_path / "again", "--st4vla", again)
    one, two = (read_meta(tmp_path / n) for n in ("jax", "again"))
    assert one.model == two.model and one.prompt == two.prompt
    run(verify.main, tmp_path / "jax", tmp_path / "again")


def test_meta_of_a_run(tmp_path):
    weights, _ = tiny.run_folder(tmp_path)
    run(to_jax.main, "--out", tmp_path / "jax", "--st4vla", weights,
        "--base-vlm", tiny.strip_weights(tmp_path / "base"))  # fmt: skip
    meta = read_meta(tmp_path / "jax")
    cfg = meta.model
    assert (cfg.dit.depth, cfg.dit.chunk, cfg.dit.action_dim) == (3, tiny.CHUNK, tiny.ACTION_DIM)
    assert (cfg.bridge.start_layer, cfg.bridge.end_layer, cfg.bridge.num_heads) == (3, 5, 4)
    assert (cfg.dino.depth, cfg.dino.num_heads, cfg.dino.pretrain_size) == (2, 3, 56)
    assert cfg.text.rms_norm_eps == pytest.approx(1e-6)
    assert meta.prompt.template == "Your task is {instruction}." and meta.prompt.lower_case
    assert meta.image.size == (196, 224) and meta.step == 70 and meta.action is not None
    assert meta.action.gripper == (6,)
    assert list(meta.source) == [str(weights)] and len(meta.source[str(weights)]) == 64


def test_prompt_of_ones_own_keeps_the_runs_lower_case(tmp_path):
    weights, _ = tiny.run_folder(tmp_path)
    run(to_jax.main, "--out", tmp_path / "jax", "--st4vla", weights, "--prompt", "paper")
    assert read_meta(tmp_path / "jax").prompt == PromptConfig(TEMPLATES["paper"], lower_case=True)


@pytest.mark.parity
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("kind", ["hub-pth", "hf"])
def test_dinov2_sources(tmp_path, kind, swiglu, monkeypatch):
    """Hub .pth and Hugging Face safetensors; what comes back has hub's keys."""
    monkeypatch.setattr(to_jax, "fresh_parts", zero_parts)
    tiny.hf_folder(tmp_path / "hf")
    dtype = BF16 if swiglu else F32
    if kind == "hf":
        hub = tiny.hf_dino(tmp_path / "dino", dtype, swiglu)
        source = (tmp_path / "dino" / "model.safetensors",)
    else:
        hub = tiny.hub_dino(dtype, swiglu)
        torch.save(hub, tmp_path / "dino.pth")
        source = (tmp_path / "dino.pth", "--dino-heads", 3)
    out = exported(tmp_path, "--vlm", tmp_path / "hf", "--dino", *source, "--dit", "tiny",
                   flags=("--safetensors",))  # fmt: skip
    back = tiny.disk_state(out / "checkpoints")
    prefix = "dino_encoder.body."
    tiny.same_tensors(hub, {k[len(prefix) :]: v for k, v in back.items() if k.startswith(prefix)})
    assert read_meta(tmp_path / "jax").model.dino.num_heads == 3
    assert read_meta(tmp_path / "jax").model.dino.swiglu == swiglu


def zero_parts(cfg, names, seed):
    """Stands for the fresh parts where their values do not matter: compiling them takes long."""
    from convert_weights.st4vla import policy_rules

    return nested(
        (r.jax, np.zeros(r.jax_shape, np.float32))
        for r in policy_rules(cfg)
        if r.jax.split("/")[0] in names
    )


def test_old_hugging_face_dino_names(tmp_path):
    """save_pretrained writes the older generation of names; the newer ones are read as well."""
    from convert_weights.dinov2 import hub_tensors
    from convert_weights.safetensors_io import open_weights

    hub = tiny.hf_dino(tmp_path, swiglu=True)
    stored = open_weights(tmp_path)
    assert any("attention.attention.query" in k for k in stored)
    swaps = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "mlp.weights_out": "mlp.down_proj",
    }
    newer = {}
    for key, tensor in stored.items():
        for old, new in swaps.items():
            key = key.replace(old, new)
        if "weights_in" in key:
            from convert_weights.safetensors_io import lazy

            for name, half in zip(
                ("gate_proj", "up_proj"), np.split(tensor.read(), 2), strict=True
            ):
                newer[key.replace("weights_in", name)] = lazy(half)
        else:
            newer[key] = tensor
    for tensors in (stored, newer):
        got = {k: torch.from_numpy(np.array(t.read())) for k, t in hub_tensors(tensors).items()}
        tiny.same_tensors(hub, got)


def test_fresh_parts(tmp_path):
    """Bridge and DiT of a new policy are initialised, in f32, and differ by seed."""
    from convert_weights.to_jax import fresh_parts

    tiny.hf_folder(tmp_path / "hf", dtype=BF16)
    torch.save(tiny.hub_dino(), tmp_path / "dino.pth")
    source = ("--vlm", tmp_path / "hf", "--dino", tmp_path / "dino.pth", "--dino-heads", 3,
              "--dit", "tiny", "--chunk", 4, "--action-dim", 5, "--seed", 3)  # fmt: skip
    out = exported(tmp_path, *source, fmt="both")
    assert sorted(p.name for p in out.iterdir()) == ["export.json", "hf", "upstream"]
    meta, params = read_meta(tmp_path / "jax"), read_params(tmp_path / "jax")
    assert meta.model.dit.chunk == 4 and meta.model.dit.action_dim == 5
    assert meta.notes == {"fresh": "bridge, dit", "seed": "3"} and len(meta.action.names) == 5
    kernel = params["dit"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.dtype == np.float32 and 0 < kernel.std() < 1
    other = fresh_parts(meta.model, ("dit",), seed=4)["dit"]["blocks"]["attn"]["qkv"]["kernel"]
    assert not np.array_equal(kernel, other)
    assert params["vlm"]["language_model"]["norm"]["scale"].dtype.name == "bfloat16"
    run(verify.main, tmp_path / "jax", out / "upstream/checkpoints/steps_0_pytorch_model.pt")
    config = yaml.safe_load((out / "upstream/config.yaml").read_text())
    assert config["framework"]["qwenvl"]["base_vlm"] == str(out / "hf")


@pytest.mark.parity
def test_verify_by_layers(tmp_path, capsys):
    weights, state = tiny.run_folder(tmp_path)
    run(to_jax.main, "--out", tmp_path / "jax", "--st4vla", weights)
    run(verify.main, tmp_path / "jax", tmp_path / "base", "--layers")
    assert "hidden state 4" in capsys.readouterr().out
    key = "qwen_vl_interface.model.model.language_model.layers.2.mlp.up_proj.weight"
    state[key] = state[key] * 1.5
    torch.save(state, weights)
    assert verify.main([str(tmp_path / "jax"), str(weights), "--layers"]) == 1
    out = capsys.readouterr().out
    bad = [line for line in out.splitlines() if "OUT OF TOLERANCE" in line]
    assert key in bad[0] and "hidden state 3" in bad[1] and len(bad) == 3
    assert f"3 differences; first: {key}: max abs error" in out
    assert verify.main([str(tmp_path / "jax"), str(weights), "--rtol", "0.5"]) == 0


def test_difference_beside_equal_nans():
    a, b = np.float32([[np.nan, np.inf, 1.0, 2.0]] * 2)
    assert verify.difference(a, b, 0, 0) == verify.Difference(0.0, 0.0, True)
    a[2] = 1.5
    assert verify.difference(a, b, 0, 0) == verify.Difference(0.5, 0.25, False)
    assert verify.difference(a, b, 0.5, 0) == verify.Difference(0.5, 0.25, True)
    for value, other in ((np.nan, 1.0), (1.0, np.nan), (1.0, np.inf), (np.inf, -np.inf)):
        a[3], b[3] = value, other
        found = verify.difference(a, b, 1, 1)
        assert (found.absolute, found.within) == (np.inf, False)


def test_a_policy_that_reads_its_state_goes_to_pytorch_and_back(tmp_path):
    """Its state encoder has names of our own there."""
    cfg = model_config("tiny", "tiny", "tiny", bridge={"state_dim": 7, "state_hidden_size": 12})
    rng = np.random.default_rng(0)
    leaves = {r.jax: rng.normal(size=r.jax_shape).astype(np.float32) for r in policy_rules(cfg)}
    tiny_meta = Meta(cfg, PromptConfig(), ImageConfig(), ActionSpec())
    files = {STATISTICS: json.dumps(tiny.STATISTICS).encode()}
    write_checkpoint(tmp_path / "policy", leaves.items(), tiny_meta, files)
    byte_level_tokenizer().save(tmp_path / "policy/meta/tokenizer")
    run(to_torch.main, "--checkpoint", tmp_path / "policy", "--out", tmp_path / "torch",
        "--format", "both", "--allow-custom-sizes")  # fmt: skip
    weights = next((tmp_path / "torch/upstream/checkpoints").glob("*.pt"))
    keys = {key for key in torch.load(weights) if key.startswith("state_encoder.")}
    assert keys == {f"state_encoder.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    run(to_jax.main, "--out", tmp_path / "back", "--st4vla", weights)
    assert read_meta(tmp_path / "back").model.bridge == cfg.bridge
    for path, value in leaves.items():
        np.testing.assert_array_equal(read_leaf(tmp_path / "back", path), value)
