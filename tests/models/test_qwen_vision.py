"""The vision tower equals transformers' for any image sizes, packing, layout and remat policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.rules import leaves_from_torch, vision_rules
from st4vla_jax.batch import VISION_BIN
from st4vla_jax.checkpoint import nested
from st4vla_jax.config import FLOAT32, Runtime, VisionConfig, model_config
from st4vla_jax.data import image as image_lib
from st4vla_jax.models import qwen_vision
from st4vla_jax.models.qwen_vision import VisionTower
from st4vla_jax.sharding import Rules, make_mesh, param_shardings, unbox

CFG = VisionConfig(
    depth=4,
    hidden_size=64,
    num_heads=4,
    intermediate_size=96,
    out_hidden_size=48,
    fullatt_block_indexes=(1, 3),
)
SIZES = [(140, 196), (308, 448), (84, 1400), (224, 224), (168, 252), (28, 28)]
PADDED = 832  # slots of the largest image, 84x1400


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@functools.cache
def reference(pattern=CFG.fullatt_block_indexes):
    """(HF vision tower, our parameters) with the same random weights, norms and biases too."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    cfg = dataclasses.replace(CFG, fullatt_block_indexes=pattern)
    names = (
        "depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size",
        "fullatt_block_indexes",
    )  # fmt: skip
    fields = {name: getattr(cfg, name) for name in names}
    config = hf.Qwen2_5_VLVisionConfig(**fields, attn_implementation="eager")
    model = hf.Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name or "ln_q" in name else 0.15 * noise)
    state = {f"visual.{k}": v.numpy() for k, v in model.state_dict().items()}
    params = nested(leaves_from_torch(vision_rules(cfg), state.__getitem__))["visual"]
    return model, jax.tree.map(jnp.asarray, params)


