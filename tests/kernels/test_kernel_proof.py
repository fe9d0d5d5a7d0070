"""The proof machinery itself: it passes what is right and notices what is wrong."""

import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_proof import assert_within, cross_lower, error_bound, interpreted, relative_error
from mutation import assert_killed, mutated


def test_error_bound_is_the_sum_of_its_roundings():
    assert error_bound(100) == 100 * 2.0**-24
    assert error_bound(10, rounded=[jnp.bfloat16, jnp.float32]) == 10 * 2.0**-24 + 2**-8 + 2**-24
    assert error_bound(10, accumulate=jnp.bfloat16) == 10 * 2.0**-8


def test_error_bound_holds_for_sums_of_random_signs_and_without_cancellation():
    rng = np.random.default_rng(0)
    for points in (rng.normal(size=(64, 500)), rng.uniform(size=(64, 500))):
        points = points.astype(np.float32)
        exact = points.astype(np.float64) @ points.T.astype(np.float64)
        # One after another: the worst order.
        total = np.zeros((64, 64), np.float32)
        for column in points.T:
            total += column[:, None] * column[None, :]
        error = relative_error(total, exact)
        assert 0.0 < error < error_bound(500)


def test_relative_error():
    assert relative_error([3.0, 4.0], [3.0, 4.0]) == 0.0
    assert relative_error([3.0, 9.0], [3.0, 4.0]) == 1.0
    assert relative_error([0.0], [0.0]) == 0.0
    assert relative_error([1.0], [0.0]) == float("inf")
    assert relative_error([-np.inf, 1.0], [-np.inf, 1.0]) == 0.0
    assert np.isnan(relative_error([np.nan, 1.0], [0.0, 1.0]))


def test_assert_within_names_the_tensor():
    expected = {"a": np.ones(3), "b": np.ones(2)}
    assert_within({"a": np.ones(3), "b": np.ones(2) + 1e-8}, expected, 1e-7)
    with pytest.raises(AssertionError, match=r"\['b'\]: relative error 0.5"):
        assert_within({"a": np.ones(3), "b": np.ones(2) * 1.5}, expected, 1e-7)
    with pytest.raises(AssertionError, match="nan"):
        assert_within(np.array([np.nan]), np.ones(1), 1e-7)


def double(kernel, **options):
    return lambda x: pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), **options
    )(x)


def test_interpreted_runs_a_kernel_and_shows_uninitialised_memory():
    def right(x_ref, out_ref):
        out_ref[...] = 2.0 * x_ref[...]

    def partial(x_ref, out_ref):
        out_ref[:8, :] = 2.0 * x_ref[:8, :]

    x = jnp.ones((16, 128))
    np.testing.assert_array_equal(interpreted(double(right), x), 2.0)
    half = interpreted(double(partial), x)
    assert np.all(half[:8] == 2.0) and np.all(np.isnan(half[8:]))
    assert "tpu_custom_call" in cross_lower(double(right), [x], "tpu")
    with pytest.raises(AssertionError, match="no tpu_custom_call"):
        cross_lower(lambda x: 2.0 * x, [x], "tpu")


def test_a_race_between_two_cores_is_an_assertion_error():
    def accumulate(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    # Both steps write the one block, and are said to be independent.
    racing = double(
        accumulate,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )
    x = jnp.ones((8, 128))
    with pytest.raises(AssertionError, match="(?i)race"):
        interpreted(racing, x, cores=2)
    # The interpreter works again afterwards.
    np.testing.assert_array_equal(interpreted(racing, x, cores=1), 1.0)


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """A module with a source file."""
    source = '''
        STEP = 1

        def count(n):
            """Counts."""
            total = 0
            for _ in range(n):
                total += STEP
            return total
    '''
    (tmp_path / "mutation_subject.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__("mutation_subject")


def test_a_mutant_is_a_changed_copy(subject):
    mutant = mutated(subject, "total = 0", "total = 1")
    assert isinstance(mutant, types.ModuleType)
    assert mutant.count(3) == 4 and subject.count(3) == 3
    with pytest.raises(ValueError, match="'nothing' occurs 0 times"):
        mutated(subject, "nothing", "")
    with pytest.raises(ValueError, match="occurs 3 times"):
        mutated(subject, "total", "x")
    with pytest.raises(ValueError, match="its own replacement"):
        mutated(subject, "total = 0", "total = 0")


def test_assert_killed_needs_a_check_that_notices(subject):
    def check(module):
        assert module.count(3) == 3

    assert_killed(check, subject, "total = 0", "total = 1")
    with pytest.raises(pytest.fail.Exception):
        assert_killed(check, subject, "STEP = 1", "STEP = 2 - 1")
