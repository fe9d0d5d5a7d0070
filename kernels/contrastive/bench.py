"""Memory and time of the contrastive losses against optax (``repalign bench contrastive``)."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from repalign.kernels.contrastive import api
from repalign.kernels.contrastive.specs import SHAPES

TEMPERATURE = 0.1


def _optax_nt_xent(views: Array) -> Array:
    import optax

    half = len(views) // 2
    return optax.losses.ntxent(views, jnp.tile(jnp.arange(half), 2), TEMPERATURE)


def _nt_xent(implementation: str) -> Callable[[Array], Array]:
    def loss(views: Array) -> Array:
        half, ids = len(views) // 2, jnp.arange(len(views))
        views = views / jnp.linalg.norm(views, axis=1, keepdims=True)
        total = api.log_sum_exp(
            views, views, scale=1 / TEMPERATURE, exclude=(ids, ids), implementation=implementation
        )
        return (
            jnp.mean(total) - jnp.mean(jnp.sum(views[:half] * views[half:], axis=1)) / TEMPERATURE
        )

    return loss


LOSSES = {
    "nt_xent/reference": _nt_xent("reference"),
    "nt_xent/xla": _nt_xent("xla"),
    "optax.losses.ntxent": _optax_nt_xent,
}


def run(
    shapes: Iterable[str] = ("simclr_512",),
    *,
    repeats: int = 5,
    execute_up_to: int = 8192,
) -> list[dict[str, Any]]:
    """Measures value and gradient of NT-Xent at named shapes.

    Args:
        shapes: names in ``specs.SHAPES``.
        repeats: timed calls after one to warm up.
        execute_up_to: shapes with more rows are compiled for their memory only.

    Returns:
        One row per shape and loss: device, jax version, shape, rows, dim, loss, temporary bytes
        from the compiler, and the median and spread (largest - smallest) of the
        seconds of one call, None
        where it was not run.

    Raises:
        KeyError: a name that is not in ``specs.SHAPES``.
    """
    rows = []
    for name in shapes:
        shape = SHAPES[name]
        count = 2 * shape.examples
        for loss_name, loss in LOSSES.items():
            abstract = jax.ShapeDtypeStruct((count, shape.dim), jnp.float32)
            compiled = jax.jit(jax.value_and_grad(loss)).lower(abstract).compile()
            seconds = []
            if count <= execute_up_to:
                views = jax.random.normal(jax.random.key(0), abstract.shape)
                jax.block_until_ready(compiled(views))
                for _ in range(repeats):
                    start = time.perf_counter()
                    jax.block_until_ready(compiled(views))
                    seconds.append(time.perf_counter() - start)
            rows.append(
                {
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    "shape": name,
                    "rows": count,
                    "dim": shape.dim,
                    "loss": loss_name,
                    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "seconds": statistics.median(seconds) if seconds else None,
                    "spread": max(seconds) - min(seconds) if seconds else None,
                }
            )
    return rows