def hf_features(model, images):
    """HF's merged features of each image, cells in raster order."""
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(do_resize=False)
    inputs = processor(images, return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        out = model(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    counts = [image_lib.num_cells(*image.shape[:2]) for image in images]
    return [part.numpy() for part in torch.split(out, counts)]


def packed(rows, slots=None):
    """Tower inputs of rows of samples (lists of images), and (row, cells) of every image.

    Samples of a row stand side by side with image ids counted on, as the packer does; padding is
    filled with noise, which must not matter.
    """
    arranged = [[image_lib.arrange(images) for images in row] for row in rows]
    slots = slots or max(sum(len(s.patches) for s in row) for row in arranged)
    patches = np.random.default_rng(9).integers(0, 256, (len(rows), slots, 588), np.uint8)
    patch_hw = np.zeros((len(rows), slots, 2), np.int32)
    patch_image, patch_window = np.zeros((2, len(rows), slots), np.int32)
    places = []
    for i, row in enumerate(arranged):
        start = image_count = 0
        for s in row:
            part = slice(start, start + len(s.patches))
            patches[i, part], patch_hw[i, part] = s.patches, s.patch_hw
            patch_image[i, part] = np.where(s.patch_image > 0, s.patch_image + image_count, 0)
            patch_window[i, part] = s.patch_window
            places += [(i, start // 4 + cells) for cells in s.cells]
            start, image_count = part.stop, image_count + len(s.grids)
    return (patches, patch_hw, patch_image, patch_window), places


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(cfg, rt, params, *inputs):
    return VisionTower(cfg, rt).apply({"params": params}, *inputs)


def assert_rows_equal_hf(rows, slots=None, cfg=CFG, rt=FLOAT32):
    model, params = reference(cfg.fullatt_block_indexes)
    inputs, places = packed(rows, slots)
    features = np.asarray(forward(cfg, rt, params, *inputs))
    assert features.shape == (len(rows), inputs[0].shape[1] // 4, cfg.out_hidden_size)
    expected = [f for row in rows for images in row for f in hf_features(model, images)]
    for (row, cells), theirs in zip(places, expected, strict=True):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(features[row, cells], theirs, rtol=0, atol=1e-4)


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_one_image_equals_hf(size):
    assert_rows_equal_hf([[[noise(size)]]], PADDED)


@pytest.mark.parity
def test_one_image_without_padding_equals_hf():
    assert_rows_equal_hf([[[noise((224, 224))]]])


@pytest.mark.parity
def test_packed_rows_equal_hf():
    """Several images a sample, several samples a row, rows with different padding."""
    images = [noise(size, seed) for seed, size in enumerate(SIZES)]
    a, b, c, d, e, f = images
    rows = [[[a, e, f], [d]], [[b]], [[c]], [[f], [f, a], [e, d, a]]]
    assert_rows_equal_hf(rows)


@pytest.mark.parity
@pytest.mark.parametrize("pattern", [(0, 2), (), (0, 1, 2, 3), (2,)])
def test_irregular_patterns_equal_hf(pattern):
    cfg = dataclasses.replace(CFG, fullatt_block_indexes=pattern)
    assert_rows_equal_hf([[[noise((140, 196))]], [[noise((224, 224))]]], cfg=cfg)


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [0, 96])
def test_query_chunks_equal_hf(chunk):
    """96 does not divide the 320 slots."""
    rt = dataclasses.replace(FLOAT32, query_chunk=chunk)
    assert_rows_equal_hf([[[noise((140, 196)), noise((84, 140))]]], 320, rt=rt)


@pytest.mark.parity
def test_the_stem_from_scratch_follows_the_patch_embedding():
    """HF's tower, its embedding centred on the image, times 3, plus positions patch by patch."""
    size, width = (140, 196), CFG.hidden_size
    model, params = reference()
    torch = pytest.importorskip("torch")
    # HF takes patches cell by cell: rows of cells, cells of a row, then the four of a cell.
    order = [
        (2 * i + a, 2 * j + b)
        for i in range(size[0] // 28)
        for j in range(size[1] // 28)
        for a in range(2)
        for b in range(2)
    ]
    quarter = width // 4
    table = np.zeros((len(order), width), np.float32)
    for patch, place in enumerate(order):
        for axis, at in enumerate(place):
            for k in range(quarter):
                angle = at / 100 ** (k / quarter)
                table[patch, 2 * quarter * axis + k] = np.sin(angle)
                table[patch, 2 * quarter * axis + quarter + k] = np.cos(angle)
    handle = model.patch_embed.register_forward_hook(
        lambda *a: 3 * (a[2] - a[2].mean(0)) + torch.from_numpy(table)
    )
    images = [noise(size, 0), noise(size, 1) // 2]  # two in a row are centred apart
    try:
        expected = [hf_features(model, [image])[0] for image in images]
    finally:
        handle.remove()
    inputs, places = packed([[[images[0]], [images[1]]]])
    cfg = dataclasses.replace(CFG, from_scratch=True)
    ours = np.asarray(forward(cfg, FLOAT32, params, *inputs))
    for (row, cells), theirs in zip(places, expected, strict=True):
        np.testing.assert_allclose(ours[row, cells], theirs, rtol=0, atol=1e-4)


# --- structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "full", "groups"),
    [
        (32, (7, 15, 23, 31), [(7, 1, 4)]),
        (4, (1, 3), [(1, 1, 2)]),
        (4, (0, 2), [(0, 1, 1), (1, 1, 1), (1, 0, 1)]),
        (4, (), [(4, 0, 1)]),
        (3, (2, 1, 0), [(0, 1, 3)]),
        (9, (2, 5, 6), [(2, 1, 2), (0, 1, 1), (2, 0, 1)]),
    ],
)
def test_block_groups(depth, full, groups):
    assert qwen_vision.block_groups(depth, full) == groups
    kinds = [kind for n, f, r in groups for kind in ([0] * n + [1] * f) * r]
    assert kinds == [int(i in full) for i in range(depth)]


def test_fresh_kernels_are_as_wide_as_their_inputs_ask():
    """0.02 as Hugging Face's; from scratch 1 / sqrt(inputs), so that blocks do something."""
    inputs = packed([[[noise((28, 28))]]], VISION_BIN)[0]
    for is_fresh in (False, True):
        cfg = dataclasses.replace(CFG, depth=1, fullatt_block_indexes=(), from_scratch=is_fresh)
        init = jax.jit(VisionTower(cfg, FLOAT32).init)
        params = unbox(init(jax.random.key(0), *inputs)["params"])
        for kernel, fan_in in (
            (params["blocks"]["attn"]["qkv"]["kernel"], 64),
            (params["blocks"]["mlp"]["down_proj"]["kernel"], 96),
            (params["merger"]["mlp_2"]["kernel"], 256),
        ):
            assert np.std(kernel) == pytest.approx(fan_in**-0.5 if is_fresh else 0.02, rel=0.05)
        assert np.std(params["patch_embed"]["proj"]["kernel"]) == pytest.approx(0.02, rel=0.05)


def abstract_params(cfg, rt=FLOAT32, slots=VISION_BIN):
    """Boxed parameter tree as ShapeDtypeStructs."""
    lead = (1, slots)
    shapes = ((*lead, 588), np.uint8), ((*lead, 2), np.int32), (lead, np.int32), (lead, np.int32)
    inputs = [jax.ShapeDtypeStruct(*s) for s in shapes]
    return jax.eval_shape(VisionTower(cfg, rt).init, jax.random.key(0), *inputs)["params"]


@pytest.mark.parametrize("preset", ["3b", "72b", "tiny"])
def test_parameter_tree_is_the_rules_table(preset):
    cfg = model_config(preset, None, None).vision
    for slots in (VISION_BIN, 0):  # a row without images makes the same parameters
        tree = unbox(abstract_params(cfg, slots=slots))
        leaves = jax.tree_util.tree_leaves_with_path({"visual": tree})
        ours = {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves}
        assert ours == {rule.jax: rule.jax_shape for rule in vision_rules(cfg)}


def test_no_images():
    _, params = reference()
    inputs, _ = packed([[[]], [[]]])
    assert forward(CFG, FLOAT32, params, *inputs).shape == (2, 0, CFG.out_hidden_size)
    assert "scan" not in str(
        jax.make_jaxpr(forward, static_argnums=(0, 1))(CFG, FLOAT32, params, *inputs)
    )


def test_slots_that_are_no_bins_raise():
    _, params = reference()
    inputs, _ = packed([[[noise((28, 28))]]], 96)
    with pytest.raises(ValueError, match="96 vision slots are not a multiple of 64"):
        forward(CFG, FLOAT32, params, *inputs)


def test_bfloat16_is_close_to_float32():
    _, params = reference()
    inputs, ((_, cells),) = packed([[[noise((224, 224))]]])
    exact = np.asarray(forward(CFG, FLOAT32, params, *inputs))[0, cells].ravel()
    rough = forward(CFG, Runtime(), params, *inputs)
    assert rough.dtype == jnp.bfloat16
    rough = np.asarray(rough, np.float32)[0, cells].ravel()
    cosine = exact @ rough / (np.linalg.norm(exact) * np.linalg.norm(rough))
    assert cosine > 0.999


# --- gradients and layout -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(cfg, rt, params, *inputs):
    """((loss, features of used cells), gradients)."""

    def loss(params):
        out = VisionTower(cfg, rt).apply({"params": params}, *inputs)
        used = inputs[2].reshape(out.shape[0], -1, 4)[..., :1] > 0
        features = jnp.where(used, out, 0)
        return jnp.mean(jnp.square(features)), features

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_trees_close(a, b, tolerance=1e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(y).max() > 0, path
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=path)


def test_remat_policies_give_equal_gradients():
    _, params = reference()
    inputs, _ = packed([[[noise((84, 140)), noise((28, 28))]]], 192)
    plain = gradients(
        CFG, dataclasses.replace(FLOAT32, remat="none", query_chunk=0), params, *inputs
    )
    for policy in ("full", "dots", "dots_decoder_mlp"):
        rt = dataclasses.replace(FLOAT32, remat=policy, query_chunk=80)
        assert_trees_close(gradients(CFG, rt, params, *inputs)[1], plain[1])


@pytest.mark.parametrize("remat,products", [("full", 0), ("dots_decoder_mlp", 2)])
def test_backward_pass_keeps_no_copy_of_the_parameters(remat, products):
    """Residuals are block inputs, not the slices of the stack that the inner scan takes."""
    rt = dataclasses.replace(FLOAT32, remat=remat)
    params = unbox(abstract_params(CFG, rt))
    inputs, _ = packed([[[noise((28, 28))]]])

    def residuals(params, *inputs):
        return jax.vjp(lambda p: VisionTower(CFG, rt).apply({"params": p}, *inputs), params)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, *inputs))]
    windowed = (2, 1, 1, VISION_BIN)  # of two groups with one such block each
    assert (*windowed, CFG.hidden_size) in shapes  # its input
    assert shapes.count((*windowed, CFG.intermediate_size)) == products
    heads = (3, CFG.num_heads, CFG.head_dim)
    assert [s for s in shapes if s[-3:] == heads and CFG.hidden_size in s] == [
        (2, 2, CFG.hidden_size, *heads)  # the stack itself, seen as two groups of two blocks
    ]


def test_sharded_equals_single_device():
    _, params = reference()
    inputs, _ = packed([[[noise((56, 28 * (i + 1)), i)], [noise((28, 28), i)]] for i in range(4)])
    (_, expected), expected_grads = gradients(CFG, FLOAT32, params, *inputs)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(abstract_params(CFG), mesh, Rules()))
        by_row = jax.NamedSharding(mesh, Rules().spec(("batch",)))
        inputs = [jax.device_put(x, by_row) for x in inputs]
        (_, features), grads = gradients(CFG, FLOAT32, params, *inputs)
    kernel = params["blocks"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 32, 48)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
    assert_trees_close(grads, expected_grads)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 2, 2), (1, 8, 1), (1, 4, 2)])
