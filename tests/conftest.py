"""Settings that every test shares: one persistent compilation cache and fixed numerics."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

_CACHE = pathlib.Path(
    os.environ.get(
        "REPALIGN_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "repalign-test-cache"
    )
)
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_losses() -> dict[str, np.ndarray]:
    """The reference numbers of losses.npz, by name."""
    with np.load(GOLDEN / "losses.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_repa() -> dict[str, np.ndarray]:
    """The official SiT + REPA model's weights, inputs and outputs."""
    with np.load(GOLDEN / "repa_sit_linear.npz") as archive:
        return dict(archive)
