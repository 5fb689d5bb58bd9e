"""FLOPs: of a batch against the traced program and closed forms; of programs against arithmetic."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from st4vla_jax import flops
from st4vla_jax.batch import Batch
from st4vla_jax.config import FLOAT32, model_config
from st4vla_jax.data.packing import Capacity, pack
from st4vla_jax.flops import FlopsError, jaxpr_flops, model_flops
from st4vla_jax.models.dinov2 import resize_positions
from st4vla_jax.models.st4vla import ST4VLA, Denominators
from st4vla_jax.sharding import unbox
from tests.reference.policy import TOKENIZER, grounding_sample, robot_sample, tiny_batch, tiny_rows

REPEATS = 2
CFG = model_config("tiny", "tiny", "tiny", bridge={"state_dim": 3})
LM_CFG = model_config("tiny", None, None)


def full_batch(kind):
    """Two rows of one sample each that fill all tokens, slots, targets and robot places.

    One image of 112x112 is one window, one of 224x112 two: every slot is valid.
    """
    if kind == "robot":
        rows = [[robot_sample(CFG, 4 * i, sizes=((224, 112),))] for i in range(2)]
    else:
        rows = [[grounding_sample(i, size=(112, 112))] for i in range(2)]
    capacity = Capacity.fit(rows)
    batch = pack(rows, capacity, pad_id=TOKENIZER.pad)
    assert (batch.vlm.segment_ids > 0).all() and (batch.vlm.patch_image > 0).all()
    return batch


def traced(cfg, batch, backward, remat="none"):
    """FLOPs of the traced loss, or of the loss with the gradients of all parameters."""
    model = ST4VLA(cfg, dataclasses.replace(FLOAT32, remat=remat))
    params = unbox(jax.eval_shape(model.init, jax.random.key(0)))

    def loss(params, batch):
        draws = model.draw(jax.random.key(0), batch, REPEATS, train=False)
        return model.loss(params, batch, draws, Denominators.of(batch, REPEATS))[0]

    return jaxpr_flops(jax.make_jaxpr(jax.grad(loss) if backward else loss)(params, batch))


def masked_scores(cfg, batch):
    """What the dense program spends on scores above the diagonal, forward."""
    rows, length = batch.vlm.tokens.shape
    c = cfg.text
    width = c.num_attention_heads * c.head_dim
    return rows * c.num_hidden_layers * 4 * width * length * (length - 1) / 2


def position_resize(cfg):
    """DINOv2's interpolation of its position embedding: no work of a batch, but in the program."""
    c = cfg.dino
    table = jnp.zeros((1 + (c.pretrain_size // c.patch_size) ** 2, c.hidden_size))
    grid = c.image_size // c.patch_size
    return jaxpr_flops(jax.make_jaxpr(lambda t: resize_positions(t, grid))(table))


@pytest.mark.parametrize("kind,cfg", [("robot", CFG), ("grounding", LM_CFG)])
def test_forward_equals_the_program(kind, cfg):
    batch = full_batch(kind)
    batch = batch if cfg.has_action else Batch(batch.vlm)
    extra = masked_scores(cfg, batch) + (position_resize(cfg) if cfg.has_action else 0)
    assert model_flops(cfg, batch, REPEATS, {})["total"] + extra == traced(cfg, batch, False)


@pytest.mark.parametrize("kind,cfg", [("robot", CFG), ("grounding", LM_CFG)])
def test_update_equals_the_program(kind, cfg):
    """Three times forward, less the gradients of inputs that have none; no rematerialisation."""
    batch = full_batch(kind)
    batch = batch if cfg.has_action else Batch(batch.vlm)
    found = model_flops(cfg, batch, REPEATS)
    assert found["total"] == 3 * model_flops(cfg, batch, REPEATS, {})["total"]
    patches = batch.vlm.patch_image.size
    no_input_gradient = 2 * patches * 588 * cfg.vision.hidden_size
    extra = 3 * masked_scores(cfg, batch)
    if cfg.has_action:
        samples, views = batch.action.valid.size, batch.action.view_mask.size
        dino, dit, state = cfg.dino, cfg.dit, cfg.bridge
        no_input_gradient += 2 * views * dino.tokens_per_view * 588 * dino.hidden_size
        no_input_gradient += 2 * samples * state.state_dim * state.state_hidden_size
        per_draw = dit.frequency_size + dit.chunk * dit.action_dim
        no_input_gradient += 2 * samples * REPEATS * per_draw * dit.hidden_size
        extra += 2 * position_resize(cfg)  # its weights are constants
    # The next-token loss computes its logits again (losses.py), with or without rematerialisation.
    extra += batch.vlm.targets.size * 2 * cfg.text.hidden_size * cfg.text.vocab_size
    assert found["total"] - no_input_gradient + extra == pytest.approx(
        traced(cfg, batch, True), rel=1e-9
    )


def test_program_with_rematerialisation_is_most_of_a_forward_pass_dearer():
    """Most: the last product of a block is not needed again."""
    batch = Batch(full_batch("grounding").vlm)
    plain, full = (traced(LM_CFG, batch, True, remat) for remat in ("none", "full"))
    forward = traced(LM_CFG, batch, False)
    assert 0.6 * forward < full - plain < forward


def test_padding_and_packing_cost_nothing():
    """A packed, padded batch needs what its samples need alone."""
    rows = tiny_rows(CFG, 2)
    packed = model_flops(CFG, jax.tree.map(np.asarray, tiny_batch(CFG)), REPEATS)
    alone = [
        model_flops(
            CFG, pack([[s]], Capacity.fit([[s]], 64), pad_id=0, like=rows[0][0][1]), REPEATS
        )
        for row in rows
        for s in row
    ]
    assert packed.keys() == {*flops.PARTS, "total"}
    for part, count in packed.items():
        assert count == pytest.approx(sum(one[part] for one in alone), rel=1e-12) and count > 0


def test_closed_form_of_the_language_model():
    """6 FLOPs a parameter and token, and 12 a layer, width and pair (PaLM, appendix B)."""
    batch = Batch(full_batch("grounding").vlm)
    c = LM_CFG.text
    model = ST4VLA(LM_CFG)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0)))["vlm"]["language_model"]
    kernels = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(shapes["blocks"])
        if path[-1].key == "kernel"
    )
    rows, length = batch.vlm.tokens.shape
    pairs = rows * length * (length + 1) / 2
    expected = 6 * kernels * rows * length
    expected += 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    found = model_flops(LM_CFG, batch, REPEATS)
    assert found["text"] == expected
    assert found["head"] == 6 * batch.vlm.targets.size * c.hidden_size * c.vocab_size


