"""Terms of two players: a discriminator is the term's own parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses import adversarial as losses
from repalign.models.discriminator import PatchDiscriminator
from repalign.registry import lookup
from repalign.train.objective import Term, TermOutput
from repalign.typing import Array, Features, PyTree

_PLAYERS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "hinge": (losses.hinge_discriminator, losses.hinge_generator),
    "non_saturating": (losses.non_saturating_discriminator, losses.non_saturating_generator),
}


def patch_gan(
    *,
    real: str,
    fake: str,
    generator_weight: float = 0.1,
    discriminator_loss: str = "hinge",
    generator_loss: str = "hinge",
    width: int = 64,
    layers: int = 3,
    dtype: str = "float32",
    name: str = "patch_gan",
) -> Term:
    """A discriminator learns to tell ``fake`` from ``real``, and ``fake`` learns to pass for real.

    loss = ``discriminator_loss(D(real), D(sg(fake))) + generator_weight *
    generator_loss(sg(D)(fake))``: each player's gradient comes from its own part, and one update
    moves both. That is what VQGAN's two optimizers do, whose discriminator step takes the
    reconstructions from before the generator's step, if both have the same settings. Metrics:
    ``discriminator``, ``generator`` (both unweighted) and the mean logits ``real`` and ``fake``.

    Args:
        real, fake: features [batch, height, width, channels].
        generator_weight: constant, as in SimVQ; VQGAN's weight by the ratio of gradient norms at
            the last layer is not offered.
        discriminator_loss, generator_loss: ``hinge`` or ``non_saturating``, see
            `repalign.losses.adversarial`; the mean over patches is that of the losses, SimVQ's that
            of the logits.
        width, layers, dtype: of the discriminator; parameters and losses are float32.
        name: the name of the term.

    Source: Esser et al. 2021 (arXiv:2012.09841), section 3.1; youngsheen/SimVQ@d8bd94d:
    taming/modules/losses/vqperceptual.py:137-256, taming/models/vq.py:145-187.
    """
    critic = PatchDiscriminator(width, layers, dtype=dtype)
    discriminate, _ = lookup(_PLAYERS, discriminator_loss, kind="adversarial loss")
    _, generate = lookup(_PLAYERS, generator_loss, kind="adversarial loss")

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        return critic.init(key, features[real])["params"], {}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key

        def logits(params: PyTree, images: Array) -> Array:
            return critic.apply({"params": params}, images)[0]

        real_logits = logits(params, lax.stop_gradient(features[real]))
        fake_logits = logits(params, lax.stop_gradient(features[fake]))
        discriminator = discriminate(real_logits, fake_logits)
        generator = generate(logits(jax.tree.map(lax.stop_gradient, params), features[fake]))
        metrics = {
            "discriminator": jnp.mean(discriminator),
            "generator": jnp.mean(generator),
            "real": jnp.mean(real_logits),
            "fake": jnp.mean(fake_logits),
        }
        return TermOutput(discriminator + generator_weight * generator, state, metrics)

    return Term(name, apply, init)
