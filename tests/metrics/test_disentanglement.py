import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from repalign.metrics import disentanglement


def factors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers([3, 4], size=(count, 2))


def test_mig_is_one_for_separate_codes_and_zero_for_copies():
    values = factors(2000)
    separate = np.concatenate([values, np.zeros((2000, 1))], axis=1).astype(float)
    np.testing.assert_allclose(
        disentanglement.mutual_information_gap(separate, values), 1.0, atol=0.01
    )
    copies = np.concatenate([values, values], axis=1).astype(float)
    np.testing.assert_allclose(
        disentanglement.mutual_information_gap(copies, values), 0.0, atol=1e-12
    )
    constant = np.zeros((2000, 1), int)
    assert disentanglement.mutual_information_gap(separate, constant) == 0.0


def test_mig_of_noisy_codes_follows_the_definition():
    values = factors(500)
    codes = values @ np.array([[1.0, 0.3], [0.2, 1.0]])
    codes += 0.3 * np.random.default_rng(1).normal(size=codes.shape)
    measured = disentanglement.mutual_information_gap(codes, values, bins=8)
    for factor in range(2):
        information = []
        for code in codes.T:
            edges = np.linspace(code.min(), code.max(), 9)
            binned = np.clip(np.searchsorted(edges, code, side="right"), 1, 8)
            information.append(mutual_info_score(values[:, factor], binned))
        entropy = mutual_info_score(values[:, factor], values[:, factor])
        expected = abs(information[0] - information[1]) / entropy
        np.testing.assert_allclose(measured[factor], expected, rtol=1e-9)
    assert np.all((measured > 0.05) & (measured < 0.95))


def test_dci_of_importances():
    identity = np.eye(3)
    assert disentanglement.disentanglement(identity) > 0.999
    assert disentanglement.completeness(identity) > 0.999
    uniform = np.ones((4, 3))
    np.testing.assert_allclose(disentanglement.disentanglement(uniform), 0.0, atol=1e-8)
    # Two codes share factor 0, each serves it only: disentangled, not complete.
    shared = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert disentanglement.disentanglement(shared) > 0.999
    expected = 0.5 * (1.0 - np.log(2.0) / np.log(3.0)) + 0.5
    np.testing.assert_allclose(disentanglement.completeness(shared), expected, rtol=1e-6)


def test_dci_tells_separate_from_mixed_codes():
    train, test = factors(300), factors(100, seed=1)
    mix = np.array([[1.0, 1.0], [1.0, -1.0]])
    separate = disentanglement.dci(train.astype(float), train, test.astype(float), test)
    mixed = disentanglement.dci(train @ mix, train, test @ mix, test)
    assert min(separate) > 0.95
    assert mixed.disentanglement < 0.5
    assert mixed.informativeness > 0.9  # everything is there, but no code is a factor
    assert separate == disentanglement.dci(train.astype(float), train, test.astype(float), test)


@pytest.mark.parametrize("continuous", [False, True])
def test_sap(continuous):
    values = factors(400)
    noise = np.random.default_rng(2).normal(size=(400, 1))
    codes = np.concatenate([values, noise, np.zeros((400, 1))], axis=1).astype(float)
    gaps = disentanglement.separated_attribute_predictability(
        codes, values, codes, values, continuous=continuous
    )
    assert np.all(gaps > 0.3)
    copies = np.concatenate([codes, codes], axis=1)
    gaps = disentanglement.separated_attribute_predictability(
        copies, values, copies, values, continuous=continuous
    )
    np.testing.assert_allclose(gaps, 0.0, atol=1e-12)
    if continuous:
        correlations = np.corrcoef(np.concatenate([codes[:, :3], values], axis=1), rowvar=False)
        expected = np.sort(correlations[:3, 3:] ** 2, axis=0)
        measured = disentanglement.separated_attribute_predictability(
            codes, values, codes, values, continuous=True
        )
        np.testing.assert_allclose(measured, expected[-1] - expected[-2], rtol=1e-9)


def test_one_code_is_refused():
    values = factors(20)
    with pytest.raises(ValueError, match="at least two, got 1"):
        disentanglement.mutual_information_gap(values[:, :1].astype(float), values)
    with pytest.raises(ValueError, match="at least two codes and factors"):
        disentanglement.completeness(np.ones((1, 3)))
