"""Disentanglement of codes with respect to known factors of variation: MIG, DCI, SAP.

Host functions (numpy and scikit-learn). Codes are ``[N, codes]``, factors ``[N, factors]``. The
definitions are those of google-research/disentanglement_lib@86a644d:disentanglement_lib/
evaluation/metrics/{mig,dci,sap_score}.py, which stores both the other way round.
"""

from typing import NamedTuple

import numpy as np
import scipy.stats
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC

from repalign.typing import Array, Float, Integer, Num

Host = Array | np.ndarray


class DCI(NamedTuple):
    """Disentanglement, completeness and informativeness, each at most 1.

    Attributes:
        disentanglement: how far each code serves one factor only, weighted by its importance.
        completeness: how far each factor is held by one code only, weighted likewise.
        informativeness: mean test accuracy of predicting the factors from all codes.
    """

    disentanglement: float
    completeness: float
    informativeness: float


def mutual_information_gap(
    codes: Num[Host, "batch codes"], factors: Integer[Host, "batch factors"], *, bins: int = 20
) -> Float[np.ndarray, " factors"]:
    """MIG of each factor: ``(I(c_1; f) - I(c_2; f)) / H(f)``, in [0, 1]; the score is the mean.

    c_1 and c_2 are the codes with the most mutual information, each code cut into ``bins`` equal
    intervals of its range. 0 for a constant factor.

    Chen et al. 2018 (Isolating Sources of Disentanglement in VAEs), Eq. 6.

    Raises:
        ValueError: fewer than two codes.
    """
    codes, factors = _checked(codes, factors)
    binned = [np.digitize(code, np.histogram_bin_edges(code, bins)[:-1]) for code in codes.T]
    information = np.array(
        [[mutual_info_score(factor, code) for factor in factors.T] for code in binned]
    )
    entropies = np.array([mutual_info_score(factor, factor) for factor in factors.T])
    varies = entropies > 0
    return np.where(varies, _top_two_gap(information) / np.where(varies, entropies, 1.0), 0.0)


def dci(
    train_codes: Num[Host, "train codes"],
    train_factors: Integer[Host, "train factors"],
    test_codes: Num[Host, "test codes"],
    test_factors: Integer[Host, "test factors"],
    *,
    seed: int = 0,
) -> DCI:
    """DCI with the importances of gradient-boosted trees, one classifier per factor.

    Eastwood and Williams 2018 (A Framework for the Quantitative Evaluation of Disentangled
    Representations), Section 2; trees as in disentanglement_lib, with a fixed ``seed``.

    Raises:
        ValueError: fewer than two codes or two factors.
    """
    train_codes, train_factors = _checked(train_codes, train_factors)
    test_codes, test_factors = _checked(test_codes, test_factors)
    importances, accuracies = [], []
    for factor, test_factor in zip(train_factors.T, test_factors.T, strict=True):
        model = GradientBoostingClassifier(random_state=seed).fit(train_codes, factor)
        importances.append(model.feature_importances_)
        accuracies.append(np.mean(model.predict(test_codes) == test_factor))
    importance = np.stack(importances, axis=1)
    return DCI(disentanglement(importance), completeness(importance), float(np.mean(accuracies)))


def disentanglement(importance: Float[np.ndarray, "codes factors"]) -> float:
    """``sum_i w_i (1 - H_F(P_i))``, P_i the row i normalised, w_i its share; in [0, 1].

    The entropy has the base of the number of factors.

    Raises:
        ValueError: fewer than two factors.
    """
    if importance.shape[1] < 2:
        raise ValueError("disentanglement and completeness need at least two codes and factors.")
    scores = 1.0 - scipy.stats.entropy(importance + 1e-11, axis=1, base=importance.shape[1])
    weights = importance.sum(axis=1)
    total = weights.sum()
    return float(np.mean(scores) if total == 0 else np.sum(scores * weights) / total)


def completeness(importance: Float[np.ndarray, "codes factors"]) -> float:
    """``disentanglement`` of the transposed matrix: entropy over the codes of each factor."""
    return disentanglement(importance.T)


def separated_attribute_predictability(
    train_codes: Num[Host, "train codes"],
    train_factors: Num[Host, "train factors"],
    test_codes: Num[Host, "test codes"],
    test_factors: Num[Host, "test factors"],
    *,
    continuous: bool,
) -> Float[np.ndarray, " factors"]:
    """SAP of each factor: the best code's score less the second best's; the score is the mean.

    A code's score is its squared correlation with the factor on the training set (``continuous``;
    0 for a code of variance at most 1e-12), or the test accuracy of a balanced linear support
    vector machine (C = 0.01) on that code alone.

    Kumar et al. 2018 (Variational Inference of Disentangled Latent Concepts), Section 3.

    Raises:
        ValueError: fewer than two codes.
    """
    train_codes, train_factors = _checked(train_codes, train_factors)
    test_codes, test_factors = _checked(test_codes, test_factors)

    def score(code: int, factor: int) -> float:
        inputs, target = train_codes[:, code], train_factors[:, factor]
        if continuous:
            if min(inputs.var(ddof=1), target.var(ddof=1)) <= 1e-12:
                return 0.0
            return float(np.corrcoef(inputs, target)[0, 1] ** 2)
        machine = LinearSVC(C=0.01, class_weight="balanced", random_state=0)
        machine.fit(inputs[:, None], target)
        return float(machine.score(test_codes[:, code, None], test_factors[:, factor]))

    factor_range = range(train_factors.shape[1])
    return _top_two_gap(
        np.array([[score(i, j) for j in factor_range] for i in range(train_codes.shape[1])])
    )


def _top_two_gap(scores: Float[np.ndarray, "codes factors"]) -> Float[np.ndarray, " factors"]:
    ordered = np.sort(scores, axis=0)
    return ordered[-1] - ordered[-2]


def _checked(
    codes: Num[Host, "batch codes"], factors: Num[Host, "batch factors"]
) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = np.asarray(codes), np.asarray(factors)
    if codes.shape[1] < 2:
        raise ValueError(f"this score compares codes and needs at least two, got {codes.shape[1]}.")
    return codes, factors
