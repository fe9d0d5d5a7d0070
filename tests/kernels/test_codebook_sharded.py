"""Codebook search on 8 simulated devices equals the one on one device, ties across slices too."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from simulated_devices import output

from repalign.kernels.codebook import sharded


def test_vectors_and_codes_may_be_split():
    script = pathlib.Path(__file__).with_name("codebook_on_devices.py")
    measured = json.loads(output(script, optimize=False))
    assert len(measured) == 15
    assert all(measured.values()), measured


def test_what_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((3,), ("x",))
    z, codebook = jnp.zeros((4, 2)), jnp.zeros((5, 2))
    with pytest.raises(ValueError, match="4 vectors do not divide over the 3 devices"):
        sharded.nearest_codes(z, codebook, mesh=mesh, vectors_axis="x")
    with pytest.raises(ValueError, match="5 codes do not divide"):
        sharded.soft_assignment(z, codebook, mesh=mesh, codes_axis="x")
    with pytest.raises(ValueError, match="number of codes"):
        sharded.top_k_codes(z, codebook, k=6, mesh=mesh)
