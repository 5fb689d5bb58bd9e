"""AdamW by path against torch.optim, schedules against transformers, coverage of the table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from st4vla_jax.config import ConfigError
from st4vla_jax.optim import (
    Group,
    OptimConfig,
    Optimizer,
    coverage_problems,
    group_of,
    matrix_of,
    orthogonal,
)
from st4vla_jax.state import leaves_by_path, merge, split
from st4vla_jax.train_step import init_train_state

STEPS = 40
CONFIG = OptimConfig(
    {
        "vlm": Group("vlm/", lr=3e-3, weight_decay=0.1),
        "norms": Group(".*/scale", lr=1e-2, schedule="constant"),
        "dit": Group("dit/", lr=2e-2, weight_decay=0.01, warmup=2, min_ratio=0.1),
        "frozen": Group("dino/", freeze=True),
    },
    warmup=5,
    clip=0.7,
)


def parameters(seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {
        "vlm": {"q": {"kernel": (4, 3)}, "norm": {"scale": (3,)}},
        "dit": {"kernel": (5,)},
        "dino": {"kernel": (2, 2)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32),
        shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


def run(config: OptimConfig, updates: int):
    """(parameters, moments, norms) after updates with gradients drawn by number."""
    optimizer = Optimizer(config, STEPS)
    trainable, frozen = split(parameters(), optimizer.is_trainable)
    state = init_train_state(trainable, optimizer, frozen)
    params, moments, norms = state.params, state.opt_state, []
    for step in range(updates):
        grads = split(parameters(100 + step), optimizer.is_trainable)[0]
        norm = optax.global_norm(grads)
        params, moments = optimizer.update(grads, norm, moments, params, jnp.int32(step))
        norms.append(float(norm))
    return params, moments, norms, frozen


@pytest.mark.parity
def test_updates_equal_torch_adamw_with_clip_and_schedules():
    import torch
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    params, moments, norms, frozen = run(CONFIG, 20)
    start = dict(leaves_by_path(parameters()))
    tensors = {p: torch.tensor(np.asarray(x), requires_grad=True) for p, x in start.items()}
    own = {path: group_of(path, CONFIG.groups) for path in start}
    assert own["vlm/norm/scale"] == "norms" and own["dino/kernel"] == "frozen"
    trained = [p for p in tensors if own[p] != "frozen"]
    optimizers, schedulers = [], []
    for name in ("vlm", "norms", "dit"):
        group = CONFIG.groups[name]
        adam = torch.optim.AdamW(
            [tensors[p] for p in trained if own[p] == name], lr=group.lr, betas=(0.9, 0.95),
            eps=1e-8, weight_decay=group.weight_decay,
        )  # fmt: skip
        optimizers.append(adam)
        warmup = 5 if group.warmup < 0 else group.warmup
        if group.schedule == "constant":
            schedulers.append(
                torch.optim.lr_scheduler.LambdaLR(adam, lambda s, w=warmup: min(1.0, s / w))
            )
        else:
            schedulers.append(
                get_cosine_with_min_lr_schedule_with_warmup(
                    adam, warmup, STEPS, min_lr_rate=group.min_ratio
                )
            )
    for step in range(20):
        grads = dict(leaves_by_path(parameters(100 + step)))
        for path in trained:
            tensors[path].grad = torch.tensor(np.asarray(grads[path]))
        norm = torch.nn.utils.clip_grad_norm_([tensors[p] for p in trained], 0.7)
        np.testing.assert_allclose(norms[step], float(norm), rtol=1e-6)
        for adam, scheduler in zip(optimizers, schedulers, strict=True):
            adam.step()
            scheduler.step()
    for path, value in leaves_by_path(params):
        np.testing.assert_allclose(value, tensors[path].detach(), rtol=0, atol=2e-6, err_msg=path)
    states = {p: adam.state[tensors[p]] for adam in optimizers for p in trained
              if tensors[p] in adam.state}  # fmt: skip
    for name, tree in (("exp_avg", moments.mu), ("exp_avg_sq", moments.nu)):
        for path, value in leaves_by_path(tree):
            np.testing.assert_allclose(value, states[path][name], rtol=1e-5, atol=1e-8)
    assert set(dict(leaves_by_path(frozen))) == {"dino/kernel"}


def test_schedule_closed_form():
    group = Group("", lr=2.0, min_ratio=0.25)
    rate = [float(group.learning_rate(s, 50, 10)) for s in (0, 5, 10, 30, 50, 70)]
    np.testing.assert_allclose(rate, [0, 1.0, 2.0, 2 * 0.625, 0.5, 0.5], rtol=1e-6)
    linear = dataclasses.replace(group, schedule="linear")
    np.testing.assert_allclose(float(linear.learning_rate(20, 50, 10)), 2 * 0.8125, rtol=1e-6)
    assert float(dataclasses.replace(group, warmup=0).learning_rate(0, 50, 10)) == 2.0


def test_moments_dtype():
    _, moments, _, _ = run(dataclasses.replace(CONFIG, mu_dtype="bfloat16"), 1)
    assert {x.dtype for x in jax.tree.leaves(moments.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}


def test_longest_match_owns_whatever_the_order():
    groups = {"all": Group("", lr=1.0), "vision": Group("vlm/visual/", lr=1.0),
              "vlm": Group("vlm/", lr=1.0)}  # fmt: skip
    assert group_of("vlm/visual/x", groups) == "vision"
    assert group_of("vlm/language_model/x", groups) == "vlm"
    assert group_of("dit/x", groups) == "all"


def test_every_problem_of_the_table_is_named():
    paths = ["vlm/a", "dit/b", "new/c"]
    groups = {"vlm": Group("vlm/", lr=1.0), "again": Group("vlm/", lr=1.0),
              "dit": Group("dit/", freeze=True), "none": Group("bridge/", lr=1.0)}  # fmt: skip
    text = "\n".join(coverage_problems(paths, groups))
    assert "no pattern matches parameter new/c" in text
    assert "vlm and again match equally much of parameter vlm/a" in text
    assert "optim.groups.none: 'bridge/' owns no parameter" in text
    frozen = coverage_problems(["dit/b"], {"dit": groups["dit"]})
    assert frozen == ["optim.groups: every parameter is frozen"]
    with pytest.raises(ConfigError, match="no pattern matches parameter new/c"):
        Optimizer(OptimConfig(groups), 1).is_trainable("new/c")


def test_split_and_merge_are_inverse():
    tree = parameters()
    chosen, others = split(tree, lambda path: path.startswith("vlm/q"))
    assert set(others) == {"vlm", "dit", "dino"} and list(chosen) == ["vlm"]
    back = dict(leaves_by_path(merge(chosen, others)))
    assert back.keys() == dict(leaves_by_path(tree)).keys()
    with pytest.raises(ValueError, match="both trainable and frozen"):
        merge(tree, chosen)


def muon(**kwargs):
    """The same table, with kernels of the VLM by Muon."""
    vlm = dataclasses.replace(CONFIG.groups["vlm"], rule="muon", **kwargs)
    return dataclasses.replace(CONFIG, groups=CONFIG.groups | {"vlm": vlm}, b1=0.95)


def newton_schulz(x):
    """Jordan's five quintic iterations, written out in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def test_muon_is_newton_schulz_of_nesterov_s_momentum():
    config = muon(schedule="constant", warmup=0)
    params, moments, norms, _ = run(config, 3)
    want = np.asarray(parameters()["vlm"]["q"]["kernel"], np.float64)
    momentum = np.zeros_like(want)
    for step, norm in enumerate(norms):
        grad = np.asarray(parameters(100 + step)["vlm"]["q"]["kernel"], np.float64)
        grad *= min(1.0, config.clip / norm)
        momentum = 0.95 * momentum + 0.05 * grad
        # Its transpose has the smaller side first, as the iterations want it.
        update = newton_schulz((0.95 * momentum + 0.05 * grad).T).T * 0.2 * np.sqrt(4)
        want -= 3e-3 * (update + 0.1 * want)
    np.testing.assert_allclose(params["vlm"]["q"]["kernel"], want, rtol=0, atol=1e-6)


