"""The measures that GLUE's tasks are scored by, in NumPy: accuracy, F1, Matthews, Pearson, Spearman.

They know arrays of predictions and labels, nothing of tasks. A measure that is 0 / 0 is 0, as scikit-learn has it.
Next: glue_tasks.py, which names a task's measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def accuracy(predictions: Array, labels: Array) -> float:
    """The share of equal entries."""
    return float(np.mean(predictions == labels))


def f1(predictions: Array, labels: Array) -> float:
    """2 TP / (2 TP + FP + FN) of class 1 against all others."""
    hits = np.sum((predictions == 1) & (labels == 1))
    return _ratio(2.0 * hits, float(np.sum(predictions == 1) + np.sum(labels == 1)))


def matthews(predictions: Array, labels: Array) -> float:
    """Matthews' correlation coefficient, of any number of classes (Gorodkin 2004, equation 8).

    Of two classes: (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)).
    """
    classes = np.union1d(predictions, labels)
    predicted, true = (np.equal.outer(values, classes).astype(np.float64) for values in (predictions, labels))
    predicted, true = predicted - predicted.mean(0), true - true.mean(0)
    return _ratio(float(np.sum(predicted * true)), float(np.sqrt(np.sum(predicted**2) * np.sum(true**2))))


def pearson(predictions: Array, labels: Array) -> float:
    """The correlation of the values."""
    x, y = (values.astype(np.float64) - np.mean(values, dtype=np.float64) for values in (predictions, labels))
    return _ratio(float(np.sum(x * y)), float(np.sqrt(np.sum(x**2)) * np.sqrt(np.sum(y**2))))


def spearman(predictions: Array, labels: Array) -> float:
    """The correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: Array) -> Array:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2.0)[place]


def _ratio(over: float, under: float) -> float:
    return over / under if under > 0.0 else 0.0


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