def test_paper_size_by_hand():
    """The decoder of 3B: 2.774e9 multiplied parameters, 6 FLOPs each a token."""
    cfg = model_config("3b", None, None)
    tokens = 64
    vlm = full_batch("grounding").vlm
    wide = dataclasses.replace(
        vlm, segment_ids=np.ones((1, tokens), np.int32), target_weight=np.zeros((1, 0), np.float32)
    )
    per_layer = 2048 * (2048 + 2 * 256 + 2048 + 3 * 11_008)
    pairs = tokens * (tokens + 1) // 2
    expected = 6 * 36 * per_layer * tokens + 12 * 36 * 2048 * pairs
    assert model_flops(cfg, Batch(wide), 1)["text"] == expected


def test_frozen_parts():
    batch = full_batch("robot")
    forward = model_flops(CFG, batch, REPEATS, {})
    only_dit = model_flops(CFG, batch, REPEATS, {"dit": 1.0})
    assert only_dit["dit"] == 3 * forward["dit"]
    for part in ("vision", "text", "dino", "bridge"):
        assert only_dit[part] == forward[part]
    vision = model_flops(CFG, batch, REPEATS, {"vision": 1.0})
    # The gradient passes through what reads the vision tower, and not through DINOv2.
    work = flops.text_work(CFG, batch.vlm)["text"]
    assert vision["text"] == 2 * work.kernels + 3 * work.scores
    assert vision["dino"] == forward["dino"] and vision["vision"] == 3 * forward["vision"]


def test_frozen_parts_equal_the_program():
    """The bridge and the DiT trained alone: nothing of the rest is differentiated."""
    batch = full_batch("robot")
    batch = batch.replace(
        vlm=dataclasses.replace(
            batch.vlm,
            **{name: getattr(batch.vlm, name)[:, :0]
               for name in ("target_index", "targets", "target_weight", "target_group")},
        )
    )  # fmt: skip
    model = ST4VLA(CFG, dataclasses.replace(FLOAT32, remat="none"))
    params = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    own = {part: params.pop(part) for part in ("bridge", "dit")}

    def loss(own, rest, batch):
        draws = model.draw(jax.random.key(0), batch, REPEATS, train=False)
        return model.loss(own | rest, batch, draws, Denominators.of(batch, REPEATS))[0]

    program = jaxpr_flops(jax.make_jaxpr(jax.grad(loss))(own, params, batch))
    found = model_flops(CFG, batch, REPEATS, {"bridge": 1.0, "dit": 1.0})["total"]
    extra = masked_scores(CFG, batch) + position_resize(CFG)
    # Inputs of the bridge and the DiT that need no gradient: hidden states, DINO tokens, state,
    # noisy actions and timesteps.
    b, dit, width = CFG.bridge, CFG.dit, CFG.text.hidden_size
    tokens = batch.action.token_mask.sum()
    dino_tokens = batch.action.view_mask.sum() * CFG.dino.tokens_per_view
    none = 2 * width * (tokens * b.hidden_size + dino_tokens * CFG.dino.hidden_size)
    none += 2 * batch.action.valid.size * b.state_dim * b.state_hidden_size
    per_draw = dit.frequency_size + dit.chunk * dit.action_dim
    none += 2 * batch.action.valid.size * REPEATS * per_draw * dit.hidden_size
    assert found + extra - none == pytest.approx(program, rel=1e-9)