@pytest.mark.parity
def test_muon_near_torch_s():
    """torch iterates in bfloat16, so after ten updates of 0.003 they agree to a tenth of one."""
    import torch

    config = dataclasses.replace(muon(schedule="constant", warmup=0), clip=0.0)
    params, *_ = run(config, 10)
    tensor = torch.tensor(np.asarray(parameters()["vlm"]["q"]["kernel"]), requires_grad=True)
    optimizer = torch.optim.Muon(
        [tensor], lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(10):
        tensor.grad = torch.tensor(np.asarray(parameters(100 + step)["vlm"]["q"]["kernel"]))
        optimizer.step()
    np.testing.assert_allclose(
        params["vlm"]["q"]["kernel"], tensor.detach().numpy(), rtol=0, atol=3e-4
    )


def test_what_is_no_kernel_stays_with_adam():
    adam = run(dataclasses.replace(CONFIG, b1=0.95), 5)
    params, moments, *_ = run(muon(), 5)
    for path, leaf in leaves_by_path(params):
        same = dict(leaves_by_path(adam[0]))[path]
        assert np.array_equal(leaf, same) == (path != "vlm/q/kernel"), path
    jax.tree.map(np.testing.assert_array_equal, moments, adam[1])  # one tree, one meaning


@pytest.mark.parametrize(
    ("path", "shape", "sides"),
    [
        ("vlm/blocks/q_proj/kernel", (2, 128, 4, 32), ((1,), (2, 3))),
        ("vlm/blocks/o_proj/kernel", (2, 4, 32, 128), ((1, 2), (3,))),
        ("vlm/blocks/qkv/kernel", (2, 96, 3, 4, 24), ((1,), (2, 3, 4))),
        ("vlm/patch_embed/proj/kernel", (2, 588, 96), ((0, 1), (2,))),
        ("dit/x_embedder/kernel", (7, 128), ((0,), (1,))),
        ("vlm/embed_tokens/embedding", (768, 128), None),
        ("vlm/blocks/q_proj/bias", (2, 4, 32), None),
        ("dit/kernel", (5,), None),
    ],
)
def test_kernels_as_matrices(path, shape, sides):
    found = matrix_of(path, shape)
    assert (found and (found.reduction_axis, found.output_axis)) == sides


def test_stacked_kernels_are_made_orthogonal_one_by_one():
    path, x = "a/blocks/q/kernel", jax.random.normal(jax.random.key(0), (3, 6, 2, 4))
    whole = orthogonal(x, matrix_of(path, x.shape))
    for block in range(3):
        want = newton_schulz(np.asarray(x[block], np.float64).reshape(6, 8)) * 0.2 * np.sqrt(8)
        np.testing.assert_allclose(whole[block].reshape(6, 8), want, rtol=0, atol=1e-5)
