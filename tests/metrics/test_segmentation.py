import jax
import jax.numpy as jnp
import numpy as np

from repalign.metrics.segmentation import confusion, mean_iou

LABELS = jnp.asarray([[0, 0, 1, 1], [2, 2, 2, 5]])
PREDICTED = jnp.asarray([[0, 1, 1, 1], [2, 0, 0, 2]])


def test_confusion_counts_labels_by_row_and_adds_up():
    counts = jax.jit(confusion, static_argnames="classes")(PREDICTED, LABELS, classes=4)
    expected = [[1, 1, 0, 0], [0, 2, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(counts, expected)  # Label 5 is none of the classes.
    halves = [confusion(PREDICTED[row], LABELS[row], classes=4) for row in (0, 1)]
    np.testing.assert_array_equal(counts, halves[0] + halves[1])


def test_mean_iou_averages_the_classes_that_are_there():
    counts = confusion(PREDICTED, LABELS, classes=4)
    # Class 0: 1 of 4, class 1: 2 of 3, class 2: 1 of 3; class 3 is nowhere.
    np.testing.assert_allclose(mean_iou(counts), (1 / 4 + 2 / 3 + 1 / 3) / 3, rtol=1e-6)
    assert mean_iou(confusion(LABELS, LABELS, classes=6)) == 1.0
    assert mean_iou(jnp.zeros((3, 3))) == 0.0
