"""What can be read off frozen features: linear, nearest-neighbour and ridge-regression probes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from repalign import numerics
from repalign.kernels import neighbors
from repalign.registry import lookup
from repalign.typing import Array, Float, Int, Num, Scalar

_MEMORY = 10


class Standardization(NamedTuple):
    """Mean and standard deviation of the training features, by feature."""

    mean: Float[Array, " dim"]
    deviation: Float[Array, " dim"]

    def __call__(self, features: Num[Array, "batch dim"]) -> Float[Array, "batch dim"]:
        return (numerics.as_float(features) - self.mean) / self.deviation


class LinearClassifier(NamedTuple):
    """Standardised features to class logits."""

    standardization: Standardization
    weights: Float[Array, "dim classes"]
    bias: Float[Array, " classes"]

    def logits(self, features: Num[Array, "batch dim"]) -> Float[Array, "batch classes"]:
        return _affine(self.standardization(features), self.weights, self.bias)


def standardization(features: Num[Array, "batch dim"], *, epsilon: float = 1e-6) -> Standardization:
    """Returns what a batch norm without parameters holds after seeing all training features.

    ``deviation = sqrt(var + epsilon)`` with the biased variance, so a constant feature maps to 0.
    """
    features = numerics.as_float(features)
    return Standardization(
        jnp.mean(features, axis=0), jnp.sqrt(jnp.var(features, axis=0) + epsilon)
    )


@functools.partial(jax.jit, static_argnames=("classes",))
def fit_linear_classifier(
    features: Num[Array, "batch dim"],
    labels: Int[Array, " batch"],
    *,
    classes: int,
    l2: float | Scalar = 1e-4,
    iterations: int | Int[Array, ""] = 300,
) -> LinearClassifier:
    """Fits multinomial logistic regression on standardised features.

    Minimises ``mean_i CE(softmax(z_i W + b), y_i) + l2 / 2 |W|_F^2`` (b is not penalised) by
    full-batch L-BFGS from zero: convex, so the answer does not depend on a seed or a learning rate.
    Stops after ``iterations`` or at a gradient norm of 1e-5. scikit-learn's ``C`` is
    ``1 / (batch * l2)``.

    The logits are linear in the parameters, so a step needs two passes over the features whatever
    the line search does: it moves along ``logits + rate * slopes`` and solves for the rate at which
    the directional derivative, which float32 resolves where differences of the loss vanish, is 0.
    """
    standardize = standardization(features)
    inputs = standardize(features)
    # The bias is the weight of a constant input, without a penalty.
    inputs = jnp.concatenate([inputs, jnp.ones((inputs.shape[0], 1), inputs.dtype)], axis=1)
    penalty = jnp.full((inputs.shape[1], 1), l2, inputs.dtype).at[-1].set(0.0)
    targets = jax.nn.one_hot(labels, classes, dtype=inputs.dtype)
    count = inputs.shape[0]

    def gradient(params: Array, logits: Array) -> Array:
        residual = jax.nn.softmax(logits) - targets
        return _products(inputs.T, residual) / count + penalty * params

    def derivatives(rate: Array, params: Array, direction: Array, logits: Array, slopes: Array):
        """First and second derivative of the objective along the direction."""
        probabilities = jax.nn.softmax(logits + rate * slopes)
        mean_slope = jnp.sum(probabilities * slopes, axis=1, keepdims=True)
        first = jnp.sum((probabilities - targets) * slopes) / count
        first += jnp.sum(penalty * (params + rate * direction) * direction)
        second = jnp.sum(probabilities * jnp.square(slopes - mean_slope)) / count
        return first, second + jnp.sum(penalty * jnp.square(direction))

    def unfinished(carry: tuple) -> Array:
        step, _, _, grad, _ = carry
        return (step < iterations) & (jnp.linalg.norm(grad) > 1e-5)

    def step(carry: tuple) -> tuple:
        step, params, logits, grad, history = carry
        direction = -_inverse_hessian_product(history, grad)
        slopes = _products(inputs, direction)
        rate = _root(lambda rate: derivatives(rate, params, direction, logits, slopes))
        new_params, new_logits = params + rate * direction, logits + rate * slopes
        new_grad = gradient(new_params, new_logits)
        history = _remember(history, rate * direction, new_grad - grad)
        return step + 1, new_params, new_logits, new_grad, history

    params = jnp.zeros((inputs.shape[1], classes), inputs.dtype)
    logits = jnp.zeros((count, classes), inputs.dtype)
    past = jnp.zeros((_MEMORY, *params.shape), inputs.dtype)
    carry = (0, params, logits, gradient(params, logits), (past, past))
    params = lax.while_loop(unfinished, step, carry)[1]
    return LinearClassifier(standardize, params[:-1], params[-1])


def _inverse_hessian_product(history: tuple[Array, Array], grad: Array) -> Array:
    """The L-BFGS two-loop recursion (Nocedal and Wright 2006, Algorithm 7.4), newest pair last.

    Pairs of zeros, those not yet seen, change nothing.
    """
    steps, changes = history
    curvatures = jnp.sum(steps * changes, axis=(1, 2))
    weights = jnp.where(curvatures > 0, 1.0 / jnp.where(curvatures > 0, curvatures, 1.0), 0.0)

    def backward(vector: Array, pair: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        step, change, weight = pair
        coefficient = weight * jnp.sum(step * vector)
        return vector - coefficient * change, coefficient

    def forward(vector: Array, pair: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        step, change, weight, coefficient = pair
        return vector + (coefficient - weight * jnp.sum(change * vector)) * step, None

    pairs = (steps, changes, weights)
    vector, coefficients = lax.scan(backward, grad, pairs, reverse=True)
    newest_change = jnp.sum(jnp.square(changes[-1]))
    scale = jnp.where(newest_change > 0, curvatures[-1] / newest_change, 1.0)
    return lax.scan(forward, scale * vector, (*pairs, coefficients))[0]


def _remember(history: tuple[Array, Array], step: Array, change: Array) -> tuple[Array, Array]:
    steps, changes = history
    return (
        jnp.concatenate([steps[1:], step[None]]),
        jnp.concatenate([changes[1:], change[None]]),
    )


def _root(derivatives: Callable[[Array], tuple[Array, Array]]) -> Array:
    """Finds where a convex function's first derivative, negative at 0, is 0 (to 10 % of that).

    Newton's method from 1, kept inside the bracket: outside it, the bracket is doubled or halved.
    """
    tolerance = 0.1 * jnp.abs(derivatives(jnp.float32(0.0))[0])

    def unfinished(carry: tuple) -> Array:
        evaluations, _, _, _, first = carry
        return (evaluations < 20) & (jnp.abs(first) > tolerance)

    def step(carry: tuple) -> tuple:
        evaluations, rate, low, high, _ = carry
        first, second = derivatives(rate)
        low, high = jnp.where(first < 0, rate, low), jnp.where(first < 0, high, rate)
        newton = rate - first / second
        safe = jnp.where(jnp.isfinite(high), 0.5 * (low + high), 2.0 * rate)
        inside = (newton > low) & (newton < jnp.minimum(high, 10.0 * rate))
        found = jnp.abs(first) <= tolerance
        rate = jnp.where(found, rate, jnp.where(inside, newton, safe))
        return evaluations + 1, rate, low, high, first

    one = jnp.ones_like(tolerance)
    start = (0, one, jnp.zeros_like(one), jnp.inf * one, jnp.inf * one)
    return lax.while_loop(unfinished, step, start)[1]


def linear_probe(
    train_features: Num[Array, "train dim"],
    train_labels: Int[Array, " train"],
    test_features: Num[Array, "test dim"],
    test_labels: Int[Array, " test"],
    *,
    classes: int,
    l2: float = 1e-4,
    iterations: int = 300,
) -> Scalar:
    """Top-1 test accuracy, in [0, 1], of ``fit_linear_classifier`` on frozen features.

    Features are standardised by the training set, as by the parameter-free batch norm of REPA's
    protocol (Yu et al. 2025; as in He et al. 2022, MAE). That protocol then runs Adam for 90
    epochs at batch 16,384; here the convex problem is solved itself, with the weak default ``l2``
    in place of early stopping. May be mapped over replicas with ``vmap``.
    """
    classifier = fit_linear_classifier(
        train_features, train_labels, classes=classes, l2=l2, iterations=iterations
    )
    return _accuracy(classifier.logits(test_features), test_labels)


@functools.partial(jax.jit, static_argnames=("classes", "k", "weighting", "temperature"))
def knn_probe(
    train_features: Num[Array, "train dim"],
    train_labels: Int[Array, " train"],
    test_features: Num[Array, "test dim"],
    test_labels: Int[Array, " test"],
    *,
    classes: int,
    k: int = 20,
    weighting: str = "exponential",
    temperature: float = 0.07,
) -> Scalar:
    """Top-1 test accuracy, in [0, 1], of a vote among the k nearest training examples by cosine.

    A neighbour of similarity s votes with ``exp(s / temperature)`` (``"exponential"``: Wu et al.
    2018, Instance Discrimination, Section 3.4; DINO's k = 20 and temperature 0.07) or with 1
    (``"majority"``). A tie goes to the lowest class.

    Raises:
        ValueError: k larger than the training set.
        UserError: an unknown weighting.
    """
    exponential = lookup({"exponential": True, "majority": False}, weighting, kind="weighting")
    found = neighbors.top_k(
        numerics.l2_normalize(test_features), numerics.l2_normalize(train_features), k=k
    )
    if exponential:
        # Relative to the nearest neighbour, so that no temperature overflows.
        votes = jnp.exp((found.values - found.values[:, :1]) / temperature)
    else:
        votes = jnp.ones_like(found.values)
    rows = jnp.arange(votes.shape[0])[:, None]
    scores = jnp.zeros((votes.shape[0], classes), votes.dtype)
    scores = scores.at[rows, train_labels[found.indices]].add(votes)
    return _accuracy(scores, test_labels)


@functools.partial(jax.jit, static_argnames=("l2",))
def ridge_probe(
    train_features: Num[Array, "train dim"],
    train_targets: Num[Array, "train targets"],
    test_features: Num[Array, "test dim"],
    test_targets: Num[Array, "test targets"],
    *,
    l2: float = 1e-3,
) -> Float[Array, " targets"]:
    """Test R2 of each target under ridge regression on standardised features; at most 1.

    ``W = (Z'Z / n + l2 I)^-1 Z'(Y - mean Y) / n``; scikit-learn's ``alpha`` is ``n * l2``.
    ``R2 = 1 - sum (y - prediction)^2 / sum (y - mean y)^2`` over the test set; 0 for a target that
    is constant there and predicted exactly, -inf if it is not.
    """
    standardize = standardization(train_features)
    inputs, targets = standardize(train_features), numerics.as_float(train_targets)
    offset = jnp.mean(targets, axis=0)
    count, dim = inputs.shape
    gram = numerics.inner_products(inputs.T, inputs.T) / count + l2 * jnp.eye(dim)
    moments = numerics.inner_products(inputs.T, (targets - offset).T) / count
    weights = jax.scipy.linalg.solve(gram, moments, assume_a="pos")
    prediction = _affine(standardize(test_features), weights, offset)
    truth = numerics.as_float(test_targets)
    residual = jnp.sum(jnp.square(truth - prediction), axis=0)
    total = jnp.sum(jnp.square(truth - jnp.mean(truth, axis=0)), axis=0)
    constant = total == 0
    score = 1.0 - residual / jnp.where(constant, 1.0, total)
    return jnp.where(constant, jnp.where(residual == 0, 0.0, -jnp.inf), score)


def _affine(
    inputs: Float[Array, "batch dim"],
    weights: Float[Array, "dim outputs"],
    bias: Float[Array, " outputs"],
) -> Float[Array, "batch outputs"]:
    return _products(inputs, weights) + bias


def _products(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _accuracy(scores: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Scalar:
    return jnp.mean((jnp.argmax(scores, axis=-1) == labels).astype(jnp.float32))
