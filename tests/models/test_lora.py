"""Adapters: they start as nothing, every one is used, only they are trained, and they fold away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.adapters import param_shapes, read_leaf
from st4vla_jax.checkpoint import Meta, write_checkpoint
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.data.prompts import PromptConfig
from st4vla_jax.models.lora import LoraTarget, add_lora, lora_problems, merge_lora
from st4vla_jax.models.st4vla import Denominators
from st4vla_jax.optim import Group, OptimConfig, Optimizer, coverage_problems
from st4vla_jax.sharding import Axes, Rules, make_mesh, param_shardings, unbox
from st4vla_jax.state import leaves_by_path, map_with_path, merge, split
from tests.reference.policy import random_params, tiny_batch, tiny_policy

RANK = 3
ALL = {"all": LoraTarget(".*", RANK)}
ATTENTION = "vlm/language_model/blocks/self_attn/[qkvo]_proj"


def is_adapter(path):
    return path.endswith(("lora_a", "lora_b"))


def by_path(tree):
    return dict(leaves_by_path(tree))


@pytest.fixture(scope="module")
def model():
    return tiny_policy()


@pytest.fixture(scope="module")
def boxed(model):
    """Random numbers in every parameter, in their boxes."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    is_box = lambda x: isinstance(x, Axes)  # noqa: E731
    return jax.tree.map(
        lambda box, value: box.replace_boxed(value), shapes, random_params(model), is_leaf=is_box
    )


@pytest.fixture(scope="module")
def fresh(boxed):
    return unbox(add_lora(boxed, ALL, jax.random.key(1)))


@pytest.fixture(scope="module")
def trained(fresh):
    """Numbers in every adapter, as after training."""
    rng = np.random.default_rng(3)

    def fill(path, leaf):
        new = jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))
        return new if is_adapter(path) else leaf

    return map_with_path(fill, fresh)


@pytest.fixture(scope="module")
def loss(model):
    """Parameters to the loss of one batch with fixed draws."""
    batch = tiny_batch(model.cfg, rows=1)
    draws = jax.jit(model.draw, static_argnums=2)(jax.random.key(5), batch, 1)
    denominators = Denominators.of(batch, 1)
    fn = jax.jit(lambda params: model.loss(params, batch, draws, denominators)[0])
    return lambda params: float(fn(params))


def test_it_starts_as_the_model(loss, boxed, fresh):
    assert loss(fresh) == pytest.approx(loss(unbox(boxed)), rel=1e-6)
    for path, leaf in leaves_by_path(fresh):
        if path.endswith("lora_b"):
            assert not leaf.any(), path
        if path.endswith("lora_a"):
            fan_in = leaf.size / RANK / (leaf.shape[0] if "/blocks/" in path else 1)
            assert 0.5 < np.abs(leaf).max() * np.sqrt(fan_in) <= 1, path


def test_every_adapter_is_used(loss, trained):
    """One beside a kernel that is no `Linear`'s would never be read."""
    whole = loss(trained)
    found = [path for path in by_path(trained) if path.endswith("lora_b")]
    without = {
        path: loss(map_with_path(lambda p, x, path=path: 0 * x if p == path else x, trained))
        for path in found
    }
    assert not [path for path, value in without.items() if value == whole]
    assert len(found) == 33 and all(map(np.isfinite, without.values()))


def test_folded_it_is_the_same_function(loss, boxed, trained):
    merged = merge_lora(trained)
    assert by_path(merged).keys() == by_path(unbox(boxed)).keys()
    assert loss(merged) == pytest.approx(loss(trained), rel=1e-5)
    assert abs(loss(unbox(boxed)) / loss(merged) - 1) > 1e-2


