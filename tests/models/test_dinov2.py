import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.rules import dino_rules, leaves_from_torch
from st4vla_jax.checkpoint import nested
from st4vla_jax.config import DINO_PRESETS, FLOAT32, DinoConfig
from st4vla_jax.models.dinov2 import DinoV2, normalize_pixels, resize_positions
from st4vla_jax.sharding import is_axes, unbox
from tests.reference import golden

TINY = DinoConfig(depth=2, hidden_size=32, num_heads=4, mlp_size=128)


def torch_shapes(cfg):
    return {k: r.torch_shape for r in dino_rules(cfg) for k in r.torch_keys}


def from_torch(cfg, tensors):
    return nested(leaves_from_torch(dino_rules(cfg), tensors.__getitem__))


@pytest.mark.parametrize("name", DINO_PRESETS)
def test_parameter_tree_is_the_one_of_the_rules(name):
    cfg = dataclasses.replace(DINO_PRESETS[name], depth=2)
    images = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.uint8)
    tree = jax.eval_shape(DinoV2(cfg, FLOAT32).init, jax.random.key(0), images)["params"]
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_axes)[0]
    shapes = {"/".join(k.key for k in path): box.value.shape for path, box in flat}
    assert shapes == {rule.jax: rule.jax_shape for rule in dino_rules(cfg)}


@pytest.mark.parity
def test_position_resize_equals_golden(shared):
    entry = golden.load(shared)["dino_posembed_37to16"]
    resized = np.asarray(resize_positions(jnp.asarray(golden.wave((1370, 384), 1, 0)), 16))
    golden.assert_matches(resized[None], entry["out"], 1e-4)
    np.testing.assert_allclose(resized[1, :8], entry["row1_first8"], atol=1e-4)
    np.testing.assert_allclose(resized[256, :8], entry["row256_first8"], atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(("source", "target"), [(37, 16), (37, 5), (8, 4), (8, 13), (37, 36)])
def test_position_resize_equals_torch(source, target):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1 + source**2, 6)).astype(np.float32)
    grid = torch.from_numpy(table[1:]).reshape(1, source, source, 6).permute(0, 3, 1, 2)
    factor = (target + 0.1) / source
    want = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    want = want.permute(0, 2, 3, 1).reshape(target**2, 6).numpy()
    got = np.asarray(resize_positions(jnp.asarray(table), target))
    np.testing.assert_array_equal(got[0], table[0])
    np.testing.assert_allclose(got[1:], want, atol=5e-5)


def test_position_embedding_of_its_own_grid_is_untouched():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(26, 4)), jnp.float32)
    np.testing.assert_array_equal(resize_positions(table, 5), table)


@pytest.mark.parity
def test_vits14_equals_golden(shared):
    entry = golden.load(shared)["dinov2_vits14"]
    cfg = DINO_PRESETS["s"]
    params = from_torch(cfg, golden.fill(torch_shapes(cfg) | {"mask_token": (1, 384)}))
    pixels = golden.wave((1, 3, 224, 224), 1, 0.5).transpose(0, 2, 3, 1)
    features = jax.jit(lambda p, x: DinoV2(cfg, FLOAT32).apply(p, x, method=DinoV2.features))
    cls, patches = features({"params": params}, pixels)
    golden.assert_matches(patches, entry["x_norm_patchtokens"], 1e-4)
    golden.assert_matches(cls, entry["x_norm_clstoken"], 1e-4)


