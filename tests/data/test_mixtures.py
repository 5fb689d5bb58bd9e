"""Mixtures, and the registry against the table that it was written from."""

import logging
import re

import pytest

from st4vla_jax.data.mixtures import FROM_MEMORY, MIXTURES, mixture, shares
from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.robot_spec import SpecError

EXTERNAL = re.compile(r"(hydra|buds|franka_play|furniture|ucsd|sailor|sirius|edan|iamlab)")
# Rows that stand for sets of other names: shortened with a star, or two in one.
NAMES = {"stanford_hydra_*": "stanford_hydra_dataset", "austin_buds_*": "austin_buds_dataset",
         "nyu_franka_play_*": "nyu_franka_play_dataset", "ucsd_kitchen_*": "ucsd_kitchen_dataset",
         "furniture_bench_*": "furniture_bench_dataset", "austin_sailor_*": "austin_sailor_dataset",
         "austin_sirius_*": "austin_sirius_dataset",
         "dlr_edan_shared_control_*": "dlr_edan_shared_control",
         "iamlab_cmu_pickup_insert_*": "iamlab_cmu_pickup_insert"}  # fmt: skip


def table(shared):
    """(name, weight or None, image columns P/S/W, Hz) of each row of spec data.md section 5."""
    text = (shared / "spec/data.md").read_text()
    text = text[text.index("| dataset (w = openvla") : text.index("`*` = `_dataset_converted")]
    for line in text.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.sub(r"\(.*", "", cells[0]).strip()
        weights = re.findall(r"\d+\.\d+", re.sub(r"v\d.*", "", cells[0].partition("(")[2]))
        images = re.sub(r"\(.*?\)|;.*", "", cells[3]).split("/")
        images = [image.strip() for image in images]
        if images[1:2] == ["_2_left"]:
            images[1] = "exterior_image_2_left"
        first = names.split("_")[0]
        for number, name in enumerate(names.split(" / ")):
            name = name if name.startswith(first) or not number else f"{first}_{name}"
            weight = float(weights[number]) if weights else None
            yield NAMES.get(name, name), weight, images, float(cells[5])


def test_registry_equals_the_table(shared):
    rows = list(table(shared))
    assert len(rows) == 28
    plus = mixture("oxe_magic_soup_plus")
    for name, weight, images, hz in rows:
        full = f"{name}_converted_externally_to_rlds" if EXTERNAL.search(name) else name
        spec = SPECS[full]
        assert spec.control_hz == hz, name
        found = [spec.images.get(v, "-").split("/")[-1] for v in ("primary", "secondary", "wrist")]
        assert found == (images + ["-"] * 3)[:3], name
        assert (weight is None) == (full not in plus), name
        if weight is not None:
            digits = len(str(weight).partition(".")[2])
            assert round(plus[full], digits) == weight, name
    assert len(plus) == sum(weight is not None for _, weight, *_ in rows) == 27


def test_mixtures():
    assert {name: len(mixture(name)) for name in ("rtx", "oxe_magic_soup")} == {
        "rtx": 10,
        "oxe_magic_soup": 23,
    }
    assert len(mixture("oxe_magic_soup_plus")) == 27
    assert len(mixture("oxe_magic_soup_plus_minus")) == 25
    for name, weights in MIXTURES.items():
        assert set(weights) <= set(SPECS), name
        assert sum(shares(weights, {}).values()) == pytest.approx(1)
    assert shares(mixture("bridge_rt_1"), {}) == {"bridge_orig": 0.5, "fractal20220817_data": 0.5}
    assert mixture("oxe_magic_soup_plus")["droid"] == 0.06
    assert mixture("oxe_magic_soup_plus_minus")["fractal20220817_data"] == 1.0
    assert set(mixture("libero_all")) == {n for n in SPECS if n.startswith("libero")}
    with pytest.raises(SpecError, match="did you mean 'bridge_rt_1'"):
        mixture("bridge_rt1")


def test_shares_by_weight_and_size():
    weights, sizes = {"a": 2.0, "b": 1.0}, {"a": 100, "b": 400}
    assert shares(weights, sizes) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert shares(weights, sizes, 1) == pytest.approx({"a": 200 / 600, "b": 400 / 600})
    assert shares(weights, sizes, 0.5) == pytest.approx({"a": 0.5, "b": 0.5})
    with pytest.raises(SpecError) as error:
        shares({"a": 0.0, "b": 1.0, "c": float("nan")}, {"a": 1}, 1)
    for text in ("a: weight 0.0", "c: weight nan", "b: needs a size"):
        assert text in str(error.value)
    with pytest.raises(SpecError, match="empty"):
        shares({}, {})


def test_what_is_from_memory_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        for name in MIXTURES:
            mixture(name)
    assert len(caplog.records) == len(FROM_MEMORY) and set(FROM_MEMORY) <= set(MIXTURES)
    assert "rtx: from memory is its members and their weights" in caplog.text
    soup, plus = MIXTURES["oxe_magic_soup"], MIXTURES["oxe_magic_soup_plus"]
    assert all(plus[name] == weight for name, weight in soup.items())
