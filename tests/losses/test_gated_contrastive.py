import jax
import jax.numpy as jnp
import numpy as np

from repalign.losses.gated_contrastive import pair_gated_info_nce

RNG = np.random.default_rng(13)
Z = RNG.normal(size=(8, 5)).astype(np.float32)
GATES = RNG.uniform(size=(8, 5)).astype(np.float32)
LABELS = np.array([0, 1, 0, 2, 1, 2, 0, 3], np.int32)
POSITIVES = np.array([1, 0, 0, 2, 2, 9, 1, 0], np.int32)  # 9: no such class in the batch


def expected(z, gates, labels, positive_labels, temperature):
    """Pair by pair, as the paper writes it."""
    losses, counts = [], []
    for gate, own, label, other in zip(gates, z, labels, positive_labels, strict=True):
        gated = gate * z.astype(np.float64)
        gated /= np.linalg.norm(gated, axis=1, keepdims=True)
        anchor = gate * own / np.linalg.norm(gate * own)
        scores = gated @ anchor / temperature
        negatives = np.exp(scores[(labels != label) & (labels != other)]).sum()
        positives = scores[labels == other]
        costs = np.log(np.exp(positives) + negatives) - positives
        losses.append(costs.mean() if len(costs) else 0.0)
        counts.append(len(costs))
    return np.array(losses), np.array(counts)


def test_it_is_its_formula():
    value = jax.jit(pair_gated_info_nce, static_argnames="temperature")(
        Z, GATES, LABELS, POSITIVES, temperature=0.3
    )
    losses, counts = expected(Z, GATES, LABELS, POSITIVES, 0.3)
    np.testing.assert_allclose(value, losses, rtol=2e-5, atol=1e-7)
    assert counts[5] == 0 and value[5] == 0.0 and set(counts) == {0, 2, 3}


def test_blocks_of_rows_give_the_same_value_and_gradient(monkeypatch):
    def total(z, gates):
        labels = jnp.asarray(LABELS), jnp.asarray(POSITIVES)
        return jnp.sum(pair_gated_info_nce(z, gates, *labels))

    def run():
        return jax.jit(jax.value_and_grad(lambda *x: total(*x), (0, 1)))(Z, GATES)

    whole = run()
    monkeypatch.setattr("repalign.numerics.MATRIX_ENTRIES", 20)
    for one, other in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_closed_gates_hide_the_dimensions_and_no_negative_costs_nothing():
    gates = np.ones_like(GATES)
    gates[:, 3:] = 0.0
    changed = Z.copy()
    changed[:, 3:] = 7.0
    loss = jax.jit(pair_gated_info_nce)
    np.testing.assert_allclose(
        loss(changed, gates, LABELS, POSITIVES), loss(Z, gates, LABELS, POSITIVES), rtol=1e-5
    )
    same = np.zeros(8, np.int32)
    np.testing.assert_array_equal(loss(Z, gates, same, same), 0.0)