def test_trainable_shares():
    trainable = {"vlm/visual/a/kernel": 30, "dit/x": 5, "vlm/language_model/lora/a": 1}
    frozen = {"vlm/visual/b/kernel": 10, "bridge/y": 4, "vlm/language_model/b/kernel": 99}
    found = flops.trainable_shares(CFG, trainable, frozen)
    assert found == {
        "vision": 0.75, "text": 0.01, "head": 0.0, "dino": 0.0, "bridge": 0.0, "dit": 1.0
    }  # fmt: skip
    table = {"vlm/language_model/embed_tokens/embedding": 3}
    assert flops.trainable_shares(CFG, table, {})["head"] == 1.0
    untied = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, tie_word_embeddings=False))
    assert flops.trainable_shares(untied, {"vlm/lm_head/embedding": 3}, {})["head"] == 1.0


# --- Programs -----------------------------------------------------------------------------------

X, W = jnp.zeros((6, 4)), jnp.zeros((4, 4))
ONE = 2 * 6 * 4 * 4


def scanned(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]


@jax.custom_vjp
def squared(x, w):
    return x @ w


squared.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g @ r[1]))


@pytest.mark.parametrize(
    "fn,expected",
    [
        (lambda x, w: x @ w, ONE),
        (scanned, 7 * ONE),
        (jax.jit(scanned), 7 * ONE),
        (lambda x, w: jax.lax.fori_loop(0, 5, lambda i, c: scanned(c, w), x), 35 * ONE),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, scanned, lambda x, w: x @ w, x, w), 7 * ONE),
        (lambda x, w: jax.vmap(jnp.dot, (0, None))(x, w), ONE),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x[None], w[None]), ONE),
        (lambda x, w: jax.grad(lambda w: scanned(x, w).sum())(w), 21 * ONE),
        (lambda x, w: jax.grad(lambda w: jnp.sin(jnp.sin(x @ w) @ w).sum())(w), 5 * ONE),
        (squared, ONE),
        (lambda x, w: jax.grad(lambda w: squared(x, w).sum())(w), 3 * ONE + 2 * 4 * 4 * 4),
    ],
)  # fmt: skip
def test_program(fn, expected):
    assert jaxpr_flops(jax.make_jaxpr(fn)(X, W)) == expected


def test_remat_counts_what_is_done_twice():
    def loss(x, w, wrap):
        return wrap(lambda x: jnp.sin(jnp.sin(x @ w) @ w) @ w)(x).sum()

    plain, again = (
        jaxpr_flops(jax.make_jaxpr(jax.grad(lambda w, f=f: loss(X, w, f)))(W))
        for f in (lambda f: f, jax.checkpoint)
    )
    # Forward 3, backward 5 (the first input needs none), and the first two products once more.
    assert plain == 8 * ONE and again == 10 * ONE


def test_convolutions():
    x, k = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 3, 10))
    fn = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert jaxpr_flops(jax.make_jaxpr(fn)(x, k)) == 2 * (2 * 8 * 8 * 10) * (3 * 3 * 3)


def test_shards_are_all_counted():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    fn = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    assert jaxpr_flops(jax.make_jaxpr(fn)(jnp.zeros((8, 4)), W)) == 2 * 8 * 4 * 4


def kernel_call(estimate):
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    return pl.pallas_call(
        kernel, grid=(3,), out_shape=jax.ShapeDtypeStruct((6, 4), jnp.float32), name="mine",
        in_specs=[pl.BlockSpec((2, 4), lambda i: (i, 0)), pl.BlockSpec((4, 4), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((2, 4), lambda i: (i, 0)), cost_estimate=estimate, interpret=True,
    )  # fmt: skip


def test_pallas_kernels():
    estimate = pl.CostEstimate(flops=123, bytes_accessed=1, transcendentals=0)
    assert jaxpr_flops(jax.make_jaxpr(kernel_call(estimate))(X, W)) == 123
    program = jax.make_jaxpr(kernel_call(None))(X, W)
    assert jaxpr_flops(program) == ONE
    assert jaxpr_flops(program, kernels={"mine": lambda eqn: 5}) == 5


def test_what_cannot_be_counted_is_refused():
    def fn(x, w):
        done = jax.lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (c[0] @ c[1], c[1]), (x, w))
        return jax.pure_callback(np.sin, x, done[0])

    program = jax.make_jaxpr(fn)(X, W)
    with pytest.raises(FlopsError, match="while loop with 192 FLOPs(.|\\n)*pure_callback") as error:
        jaxpr_flops(program)
    assert str(error.value).count("\n") == 2
    counted = jaxpr_flops(program, while_trips=3, kernels={"pure_callback": lambda eqn: 0.0})
    assert counted == 3 * ONE
    idle = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, jnp.sin, x))(X)
    assert jaxpr_flops(idle) == 0


def test_mfu():
    def devices(*kinds):
        return [SimpleNamespace(device_kind=kind) for kind in kinds]

    assert flops.mfu(1.97e14, devices("TPU v5 lite", "TPU v5 lite")) == pytest.approx(0.5)
    assert flops.mfu(1e14, devices("TPU v4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None
    assert flops.mfu(1e14, jax.local_devices()) is None and flops.mfu(1e14, []) is None
