"""Bad sources: the message names the file and the key, and nothing is left half-written."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from convert_weights import to_jax, to_torch, tokenizer, verify
from tests.reference import checkpoints as tiny


def refused(capsys, tmp_path, main, *args):
    """Runs a converter that must fail; returns its message."""
    before = sorted(tmp_path.rglob("*"))
    assert main([str(a) for a in args]) == 1
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    return capsys.readouterr().err


@pytest.fixture
def hf(tmp_path):
    tiny.hf_folder(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def from_vlm(capsys, tmp_path, hf):
    return lambda *args: refused(
        capsys, tmp_path, to_jax.main, "--out", tmp_path / "out", "--vlm", hf, *args
    )


def edit(folder, change):
    """Rewrites a single-file folder's weights by a function of the dict of tensors."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def edit_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_all_missing_extra_and_misshapen_keys_at_once(hf, from_vlm):
    def change(state):
        del state["model.norm.weight"]
        state["model.layers.1.mlp.typo.weight"] = torch.zeros(2)
        state["visual.blocks.0.norm2.weight"] = torch.zeros(31)

    edit(hf, change)
    message = from_vlm()
    for part in (
        f"error: {hf}: 3 problems",
        "missing: model.language_model.norm.weight (48,)",
        "not expected: model.language_model.layers.1.mlp.typo.weight (2,)",
        "wrong shape: model.visual.blocks.0.norm2.weight is (31,), the model needs (32,)",
    ):
        assert part in message


def test_config_json_and_shapes_disagree(hf, from_vlm):
    def change(config):
        config["text_config"]["num_hidden_layers"] = 5
        config["vision_config"]["intermediate_size"] = 64

    edit_json(hf / "config.json", change)
    message = from_vlm()
    assert f"num_hidden_layers is 5 in {hf}/config.json but 4 in the tensors" in message
    assert "vision_config.intermediate_size is 64" in message and "but 48" in message


def test_unsuitable_config_json(hf, from_vlm):
    config = hf / "config.json"
    edit_json(config, lambda c: c.update(model_type="qwen3_vl"))
    assert f"{config}: model_type 'qwen3_vl' is not" in from_vlm()
    config.write_text("{")
    assert f"{config}: not readable as JSON" in from_vlm()
    config.unlink()
    assert f"{config}: no such file" in from_vlm()
    config.write_text("{}")
    message = from_vlm()
    assert "mrope_section" in message and "vocab_size" in message


def test_truncated_weights(hf, from_vlm):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path}: damaged safetensors file" in (message := from_vlm()) and "cut: " in message


