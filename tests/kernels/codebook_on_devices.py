"""Run on 8 simulated devices by test_codebook_sharded.py: prints what differs from one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from repalign.kernels import codebook as kernel
from repalign.kernels.codebook import sharded

MESH = jax.make_mesh((2, 4), ("tokens", "codes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
AXES = {"mesh": MESH, "vectors_axis": "tokens", "codes_axis": "codes"}

random = np.random.default_rng(0)
z = jnp.asarray(random.normal(size=(64, 6)) + 3.0, jnp.float32)
z = z.at[5, 1].set(jnp.nan)
half = jnp.asarray(random.normal(size=(64, 6)) + 3.0, jnp.float32)
# Every code of the first two slices once more in the last two, in another order; one is broken.
codebook = jnp.concatenate([half, half[::-1]]).at[9].set(jnp.inf)
clean = jnp.where(jnp.isfinite(codebook), codebook, 0.0)
log_weights = jnp.asarray(random.normal(size=128), jnp.float32)
measured = {}


def same(name, actual, expected):
    measured[name] = bool(np.array_equal(actual, expected))


def close(name, actual, expected):
    for i, (a, b) in enumerate(
        zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ):
        error = np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)
        measured[f"{name} {i}"] = bool(error <= 2e-6)


for distance in ("euclidean", "cosine"):
    expected = kernel.nearest_codes(z, codebook, distance=distance)
    for name, axes in {
        "both": AXES,
        "codes": {"mesh": MESH, "codes_axis": "codes"},
        "vectors": {"mesh": MESH, "vectors_axis": "tokens"},
    }.items():
        actual = sharded.nearest_codes(z, codebook, distance=distance, **axes)
        same(f"nearest {distance} {name}", actual, expected)
# Of a code and its copy the one in the earlier slice; code 118 is the broken one's copy.
chosen = set(np.asarray(expected).tolist())
measured["ties stay in the first slices"] = all(code < 64 or code == 118 for code in chosen)
# 40 places out of slices of 32 codes.
same(
    "top_k",
    sharded.top_k_codes(z, codebook, k=40, **AXES),
    kernel.top_k_codes(z, codebook, k=40),
)

found = jnp.where(jnp.arange(64) % 7 == 0, -1, random.integers(0, 128, 64))
statistics = sharded.code_statistics(z, found, 128, where=jnp.arange(64) != 5, **AXES)
close("statistics", statistics, kernel.code_statistics(z, found, 128, where=jnp.arange(64) != 5))

finite = jnp.where(jnp.isfinite(z), z, 0.0)


def loss(assign):
    def function(z, codebook, temperature, log_weights):
        assignment = assign(z, codebook, temperature=temperature, log_weights=log_weights)
        return jnp.mean(jnp.square(assignment.log_normalizer)) + jnp.sum(
            jnp.sin(assignment.mean_code)
        )

    return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3)))


operands = (finite, clean, 0.7, log_weights)
on_mesh = loss(lambda *a, **k: sharded.soft_assignment(*a, **AXES, **k))(*operands)
close("soft assignment and its gradients", on_mesh, loss(kernel.soft_assignment)(*operands))
print(json.dumps(measured))
