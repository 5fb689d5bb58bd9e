"""Rules raise on what Flax would replicate in silence; layouts reach the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from st4vla_jax.chips import TopologyError, parse_slice, slice_devices
from st4vla_jax.sharding import Axes, Rules, ShardingError, constrain, make_mesh, param_shardings

RULES = Rules()


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_spec_of_names():
    assert RULES.spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert RULES.spec(("batch", None)) == P(("data", "fsdp"), None)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ShardingError, match="'embd'; did you mean 'embed'"):
        RULES.spec(("embd",))
    with pytest.raises(ShardingError, match="unknown logical axis"):
        RULES.replace(head="tensor")


def test_collision_raises():
    with pytest.raises(ShardingError, match="both want mesh axis 'tensor'"):
        RULES.spec(("heads", "mlp"))


def test_replace_leaves_the_original_alone():
    other = RULES.replace(kv_heads="tensor", dino_embed=None)
    assert other.spec(("kv_heads",)) == P("tensor")
    assert RULES.spec(("kv_heads",)) == P(None)
    assert hash(other) != hash(RULES)


def test_param_shardings_lists_every_problem():
    tree = {
        "a": {"kernel": Axes(struct(6, 3), ("embed", "mlp"))},
        "b": Axes(struct(4, 4), ("embed", "nonsense")),
        "c": struct(4),
    }
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    with pytest.raises(ShardingError) as e:
        param_shardings(tree, mesh, RULES)
    text = str(e.value)
    assert "a/kernel: axis 'embed' of size 6 is not divisible by 4" in text
    assert "a/kernel: axis 'mlp' of size 3 is not divisible by 2" in text
    assert "b: unknown logical axis 'nonsense'" in text
    assert "c: has no logical axis names" in text


def test_mesh_must_use_all_devices():
    with pytest.raises(ShardingError, match="needs 6 devices, there are 8"):
        make_mesh(data=3, fsdp=2)


@pytest.mark.aot
def test_mesh_goes_host_by_host_and_slice_by_slice():
    """Whatever the order of the devices: only the data axis may cross slices."""
    try:
        devices = slice_devices(parse_slice("v5e:4x4", 2))
    except TopologyError as error:
        pytest.skip(str(error))
    mesh = make_mesh(4, 4, 2, devices=sorted(devices, key=lambda d: d.coords))
    hosts = [d.process_index for d in mesh.devices.flat]
    assert hosts == sorted(hosts) and len(set(hosts)) == 8
    assert [{d.slice_index for d in block.flat} for block in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_constraint_reaches_the_program_under_set_mesh_only():
    def f(x):
        return constrain(x * 2, RULES, "batch", "act_mlp")

    x = jnp.ones((8, 4))
    assert "sharding_constraint" not in jax.jit(f).lower(x).as_text()
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert "sharding_constraint" in jax.jit(f).lower(x).as_text()
        assert jax.jit(f)(x).sharding.spec == P(("data", "fsdp"), "tensor")


def test_constraint_checks_rank_and_names_without_a_mesh():
    with pytest.raises(ShardingError, match="2 names"):
        constrain(jnp.ones(3), RULES, "batch", "act_seq")
    with pytest.raises(ShardingError, match="unknown"):
        constrain(jnp.ones(3), RULES, "act_sequence")