def test_missing_shard(capsys, tmp_path):
    folder = tmp_path / "hf"
    tiny.hf_folder(folder, max_shard="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    args = ("--out", tmp_path / "out", "--vlm", folder)
    message = refused(capsys, tmp_path, to_jax.main, *args)
    assert "missing shards" in message and shard.name in message


def test_tied_head_that_differs(hf, from_vlm):
    edit(hf, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight differs from model.language_model.embed_tokens.weight" in from_vlm()


def test_layers_of_one_stack_in_two_dtypes(hf, from_vlm):
    key = "model.layers.1.self_attn.o_proj.weight"
    edit(hf, lambda s: s.update({key: s[key].bfloat16()}))
    message = from_vlm()
    assert "layers.{i}.self_attn.o_proj.weight has dtypes bfloat16, float32" in message


def test_both_conventions_at_once(hf, from_vlm):
    edit(hf, lambda s: s.update({"model.language_model.norm.weight": torch.zeros(48)}))
    assert "stored in both conventions" in from_vlm()


def test_tokenizer(hf, from_vlm):
    path = hf / "tokenizer.json"
    edit_json(path, lambda t: t.update(added_tokens=[]))
    assert "<|im_start|>" in (message := from_vlm()) and str(path) in message
    path.unlink()
    assert "tokenizer.json" in (message := from_vlm()) and "convert_weights.tokenizer" in message


def test_tokenizer_of_another_model(hf, from_vlm, from_run, tmp_path):
    """Its ids have no row in the embedding, and would be clamped without a word."""
    for folder, message in ((hf, from_vlm), (tmp_path / "base", from_run)):
        edit_json(folder / "tokenizer.json", lambda t: t["added_tokens"][-1].update(id=400))
        assert (
            f"{folder}/tokenizer.json: its largest token id is 400, but vocab_size is 320 in "
            f"{folder}/config.json"
        ) in message()


def test_choices_of_config_json_that_are_not_computed(hf, from_vlm):
    def change(config):
        config["text_config"] |= {"use_sliding_window": True, "hidden_act": "gelu"}
        config["text_config"]["rope_parameters"]["rope_type"] = "yarn"
        config["text_config"]["num_attention_heads"] = "4"
        config["vision_config"]["hidden_act"] = "quick_gelu"

    edit_json(hf / "config.json", change)
    message = from_vlm()
    for part in (
        f"{hf}/config.json: cannot be used",
        "use_sliding_window is True, supported: False",
        "hidden_act is 'gelu', supported: 'silu'",
        "vision_config.hidden_act is 'quick_gelu'",
        "rope_type 'yarn'",
        "num_attention_heads is '4', expected an integer above 0",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (("--vlm", "hf", "--dit", "b", "--chunk", "3"), "--dit .*; --chunk goes with --dino"),
        (("--vlm", "hf", "--seed", "0", "--dino-heads", "3"), "--dino-heads goes .*--seed goes"),
        (("--vlm", "hf", "--dino", "f", "--qformer-heads", "3"), "--qformer-heads goes with --st4"),
        (("--vlm", "hf", "--base-vlm", "b"), "--base-vlm goes with --st4vla"),
        (("--st4vla", "f", "--dino", "d"), "--dino goes with --vlm"),
        (("--st4vla", "f", "--action-dim", "8"), "--action-dim goes with --dino"),
        (("--st4vla", "f", "--dit-heads", "-2"), "-2 is not at least 1"),
    ],
)
def test_options_that_would_be_ignored(capsys, source, message):
    with pytest.raises(SystemExit):
        to_jax.main(["--out", "out", *source])
    assert re.search(message, capsys.readouterr().err)


def test_dino_file(tmp_path, from_vlm):
    path = tmp_path / "dino.pth"
    hub = tiny.hub_dino()
    torch.save(hub, path)
    assert "width 24" in (message := from_vlm("--dino", path)) and "--dino-heads" in message
    torch.save(hub | {"register_tokens": torch.zeros(1, 4, 24)}, path)
    assert "registers is not supported" in from_vlm("--dino", path, "--dino-heads", 3)
    del hub["blocks.1.ls1.gamma"]
    torch.save(hub, path)
    message = from_vlm("--dino", path, "--dino-heads", 3)
    assert "dino.pth: 1 problems" in message and "missing: blocks.1.ls1.gamma (24,)" in message
    assert "heads" in from_vlm("--dino", path, "--dino-heads", 5)
    torch.save([1], path)
    assert "dino.pth: holds a list" in from_vlm("--dino", path)


def test_output_that_is_there(capsys, tmp_path, hf):
    out = tmp_path / "out"
    assert to_jax.main(["--out", str(out), "--vlm", str(hf)]) == 0
    args = (to_jax.main, "--out", out, "--vlm", hf)
    assert f"{out}: already there; give --overwrite" in refused(capsys, tmp_path, *args)
    assert to_jax.main(["--out", str(out), "--vlm", str(hf), "--overwrite"]) == 0
    export = (to_torch.main, "--checkpoint", out, "--format", "hf", "--out")
    assert to_torch.main([str(a) for a in (*export[1:], tmp_path / "torch")]) == 0
    assert "already there" in refused(capsys, tmp_path, *export, tmp_path / "torch")
    message = refused(capsys, tmp_path, *export, hf, "--overwrite")
    assert "does not replace it" in message, "a folder that is not ours must survive"


def test_output_in_a_place_that_cannot_be(capsys, tmp_path, hf):
    """Permissions and files in the way are the user's to mend: no traceback."""
    (tmp_path / "a.png").touch()
    assert to_jax.main(["--out", str(tmp_path / "jax"), "--vlm", str(hf)]) == 0
    checkpoint = ("--checkpoint", tmp_path / "jax", "--format", "hf")
    for main, args in (
        (to_jax.main, ("--vlm", hf)),
        (to_torch.main, checkpoint),
        (tokenizer.main, ("--from", hf)),
    ):
        message = refused(capsys, tmp_path, main, *args, "--out", tmp_path / "a.png" / "ck")
        assert f"error: {tmp_path}/a.png/ck: {tmp_path}/a.png is a file" in message
        message = refused(capsys, tmp_path, main, *args, "--out", "/proc/nope/ck")
        assert message.startswith("error: ") and "/proc/nope" in message
    (hf / "config.json").unlink()
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").mkdir()
    assert "error: " in refused(capsys, tmp_path, verify.main, hf, hf)


@pytest.fixture
def from_run(capsys, tmp_path):
    """(run with changed weights or config) -> message."""
    weights, state = tiny.run_folder(tmp_path)

    def call(change=lambda state, config: None, *args):
        changed, config = dict(state), tiny.run_config(str(tmp_path / "base"))
        change(changed, config)
        torch.save(changed, weights)
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        args = ("--out", tmp_path / "out", "--st4vla", weights, *args)
        return refused(capsys, tmp_path, to_jax.main, *args)

    return call


def test_config_yaml_and_shapes_disagree(tmp_path, from_run):
    def change(state, config):
        part = config["framework"]
        part["action_model"] |= {"action_dim": 8, "future_action_window_size": 15}
        part["layer_qformer"]["ouptput_dim"] = 768

    message = from_run(change)
    yaml_file = tmp_path / "run" / "config.yaml"
    assert f"framework.action_model.action_dim is 8 in {yaml_file} but 7 in the tens" in message
    assert "future_action_window_size is 15" in message and "but 5 in the tensors" in message
    assert "layer_qformer.ouptput_dim is 768" in message and "but 32 in the tensors" in message

    def layers(state, config):
        config["framework"]["layer_qformer"]["qformer_end_layer"] = 4

    assert "layers 3 to 4" in (message := from_run(layers)) and "2 Q-Former layers" in message


def test_config_yaml_with_values_of_another_type(tmp_path, from_run):
    def change(state, config):
        part = config["framework"]
        part["layer_qformer"] |= {"qformer_start_layer": None, "qformer_end_layer": "5"}
        part["action_model"]["num_heads"] = "4"
        part["dino"]["num_heads"] = 0
        part["qwenvl"]["base_vlm"] = 5
        config["datasets"]["vla_data"]["CoT_prompt"] = None

    message = from_run(change)
    for part in (
        f"{tmp_path}/run/config.yaml: has values of a wrong type",
        "layer_qformer.qformer_start_layer is None, expected an integer",
        "layer_qformer.qformer_end_layer is '5', expected an integer",
        "action_model.num_heads is '4', expected an integer above 0",
        "dino.num_heads is 0, expected an integer above 0",
        "qwenvl.base_vlm is 5, expected text",
        "vla_data.CoT_prompt is None, expected text",
    ):
        assert part in message


def test_run_with_bad_keys(from_run):
    def change(state, config):
        state["action_model.net.surprise"] = torch.zeros(1)
        del state["action_model.net.blocks.1.attn.proj.bias"]

    message = from_run(change)
    assert "missing: blocks.1.attn.proj.bias" in message and "not expected: surprise" in message
    assert "steps_70_pytorch_model.pt: 2 problems" in message

    def no_dino(state, config):
        for key in [k for k in state if k.startswith("dino_encoder")]:
            del state[key]

    assert "no keys below dino_encoder.body." in from_run(no_dino)


def test_run_without_its_surroundings(capsys, tmp_path, from_run):
    def elsewhere(state, config):
        config["framework"]["qwenvl"]["base_vlm"] = "/no/such/model"

    assert "'/no/such/model'" in (message := from_run(elsewhere)) and "--base-vlm" in message

    def size(state, config):
        config["datasets"]["vla_data"]["image_size"] = value

    for value in (224, [0, -3], [224], ["224", 224]):
        message = from_run(size)
        assert f"datasets.vla_data.image_size is {value}, expected two integers above 0" in message

    def no_slot(state, config):
        config["datasets"]["vla_data"]["CoT_prompt"] = "Do it."

    assert "does not contain {instruction}" in from_run(no_slot)

    def no_heads(state, config):
        del config["framework"]["action_model"]["num_heads"]

    assert "DiT of width 32" in (message := from_run(no_heads)) and "--dit-heads" in message
    (tmp_path / "run" / "dataset_statistics.json").write_text('{"oxe_bridge": {"action": {}}}')
    assert "oxe_bridge" in from_run()
    (tmp_path / "run" / "dataset_statistics.json").unlink()
    assert "dataset_statistics.json: no such file; give --statistics" in from_run()
    weights = tmp_path / "run" / "checkpoints" / "steps_70_pytorch_model.pt"
    odd = weights.with_name("model_final.pt")
    weights.rename(odd)
    args = (to_jax.main, "--out", tmp_path / "out", "--st4vla", odd)
    assert "expected steps_<N>_pytorch_model.pt" in refused(capsys, tmp_path, *args)
    odd.rename(weights)
    (tmp_path / "run" / "config.yaml").unlink()
    args = (to_jax.main, "--out", tmp_path / "out", "--st4vla", weights)
    assert "config.yaml: no such file" in refused(capsys, tmp_path, *args)


def test_failure_while_writing(monkeypatch, capsys, tmp_path, hf):
    def broken(*args):
        raise to_jax.ConversionError("in the middle")

    monkeypatch.setattr(to_jax, "leaves", broken)
    args = (to_jax.main, "--out", tmp_path / "out", "--vlm", hf)
    assert "in the middle" in refused(capsys, tmp_path, *args)


def test_verify_names_keys_and_shapes(capsys, tmp_path, hf):
    tiny.hf_folder(tmp_path / "other")

    def change(state):
        state["model.norm.weight"] = torch.zeros(5)
        state["extra"] = torch.zeros(5)

    edit(tmp_path / "other", change)
    assert verify.main([str(hf), str(tmp_path / "other")]) == 1
    assert "2 differences; first: qwen_vl_interface.model.extra: only in" in capsys.readouterr().out
    assert "no such file" in refused(capsys, tmp_path, verify.main, hf, tmp_path / "none")
