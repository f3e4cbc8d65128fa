"""Orthonormal Hadamard matrices of many sizes, as fast products.

A Hadamard matrix has entries +1 and -1 and H H^T = n I. Sylvester doubles one; Paley makes one of the squares modulo
a prime q: of size q + 1 if q = 3 mod 4 (I), of 2 (q + 1) if q = 1 mod 4 (II). n = m 2^k is done with a factor of size
m and k doublings: H_m (x) H_2^k. A product then costs n (m + k) and no matrix of size n is ever formed.
"""

from dataclasses import dataclass

import torch

__all__ = ["Rotation", "rotation", "hadamard_factor", "paley"]

#: Larger factors than this would be dense products in all but name.
LARGEST_FACTOR = 2048


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (F (x) H_2^k) of size n, known by how to multiply with it.

    Attributes:
        signs: float64 `[n]`, +1 or -1. factor: float64 orthogonal `[m, m]`.
        name: how it was made, e.g. ``hadamard 12 x 2048``.
    """

    signs: torch.Tensor
    factor: torch.Tensor
    name: str

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows `[..., n]` @ Q, in the type of the rows."""
        factor = self.factor.to(rows)
        parts = (rows * self.signs.to(rows)).unflatten(-1, (len(factor), -1))  # [..., m, 2^k]
        return (factor.T @ _walsh_hadamard(parts)).flatten(-2)


def rotation(size: int, generator: torch.Generator) -> Rotation:
    """A Hadamard matrix of a size with random signs; a random orthogonal factor where no construction is known."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    found = hadamard_factor(size)
    if found is not None:
        factor, kind = found.double() / len(found) ** 0.5, "hadamard"
    else:
        odd = size // (size & -size)
        factor, upper = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        factor, kind = factor * upper.diagonal().sign(), "random orthogonal"
    return Rotation(signs, factor, f"{kind} {len(factor)} x {size // len(factor)}")


def hadamard_factor(size: int) -> torch.Tensor | None:
    """The smallest Hadamard matrix int64 `[m, m]` with size = m 2^k that can be constructed; None if none is known."""
    factor = size // (size & -size)
    while size % factor == 0 and factor <= LARGEST_FACTOR:
        found = torch.ones(1, 1, dtype=torch.int64) if factor == 1 else paley(factor)
        if found is not None:
            return found
        factor *= 2
    return None


def paley(size: int) -> torch.Tensor | None:
    """Paley's Hadamard matrix, int64 `[size, size]`, of construction I or else II; None where neither exists."""
    if _is_prime(size - 1) and size % 4 == 0:
        return torch.eye(size, dtype=torch.int64) + _conference(size - 1)
    half = size // 2
    if size % 4 or not _is_prime(half - 1) or half % 4 != 2:
        return None
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(_conference(half - 1), plus) + torch.kron(torch.eye(half, dtype=torch.int64), minus)


def _conference(prime: int) -> torch.Tensor:
    """C with zeros on the diagonal, +1 and -1 elsewhere and C C^T = q I, size q + 1: squares modulo q, bordered.

    Symmetric for q = 1 mod 4, skew for q = 3 mod 4.
    """
    residues = torch.full((prime,), -1)
    residues[torch.arange(1, prime) ** 2 % prime] = 1
    residues[0] = 0
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.int64)
    matrix[0, 1:], matrix[1:, 0] = 1, residues[-1]  # -1 is a square for q = 1 mod 4
    matrix[1:, 1:] = residues[(places[:, None] - places) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _walsh_hadamard(rows: torch.Tensor) -> torch.Tensor:
    """rows `[..., 2^k]` @ H_2^k / 2^(k/2), by k rounds of sums and differences."""
    size = rows.shape[-1]
    for width in (2**k for k in range(size.bit_length() - 1)):
        first, second = rows.unflatten(-1, (-1, 2, width)).unbind(-2)
        rows = torch.stack([first + second, first - second], -2).flatten(-3)
    return rows / size**0.5
