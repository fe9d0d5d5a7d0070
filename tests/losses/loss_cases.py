"""Every public loss as a function of two arrays [N, 8], for tests that hold of all of them.

The cases stand in cases_*.py, what a case is in case_table.py.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import cases_batch
import cases_contrastive
import cases_imitation
import jax
import jax.numpy as jnp
import numpy as np
from case_table import CASES as CASES
from case_table import WIDTH

import repalign.losses

ENTERED_BY = (cases_batch, cases_contrastive, cases_imitation)
"""Importing these modules fills `CASES`."""

# Public functions that are parts of losses or states of them, not losses.
PARTS = {
    "alignment": {"spatial_normalize"},
    "backward_compatibility": {"basis_transformation", "orthogonal_matrix", "simplex_classifier"},
    "batch_statistics": {
        "cholesky_factor",
        "centered",
        "covariance",
        "keep",
        "smaller_gram",
        "token_mean",
        "zero_masked",
    },
    "disentangle": {"permute_dimensions"},
    "generative": {"gaussian_log_density"},
    "hard_negatives": {"mix_hard_negatives"},
    "masked": {"inverse_block_masking", "random_masking"},
    "probabilistic": {"sample_von_mises_fisher"},
    "token_prediction": {"mask_tokens", "masked_share"},
    "uniformity": {"log_kernel_sums"},
    "visual_words": {"bag_of_visual_words", "draw_visual_words"},
    "whitening": {"cholesky_whiten", "iterative_whiten"},
}


def public_functions() -> dict[str, Callable]:
    """Returns every public function of the package's modules, as module.name."""
    found = {}
    for module in pkgutil.iter_modules(repalign.losses.__path__):
        loaded = importlib.import_module(f"repalign.losses.{module.name}")
        for name, value in vars(loaded).items():
            own = inspect.isfunction(value) and value.__module__ == loaded.__name__
            if own and not name.startswith("_"):
                found[f"{module.name}.{name}"] = value
    return found


def total(values, ids):
    """The sum of the values, weighted so that the gradient tells whose value is whose."""
    if values.ndim == 0:
        return values
    return jnp.sum(values.reshape(-1, len(ids)) * jnp.cos(ids.astype(values.dtype)))


def evaluate(cases, *, where=False):
    """Returns a function of (a, b, ids[, where]) to {name: (values, gradients of their sum)}."""

    def run(a, b, ids, *mask):
        mask = mask[0] if where else None
        results = {}
        for name, one_case in cases.items():

            def weighted(a, b, call=one_case.call):
                values = call(a, b, ids, mask)
                return total(values, ids), values

            (_, values), gradients = jax.value_and_grad(weighted, (0, 1), has_aux=True)(a, b)
            results[name] = values, gradients
        return results

    return run


# The programs are large and run once or twice: optimising them takes longer than running them.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # halves the time; later versions have no such choice
    QUICKLY["xla_cpu_use_fusion_emitters"] = False


def compiled(cases, count, *, dtype=jnp.float32, where=False):
    """The cases and their gradients as one compiled program for batches of ``count``."""
    shapes = [jax.ShapeDtypeStruct((count, WIDTH), dtype)] * 2
    shapes.append(jax.ShapeDtypeStruct((count,), jnp.int32))
    if where:
        shapes.append(jax.ShapeDtypeStruct((count,), jnp.bool_))
    return jax.jit(evaluate(cases, where=where)).lower(*shapes).compile(QUICKLY)


def batch(count, seed=3):
    """Returns (a, b, ids) of ordinary rows."""
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(2, count, WIDTH)).astype(np.float32)
    return a, b, np.arange(count, dtype=np.int32)