def test_the_3b_tower_fits_meshes(sizes):
    tree = abstract_params(model_config("3b", None, None).vision)
    specs = param_shardings(tree, make_mesh(*sizes), Rules())
    qkv = specs["blocks"]["attn"]["qkv"]["kernel"].spec
    assert tuple(qkv) == (None, "fsdp", None, "tensor", None)


def test_padded_mlp_equals_the_plain_one(monkeypatch):
    """On GPUs the MLP's width is brought to whole tiles; the function stays the same."""
    cfg = dataclasses.replace(model_config("tiny", None, None).vision, intermediate_size=84)
    mlp, x = qwen_vision.VisionMlp(cfg, FLOAT32), jnp.asarray(_normal((2, 6, cfg.hidden_size)))
    params = unbox(mlp.init(jax.random.key(0), x))

    def gradients():
        return jax.grad(lambda p: jnp.sum(jnp.sin(mlp.apply(p, x))))(params)

    plain, plain_grads = mlp.apply(params, x), gradients()
    monkeypatch.setattr(qwen_vision, "platform", lambda: "gpu")
    assert qwen_vision.mlp_padding(84) == 44 and qwen_vision.mlp_padding(128) == 0
    assert "128" in str(jax.make_jaxpr(lambda p: mlp.apply(p, x))(params))
    np.testing.assert_allclose(mlp.apply(params, x), plain, rtol=0, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradients(), plain_grads
    )


def _normal(shape):
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)
