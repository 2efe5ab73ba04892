"""Points that fill a space evenly: a scrambled Sobol sequence.

The directions are those of Joe and Kuo, "Constructing Sobol sequences with better two-dimensional
projections", SIAM J. Sci. Comput. 30 (2008). The scrambling (random triangular matrices and a
random shift) is that of Matousek, "On the L2-discrepancy for anchored boxes", J. Complexity 14
(1998). SciPy has the same, but importing it takes the coordinator a second.
"""

import hashlib
import random
from collections.abc import Sequence

BITS = 32
# For each coordinate after the first: degree and coefficients of a primitive polynomial over the
# field with two elements, and the initial directions (Joe and Kuo, table new-joe-kuo-6.21201).
POLYNOMIALS: Sequence[tuple[int, int, tuple[int, ...]]] = (
    (1, 0, (1,)),
    (2, 1, (1, 3)),
    (3, 1, (1, 3, 1)),
    (3, 2, (1, 1, 1)),
    (4, 1, (1, 1, 3, 3)),
    (4, 4, (1, 3, 5, 13)),
    (5, 2, (1, 1, 5, 5, 17)),
    (5, 4, (1, 1, 5, 5, 5)),
    (5, 7, (1, 1, 7, 11, 19)),
    (5, 11, (1, 1, 5, 1, 1)),
    (5, 13, (1, 1, 1, 3, 11)),
    (5, 14, (1, 3, 5, 5, 31)),
    (6, 1, (1, 3, 3, 9, 7, 49)),
    (6, 13, (1, 1, 1, 15, 21, 21)),
    (6, 16, (1, 3, 1, 13, 27, 49)),
    (6, 19, (1, 1, 1, 15, 7, 5)),
    (6, 22, (1, 3, 1, 15, 13, 25)),
    (6, 25, (1, 1, 5, 5, 19, 61)),
    (7, 1, (1, 3, 7, 11, 23, 15, 103)),
    (7, 4, (1, 3, 7, 13, 13, 15, 69)),
)
MAX_COORDINATES = len(POLYNOMIALS) + 1


def sobol_point(index: int, size: int, seed: int) -> list[float]:
    """Return one point of the scrambled Sobol sequence of a seed.

    Coordinates after the 21st are pseudo-random.

    Args:
        index: The number of the point, from 0 and below 2**32.
        size: The number of coordinates.
        seed: Decides the scrambling.

    Returns:
        The coordinates, each in [0, 1).
    """
    point = [_scramble(_sobol_bits(index, j), j, seed) for j in range(min(size, MAX_COORDINATES))]
    further = [
        random.Random(_digest(seed, index, j)).getrandbits(BITS)
        for j in range(MAX_COORDINATES, size)
    ]
    return [bits / 2**BITS for bits in point + further]


def _sobol_bits(index: int, coordinate: int) -> int:
    """Return a coordinate of a point of the plain Sobol sequence, in units of 2**-32."""
    bits = 0
    for k, direction in enumerate(_directions(coordinate, index.bit_length())):
        if index >> k & 1:
            bits ^= direction
    return bits


def _directions(coordinate: int, count: int) -> list[int]:
    """Return the first directions of a coordinate, in units of 2**-32."""
    if coordinate == 0:
        return [1 << (BITS - 1 - k) for k in range(count)]
    degree, coefficients, initial = POLYNOMIALS[coordinate - 1]
    directions = [m << (BITS - 1 - k) for k, m in enumerate(initial)]
    for k in range(degree, count):
        direction = directions[k - degree] ^ (directions[k - degree] >> degree)
        for i in range(1, degree):
            if coefficients >> (degree - 1 - i) & 1:
                direction ^= directions[k - i]
        directions.append(direction)
    return directions[:count]


def _scramble(bits: int, coordinate: int, seed: int) -> int:
    """Return the bits times a random triangular matrix, plus a random shift, modulo 2.

    Each bit of the result depends on the same bit and the higher ones, so that points that lie in
    different halves, quarters, and so on still do.
    """
    generator = random.Random(_digest(seed, coordinate))
    result = generator.getrandbits(BITS)
    for position in range(BITS):
        own = 1 << (BITS - 1 - position)
        higher = generator.getrandbits(position) << (BITS - position) if position else 0
        if (bits & (higher | own)).bit_count() & 1:
            result ^= own
    return result


def _digest(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