def hub_names(state, cfg):
    """Tensors of a Dinov2Model under the hub's names."""
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        source = f"embeddings.patch_embeddings.projection.{kind}"
        out[f"patch_embed.proj.{kind}"] = state[source]
        out[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(cfg.depth):
            layer = {
                k.removeprefix(f"encoder.layer.{i}."): v
                for k, v in state.items()
                if k.startswith(f"encoder.layer.{i}.") and k.endswith(kind)
            }
            block = {f"{norm}.{kind}": layer[f"{norm}.{kind}"] for norm in ("norm1", "norm2")}
            qkv = [layer[f"attention.{name}_proj.{kind}"] for name in "qkv"]
            block[f"attn.qkv.{kind}"] = np.concatenate(qkv)
            block[f"attn.proj.{kind}"] = layer[f"attention.o_proj.{kind}"]
            if cfg.swiglu:
                both = [layer[f"mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
                block[f"mlp.w12.{kind}"] = np.concatenate(both)
                block[f"mlp.w3.{kind}"] = layer[f"mlp.down_proj.{kind}"]
            else:
                block |= {f"mlp.{fc}.{kind}": layer[f"mlp.{fc}.{kind}"] for fc in ("fc1", "fc2")}
            out |= {f"blocks.{i}.{k}": v for k, v in block.items()}
    for i in range(cfg.depth):
        for n in (1, 2):
            out[f"blocks.{i}.ls{n}.gamma"] = state[f"encoder.layer.{i}.layer_scale{n}.lambda1"]
    return out


def hf_model(cfg, seed=0):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=cfg.hidden_size,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.num_heads,
            image_size=cfg.pretrain_size,
            patch_size=cfg.patch_size,
            use_swiglu_ffn=cfg.swiglu,
            layer_norm_eps=cfg.norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale_like = name.endswith("lambda1") or ("norm" in name and name.endswith("weight"))
            p.copy_(0.2 * torch.randn_like(p) + float(scale_like))
    return model


@pytest.mark.parity
@pytest.mark.parametrize(
    "cfg",
    [
        dataclasses.replace(TINY, image_size=518),
        dataclasses.replace(TINY, pretrain_size=70, swiglu=True, mlp_size=88),
    ],
    ids=["mlp-518px", "swiglu"],
)
def test_equals_transformers(cfg):
    model = hf_model(cfg)
    torch = pytest.importorskip("torch")
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    params = {"params": from_torch(cfg, hub_names(state, cfg))}
    size = cfg.pretrain_size
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), np.uint8)
    pixels = np.asarray(normalize_pixels(jnp.asarray(images)))
    with torch.no_grad():
        want = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    dino = DinoV2(cfg, FLOAT32)
    cls, patches = jax.jit(lambda p, x: dino.apply(p, x, method=DinoV2.features))(params, pixels)
    np.testing.assert_allclose(cls, want[:, 0], atol=1e-4)
    np.testing.assert_allclose(patches, want[:, 1:], atol=1e-4)
    np.testing.assert_allclose(jax.jit(dino.apply)(params, images), want[:, 1:], atol=1e-4)


@pytest.mark.parity
def test_the_stem_from_scratch_follows_the_patch_embedding():
    """HF's model, its embedding centred on the image, times 3, plus positions patch by patch."""
    cfg = dataclasses.replace(TINY, pretrain_size=70, from_scratch=True)
    model = hf_model(cfg)
    torch = pytest.importorskip("torch")
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    params = {"params": from_torch(cfg, hub_names(state, cfg))}
    images = np.random.default_rng(1).integers(0, 256, (2, 70, 70, 3), np.uint8)
    grid, quarter = 70 // 14, cfg.hidden_size // 4
    table = np.zeros((grid, grid, cfg.hidden_size), np.float32)
    for row in range(grid):
        for column in range(grid):
            for k in range(quarter):
                for axis, at in enumerate((row, column)):
                    angle = at / 100 ** (k / quarter)
                    table[row, column, 2 * quarter * axis + k] = np.sin(angle)
                    table[row, column, 2 * quarter * axis + quarter + k] = np.cos(angle)
    table = torch.from_numpy(table.reshape(grid**2, -1))
    model.embeddings.patch_embeddings.register_forward_hook(
        lambda *a: 3 * (a[2] - a[2].mean(1, keepdim=True)) + table
    )
    pixels = np.asarray(normalize_pixels(jnp.asarray(images)))
    with torch.no_grad():
        want = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    got = jax.jit(DinoV2(cfg, FLOAT32).apply)(params, images)
    np.testing.assert_allclose(got, want[:, 1:], atol=1e-4)


def test_fresh_kernels_are_as_wide_as_their_inputs_ask():
    for is_fresh in (False, True):
        cfg = dataclasses.replace(TINY, hidden_size=64, from_scratch=is_fresh)
        init = jax.jit(DinoV2(cfg, FLOAT32).init)
        blocks = unbox(init(jax.random.key(0), np.zeros((1, 28, 28, 3), np.uint8))["params"])[
            "blocks"
        ]
        for kernel, fan_in in (
            (blocks["attn"]["qkv"]["kernel"], 64),
            (blocks["attn"]["proj"]["kernel"], 64),
            (blocks["mlp"]["fc2"]["kernel"], 128),
        ):
            assert np.std(kernel) == pytest.approx(fan_in**-0.5 if is_fresh else 0.02, rel=0.05)


def test_pixels_are_normalised_as_by_torchvision():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = (images / 255.0 - mean) / std
    np.testing.assert_allclose(normalize_pixels(jnp.asarray(images)), want, atol=1e-5)


def test_leading_axes_are_free():
    cfg = DINO_PRESETS["tiny"]
    dino = DinoV2(cfg, FLOAT32)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 2, 28, 28, 3), np.uint8)
    params = unbox(jax.jit(dino.init)(jax.random.key(0), images[0, 0]))
    apply = jax.jit(dino.apply)
    flat = apply(params, images.reshape(12, 28, 28, 3))
    np.testing.assert_allclose(apply(params, images).reshape(flat.shape), flat, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 42, 3), (1, 30, 30, 3)])
def test_bad_image_sizes_are_refused(shape):
    with pytest.raises(ValueError, match=f"multiple of 14, not {shape[1]}x{shape[2]}"):
        DinoV2(TINY, FLOAT32).init(jax.random.key(0), np.zeros(shape, np.uint8))
