"""Zero vectors, duplicates, a single example and bfloat16: finite values and finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import (
    adversarial,
    alignment,
    backward_compatibility,
    clustering,
    correlation,
    disentangle,
    distillation,
    generative,
    joint_embedding,
    masked,
    regularizers,
    whitening,
)

WIDTH = 6
# The program is large and runs once: optimising it would take ten times as long as running it.
FAST_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def tokens(x):
    """The same rows as the tokens of one more example-like axis: [N, 3, WIDTH]."""
    return jnp.stack([x, 2.0 * x, x[::-1]], axis=1)


def heads(x):
    return tokens(x)[:, None]


def labels(x):
    return jnp.arange(x.shape[0]) % 2


def key():
    return jax.random.key(0)


def fixed_matrix():
    return jnp.asarray(np.random.default_rng(3).normal(size=(5, WIDTH)), jnp.float32)


PER_EXAMPLE = {
    "repa": lambda a, b: alignment.repa(tokens(a), tokens(b)),
    "spatial_normalize": lambda a, b: alignment.repa(
        tokens(a), alignment.spatial_normalize(tokens(b))
    ),
    "attention_alignment": lambda a, b: alignment.attention_alignment(heads(a), heads(b)),
    "self_similarity": lambda a, b: alignment.self_similarity_alignment(tokens(a), tokens(b)),
    "foundation_model": lambda a, b: alignment.foundation_model_alignment(tokens(a), tokens(b)),
    "matryoshka_ce": lambda a, b: alignment.matryoshka_cross_entropy(
        jnp.stack([a, b]), labels(a), relative_importance=(1.0, 0.5)
    ),
    "old_prefix": lambda a, b: backward_compatibility.old_prefix_cosine(a, b[:, :4]),
    "ibot": lambda a, b: clustering.ibot(
        tokens(b), tokens(a), jnp.ones((a.shape[0], 3), bool), jnp.zeros(WIDTH)
    )[0],
    "factor": lambda a, b: disentangle.factor_discriminator(a[:, :2], b[:, :2]),
    "feature_l2": lambda a, b: distillation.feature_distillation(
        tokens(a), tokens(b), distance="l2"
    ),
    "feature_cosine": lambda a, b: distillation.feature_distillation(
        a, b, distance="cosine", target="l2"
    ),
    "kd": distillation.knowledge_distillation,
    "attention_transfer": lambda a, b: distillation.attention_transfer(tokens(a), tokens(b)),
    "gram_style": lambda a, b: distillation.gram_style(tokens(a), tokens(b)),
    "token_relations": lambda a, b: distillation.token_relation_distillation(
        heads(a), heads(a), heads(b), heads(b)
    ),
    "gaussian_kl": generative.gaussian_kl,
    "bernoulli": lambda a, b: generative.bernoulli_log_likelihood(a, jnp.abs(b) > 1),
    "iwae": lambda a, b: generative.negative_iwae(a.T),
    "negative_cosine": joint_embedding.negative_cosine,
    "byol": lambda a, b: joint_embedding.byol(a, b, b, a),
    "simsiam": lambda a, b: joint_embedding.simsiam(a, b, b, a),
    "transform_prediction": lambda a, b: joint_embedding.transform_prediction(a, labels(b)),
    "mae": lambda a, b: masked.mae(tokens(a), tokens(b), jnp.ones((a.shape[0], 3), bool)),
    "simmim": lambda a, b: masked.simmim(tokens(a), tokens(b), jnp.zeros((a.shape[0], 3), bool)),
    "patch_discrimination": lambda a, b: masked.patch_discrimination(tokens(a), tokens(b)),
    "hinge": adversarial.hinge_discriminator,
    "gradient_penalty": lambda a, b: adversarial.gradient_penalty(
        lambda x: jnp.sum(jnp.square(x), axis=1), a, b, key()
    ),
}
OVER_THE_BATCH = {
    "modality_gap": alignment.modality_gap,
    "hoc": lambda a, b: backward_compatibility.higher_order_compatibility(a, b, labels(a)),
    "swapped": lambda a, b: clustering.swapped_assignment([a, b], [a + b]),
    "dino": lambda a, b: clustering.dino([b], [b, a], jnp.zeros(WIDTH))[0],
    "msn": lambda a, b: clustering.msn(a[None], b, fixed_matrix())[0],
    "capi": lambda a, b: clustering.capi_clustering(tokens(a))[0],
    "cka": correlation.cka_loss,
    "cca": correlation.cca_loss,
    "decompose_kl": lambda a, b: sum(disentangle.decompose_kl(a, b, a, dataset_size=50)),
    "dip": lambda a, b: disentangle.dip(a, b, off_diagonal=2.0, diagonal=1.0, variant="ii"),
    "rkd_distance": distillation.relational_distance,
    "rkd_angle": distillation.relational_angle,
    "barlow_twins": joint_embedding.barlow_twins,
    "vicreg": joint_embedding.vicreg,
    "tico": lambda a, b: joint_embedding.tico(a, b, jnp.zeros((WIDTH, WIDTH)), detach=False)[0],
    "mmcr": lambda a, b: joint_embedding.mmcr(tokens(a), tokens(b)),
    "frossl": joint_embedding.frossl,
    "emp_ssl": lambda a, b: joint_embedding.emp_ssl(jnp.stack([a, b])),
    "lejepa": lambda a, b: joint_embedding.lejepa(jnp.stack([a, b]), key(), num_slices=8),
    "koleo": lambda a, b: regularizers.koleo(a),
    "von_neumann": lambda a, b: regularizers.von_neumann_entropy(a),
    "coding_rate": lambda a, b: regularizers.total_coding_rate(a),
    "dispersive": lambda a, b: regularizers.dispersive(a),
    "w_mse": whitening.w_mse,
    "intl": whitening.intl,
}


def compiled(losses, count):
    """The losses and their gradients in one compiled function: one compilation for many cases."""

    def everything(a, b):
        return {
            name: jax.value_and_grad(lambda a, b, loss=loss: jnp.sum(loss(a, b)), (0, 1))(a, b)
            for name, loss in losses.items()
        }

    argument = jax.ShapeDtypeStruct((count, WIDTH), jnp.float32)
    return jax.jit(everything).lower(argument, argument).compile(FAST_COMPILATION)


@pytest.fixture(scope="module")
def four():
    return compiled(PER_EXAMPLE | OVER_THE_BATCH, 4)


def check(results):
    for name, (value, gradients) in results.items():
        assert np.isfinite(value), f"{name}: value {value}"
        for gradient in gradients:
            assert np.all(np.isfinite(gradient)), f"{name}: gradient"


def rows(seed, count=4):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def test_zero_vectors(four):
    zeros = np.zeros((4, WIDTH), np.float32)
    check(four(zeros, zeros))
    one_zero = rows(0)
    one_zero[1] = 0.0
    check(four(one_zero, zeros))
    check(four(zeros, rows(1)))


def test_duplicates(four):
    repeated = np.repeat(rows(2, 1), 4, axis=0)
    check(four(repeated, repeated))
    twice = rows(3)
    twice[2] = twice[0]
    check(four(twice, twice))


def test_single_example():
    one = compiled(OVER_THE_BATCH, 1)
    check(one(rows(4, 1), rows(5, 1)))
    check(one(np.zeros((1, WIDTH), np.float32), rows(5, 1)))


def test_bfloat16_decides_in_float32(four):
    losses = PER_EXAMPLE | OVER_THE_BATCH

    def values(a, b):
        return {name: jnp.sum(loss(a, b)) for name, loss in losses.items()}

    a, b = jnp.asarray(rows(6), jnp.bfloat16), jnp.asarray(rows(7), jnp.bfloat16)
    half = jax.jit(values).lower(a, b).compile(FAST_COMPILATION)(a, b)
    full = four(a.astype(jnp.float32), b.astype(jnp.float32))
    # The third view of `swapped` is a sum that this test itself rounds to bfloat16.
    for name in losses.keys() - {"swapped"}:
        assert half[name].dtype == jnp.float32, name
        np.testing.assert_allclose(half[name], full[name][0], rtol=2e-4, atol=1e-5, err_msg=name)
