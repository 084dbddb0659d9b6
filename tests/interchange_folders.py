"""Sizes, random weights and NumPy for the tests of other libraries' folders."""

import numpy as np
import torch

D_IN, D_SAE, N = 6, 14, 50


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def largest(z: np.ndarray, k: int) -> np.ndarray:
    """True at the k largest of each row."""
    return z >= np.sort(z, axis=1)[:, -k][:, None]
