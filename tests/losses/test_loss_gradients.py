"""Gradients of every loss: central differences in float64, and what is held constant in them."""

import sys

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest
from case_table import HOT, PROTOTYPES, SPREAD, key, queue, tokens, views
from jax import lax
from loss_cases import CASES, batch

from repalign import numerics
from repalign.kernels.contrastive import api, sweep
from repalign.losses import clustering, contrastive, hard_negatives
from repalign.numerics import l2_normalize

SIZE = 6
STEP = 1e-5
SMOOTH = {name: case for name, case in CASES.items() if not case.stops}
OVER_PAIRS = {"log_sum_exp", "sigmoid_loss", "log_kernel_sums", "map_row_blocks"}
IN_BLOCKS = {
    name: case
    for name, case in SMOOTH.items()
    if OVER_PAIRS & vars(sys.modules[case.of.__module__]).keys()
}


def compare_with_differences(cases):
    """Fails unless each gradient, along one direction, is the slope of the loss."""
    with jax.enable_x64(True):
        run = loss_cases.compiled(cases, SIZE, dtype=jnp.float64)
        a, b, ids = batch(SIZE)
        point = [x.astype(np.float64) for x in (a, b)]
        generator = np.random.default_rng(5)
        results = run(*point, ids)
        wrong = {}
        for argument in "ab":
            direction = [np.zeros_like(x) for x in point]
            direction["ab".index(argument)] = generator.normal(size=a.shape)
            ahead, behind = (
                run(*(x + sign * STEP * d for x, d in zip(point, direction, strict=True)), ids)
                for sign in (1, -1)
            )
            for name, (_, gradients) in results.items():
                if argument in cases[name].fixed:
                    continue
                high, low = (
                    float(loss_cases.total(side[name][0], ids)) for side in (ahead, behind)
                )
                slope = (high - low) / (2 * STEP)
                analytic = sum(np.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
                if not abs(slope - analytic) <= 1e-6 * max(abs(analytic), abs(high), 1.0):
                    wrong[name, argument] = slope, float(analytic)
    assert not wrong, wrong


def test_central_differences():
    compare_with_differences(SMOOTH)


def test_central_differences_of_the_forms_for_large_batches(monkeypatch):
    monkeypatch.setattr(api, "DENSE_ENTRIES", 0)
    monkeypatch.setattr(sweep, "BLOCK", 4)
    monkeypatch.setattr(numerics, "MATRIX_ENTRIES", 2 * SIZE)
    assert len(IN_BLOCKS) > 30
    compare_with_differences(IN_BLOCKS)


def dclw_weights(a, b, ids):
    share = jax.nn.softmax(jnp.sum(l2_normalize(a) * l2_normalize(b), axis=1) / 0.5)
    return 2.0 - share * len(a)


def dclw(a, b, ids, weights):
    a, b = l2_normalize(a), l2_normalize(b)
    options = {**HOT, "weights": weights}
    ways = contrastive.dcl_one_way(a, b, **options), contrastive.dcl_one_way(b, a, **options)
    return jnp.concatenate(ways)


def tico_moment(a, b, ids):
    return l2_normalize(a).T @ l2_normalize(a) / len(a)


def tico(a, b, ids, moment):
    a, b = l2_normalize(a), l2_normalize(b)
    covariance = 0.9 * jnp.asarray(SPREAD) + 0.1 * moment
    return 1 - jnp.mean(jnp.sum(a * b, 1)) + 8 * jnp.mean(jnp.sum((a @ covariance) * a, 1))


def swapped_targets(a, b, ids):
    return [clustering.sinkhorn(x, epsilon=0.5) for x in (a, b)]


def swapped(a, b, ids, targets):
    return -0.5 * sum(
        jnp.mean(jnp.sum(target * jax.nn.log_softmax(x / 0.1), axis=1))
        for target, x in zip(targets, (b, a), strict=True)
    )


def capi(positionwise):
    def assignments(a, b, ids):
        return clustering.capi_clustering(tokens(a), target_temp=0.6, positionwise=positionwise)[1]

    return assignments, lambda a, b, ids, fixed: clustering.capi_prediction(tokens(a), fixed)


def squared(x, y):
    return jnp.sum(jnp.square(x[:, None] - y[None]), axis=2)


PAIRS = ((0, 1), (0, 2), (1, 2))


def cacr_distances(a, b):
    x = l2_normalize(views(a, b)).swapaxes(0, 1)
    pulls = [
        jnp.stack([jnp.sum((x[k] - x[m]) ** 2, 1) for m in range(3) if m != k], 1) for k in range(3)
    ]
    return pulls, [squared(x[k], x[m]) for k, m in PAIRS]


def cacr_weights(a, b, ids):
    pulls, pushes = cacr_distances(a, b)
    own = jnp.where(jnp.eye(len(a), dtype=bool), jnp.inf, 0.0)
    return [jax.nn.softmax(d, axis=1) for d in pulls], [
        jax.nn.softmax(-d - own, axis=1) for d in pushes
    ]


def cacr(a, b, ids, weights):
    sides = [
        sum(jnp.sum(w * d, axis=1) for w, d in zip(ws, ds, strict=True)) / 3
        for ws, ds in zip(weights, cacr_distances(a, b), strict=True)
    ]
    return sides[0] - sides[1]


def mixtures(a, b, ids):
    mixed = hard_negatives.mix_hard_negatives(
        l2_normalize(a), l2_normalize(queue(a)), key=key(), hardest=5, mixed=4, query_mixed=3
    )
    return jnp.concatenate(mixed, axis=1)


def mochi(a, b, ids, mixed):
    a, b = l2_normalize(a), l2_normalize(b)
    logits = [
        jnp.sum(a * b, axis=1)[:, None],
        a @ l2_normalize(queue(a)).T,
        jnp.sum(a[:, None] * mixed, axis=2),
    ]
    return -jax.nn.log_softmax(jnp.concatenate(logits, axis=1) / 0.2)[:, 0]


def word_scores(a, b):
    return [l2_normalize(x) @ l2_normalize(jnp.asarray(PROTOTYPES)).T for x in (a, b)]


def word_targets(by_prior):
    def targets(a, b, ids):
        marginal = jnp.arange(1.0, 6.0)
        if by_prior:
            return [jax.nn.softmax(s / 0.3 + 3 * jnp.log(marginal)) for s in word_scores(a, b)]
        return [clustering.sinkhorn(s, epsilon=0.3, marginal=marginal) for s in word_scores(a, b)]

    return targets, word_predictions


def word_predictions(a, b, ids, targets):
    logs = [jax.nn.log_softmax(s / 0.2) for s in word_scores(a, b)]
    return -0.5 * jnp.sum(targets[1] * logs[0] + targets[0] * logs[1], axis=1)


# Losses that hold part of what depends on their arguments constant: that part, and the loss of it.
STOPPED = {
    "dclw": (dclw_weights, dclw),
    "tico": (tico_moment, tico),
    "swapped_assignment": (swapped_targets, swapped),
    "capi_clustering": capi(True),
    "capi_clustering/together": capi(False),
    "cacr/stop_weights": (cacr_weights, cacr),
    "mochi": (mixtures, mochi),
    "assignment_prediction/sinkhorn": word_targets(False),
    "assignment_prediction/prior": word_targets(True),
}


def test_every_loss_that_stops_a_part_is_here():
    assert STOPPED.keys() == {name for name, case in CASES.items() if case.stops}


@pytest.mark.parametrize("name", STOPPED)
def test_what_is_stopped_is_a_constant(name):
    constant, loss = STOPPED[name]
    a, b, ids = (jnp.asarray(x) for x in batch(SIZE))

    @jax.jit
    def run(a, b):
        fixed = lax.stop_gradient(constant(a, b, ids))

        def total(a, b):
            values = loss(a, b, ids, fixed)
            return loss_cases.total(values, ids), values

        (_, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(a, b)
        return values, gradients

    with jax.default_matmul_precision("highest"):
        expected = run(a, b)
    actual = jax.jit(loss_cases.evaluate({name: CASES[name]}))(a, b, ids)[name]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected
    )