def test_folding_is_a_sum_of_products(trained):
    """Against einsum, for one input axis, two of them, and no stack of layers."""
    old, new = by_path(trained), by_path(merge_lora(trained))
    for path, equation in (
        ("vlm/language_model/blocks/self_attn/q_proj", "lir,lrnh->linh"),
        ("vlm/language_model/blocks/self_attn/o_proj", "lnhr,lro->lnho"),
        ("dit/x_embedder", "ir,ro->io"),
    ):
        kernel, a, b = (old[f"{path}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
        want = kernel + np.einsum(equation, np.float64(a), np.float64(b))
        np.testing.assert_allclose(new[f"{path}/kernel"], want, rtol=0, atol=1e-6, err_msg=path)


def test_converters_fold_what_is_stored(tmp_path, model, trained):
    meta = Meta(model.cfg, PromptConfig(), ImageConfig(), ActionSpec())
    some = jax.device_get({"dit": trained["dit"]})
    write_checkpoint(tmp_path / "c", leaves_by_path(some), meta, {})
    merged = by_path(merge_lora(some))
    shapes = param_shapes(tmp_path / "c")
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        path: leaf.shape for path, leaf in merged.items()
    }
    for path, leaf in merged.items():
        np.testing.assert_allclose(read_leaf(tmp_path / "c", path), leaf, atol=1e-6, err_msg=path)


def test_frozen_but_for_adapters(boxed):
    """The optimizer's table takes adapters by a longer pattern than their module's."""
    targets = {"attention": LoraTarget(ATTENTION, 2)}
    params = unbox(add_lora(boxed, targets, jax.random.key(1)))
    adapters = {path for path, _ in leaves_by_path(params) if is_adapter(path)}
    assert adapters == {
        f"vlm/language_model/blocks/self_attn/{name}_proj/lora_{side}"
        for name in "qkvo"
        for side in "ab"
    }
    groups = {
        "vlm": Group("vlm/", freeze=True),
        "adapters": Group("vlm/.*/lora_[ab]$", lr=1e-3),
        "rest": Group("(dino|bridge|dit)/", lr=1e-3),
    }
    assert not coverage_problems(list(by_path(params)), groups)
    optimizer = Optimizer(OptimConfig(groups), 10)
    trainable, frozen = split(params, optimizer.is_trainable)
    assert {path for path in by_path(trainable) if path.startswith("vlm/")} == adapters
    assert not any(is_adapter(path) for path in by_path(frozen))
    assert by_path(merge(trainable, frozen)).keys() == by_path(params).keys()


def test_each_lies_as_its_kernel(boxed):
    """Inputs and outputs are sharded as the kernel's; the rank is whole."""
    with_lora = add_lora(boxed, {"attention": LoraTarget(ATTENTION, 2)}, jax.random.key(1))
    specs = {
        path: tuple(sharding.spec)
        for path, sharding in leaves_by_path(
            param_shardings(with_lora, make_mesh(2, 2, 2), Rules())
        )
    }
    module = "vlm/language_model/blocks/self_attn/"
    assert specs[module + "q_proj/kernel"] == (None, "fsdp", "tensor", None)
    assert specs[module + "q_proj/lora_a"] == (None, "fsdp", None)
    assert specs[module + "q_proj/lora_b"] == (None, None, "tensor", None)
    assert specs[module + "o_proj/lora_a"] == (None, "tensor", None, None)
    assert specs[module + "o_proj/lora_b"] == (None, None, "fsdp")


def test_an_adapter_does_not_depend_on_the_others(boxed, fresh):
    alone = unbox(add_lora(boxed, {"dit": LoraTarget("dit/x_embedder", RANK)}, jax.random.key(1)))
    path = "dit/x_embedder/lora_a"
    assert np.array_equal(by_path(alone)[path], by_path(fresh)[path])


def test_patterns_that_do_not_fit_are_named(boxed):
    targets = {
        "part": LoraTarget("vlm/language_model"),
        "patches": LoraTarget("vlm/visual/patch_embed/proj"),
        "attention": LoraTarget(ATTENTION),
        "queries": LoraTarget(".*/q_proj"),
    }
    assert lora_problems(boxed, targets) == [
        "lora.part: 'vlm/language_model' is no path of a kernel",
        "lora.patches: 'vlm/visual/patch_embed/proj' is no path of a kernel",
        f"lora: attention and queries both choose {ATTENTION.replace('[qkvo]', 'q')}",
    ]
    assert not lora_problems(boxed, {"queries": targets["queries"]})
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        LoraTarget("x", 0)
    with pytest.raises(ValueError, match=r"pattern '\[': "):
        LoraTarget("[")
