"""The slow reference of Muon. It changes the singular values of one matrix at a time."""

import numpy as np


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Divides the matrix by its Frobenius norm. Then replaces each singular value s by 3.4445 s - 4.775 s^3 + 2.0315
    s^5 five times."""
    norm = np.sqrt((matrix**2).sum())
    if norm < 1e-7:
        norm = 1e-7
    left, values, right = np.linalg.svd(matrix / norm, full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


def step(
    weight: np.ndarray, mean: np.ndarray, gradient: np.ndarray, *, lr: float, weight_decay: float, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns weight and mean gradient after one Muon step of Liu et al. (arXiv 2502.16982) with Nesterov momentum."""
    mean = momentum * mean + (1 - momentum) * gradient
    update = 0.2 * np.sqrt(max(weight.shape)) * orthogonalised(momentum * mean + (1 - momentum) * gradient)
    return weight - lr * weight_decay * weight - lr * update, mean
