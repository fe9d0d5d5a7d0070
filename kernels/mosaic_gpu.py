"""The one place where releases of JAX differ for Mosaic GPU kernels."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


def kernel(
    body: Callable[..., None], *, cost_estimate: pl.CostEstimate, **options: Any
) -> Callable[..., Any]:
    """``plgpu.kernel`` with a cost estimate, which JAX before 0.11 does not take for these."""
    make = functools.partial(plgpu.kernel, body, **options)
    return make(cost_estimate=cost_estimate) if _TAKES_COST else make()


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """Loads a whole reference into registers; ``optimized`` forbids bank conflicts."""
    # 0.10.2 takes an index before the options.
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)
