"""Losses of two-player training. Logits are the critic's scores, higher for real.

Discriminator losses take logits of fakes that carry no gradient to the generator (stop it outside).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from repalign.numerics import as_float
from repalign.typing import Array, ArrayLike, Float, Key, Num


def hinge_discriminator(
    real_logits: Num[Array, "batch *patches"], fake_logits: Num[Array, "batch *patches"]
) -> Float[Array, "batch"]:
    """``(relu(1 - real) + relu(1 + fake)) / 2``, averaged over patches, per example.

    Source: Lim & Ye (arXiv:1705.02894); the half as in taming-transformers' VQGAN.
    """
    values = 0.5 * (
        jax.nn.relu(1.0 - as_float(real_logits)) + jax.nn.relu(1.0 + as_float(fake_logits))
    )
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def hinge_generator(fake_logits: Num[Array, "batch *patches"]) -> Float[Array, "batch"]:
    """``-fake``, averaged over patches, per example. Source: Lim & Ye (arXiv:1705.02894)."""
    return -jnp.mean(as_float(fake_logits).reshape(fake_logits.shape[0], -1), axis=1)


def non_saturating_discriminator(
    real_logits: Num[Array, "batch *patches"], fake_logits: Num[Array, "batch *patches"]
) -> Float[Array, "batch"]:
    """``-log s(real) - log(1 - s(fake))`` with s the logistic function, averaged over patches.

    Source: Goodfellow et al. (arXiv:1406.2661), eq. 1; NVlabs/stylegan2-ada-pytorch@d72cc7d:
    training/loss.py:95-119.
    """
    values = jax.nn.softplus(-as_float(real_logits)) + jax.nn.softplus(as_float(fake_logits))
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def non_saturating_generator(fake_logits: Num[Array, "batch *patches"]) -> Float[Array, "batch"]:
    """``-log s(fake)``, averaged over patches, per example.

    Source: Goodfellow et al. (arXiv:1406.2661), section 3; NVlabs/stylegan2-ada-pytorch@d72cc7d:
    training/loss.py:65-74.
    """
    values = jax.nn.softplus(-as_float(fake_logits))
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def _input_gradients(
    critic: Callable[[Array], Array], inputs: Num[Array, "batch *event"]
) -> Float[Array, "batch size"]:
    """Returns the gradient of each example's summed logits with respect to its own input."""
    # The critic must treat examples independently: the gradient of the sum is then each one's own.
    gradients = jax.grad(lambda x: jnp.sum(as_float(critic(x))))(inputs)
    return as_float(gradients).reshape(inputs.shape[0], -1)


def r1(
    critic: Callable[[Array], Array], reals: Num[Array, "batch *event"], *, gamma: ArrayLike = 10.0
) -> Float[Array, "batch"]:
    """R1: ``(gamma / 2) ||grad_x critic(x)||^2`` at each real example.

    Args:
        critic: maps inputs [batch, ...] to logits; it must not mix examples (no batch norm). Its
            parameters are reached through the closure, so the penalty differentiates twice.
        gamma: the weight; 10 in the paper. With lazy regularisation, times the interval.

    Source: Mescheder et al. (arXiv:1801.04406), eq. 9; NVlabs/stylegan2-ada-pytorch@d72cc7d:
    training/loss.py:121-128.
    """
    return 0.5 * gamma * jnp.sum(jnp.square(_input_gradients(critic, as_float(reals))), axis=1)


def gradient_penalty(
    critic: Callable[[Array], Array],
    reals: Num[Array, "batch *event"],
    fakes: Num[Array, "batch *event"],
    key: Key[Array, ""],
    *,
    weight: ArrayLike = 10.0,
) -> Float[Array, "batch"]:
    """WGAN-GP: ``weight (||grad_x critic(x)|| - 1)^2`` at a random point between real and fake.

    The critic as in ``r1``. A vanishing gradient costs ``weight`` and passes no gradient.
    Source: Gulrajani et al. (arXiv:1704.00028), eq. 3.
    """
    reals, fakes = as_float(reals), as_float(fakes)
    position = jax.random.uniform(key, (reals.shape[0], *(1,) * (reals.ndim - 1)))
    gradients = _input_gradients(critic, reals + position * (fakes - reals))
    squared = jnp.sum(jnp.square(gradients), axis=1)
    positive = squared > 0
    # The inner where keeps the derivative of sqrt finite.
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return weight * jnp.square(norm - 1.0)
