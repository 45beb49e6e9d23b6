"""Fixed sets of unit vectors: random directions, a Fibonacci lattice of any dimension, the Leech lattice's shortest
vectors. Each follows from its arguments alone, whatever the machine. Suffixes: K points, D dimension, T table.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
LEECH_DIM, LEECH_POINTS = 24, 196_560
TABLE = 2**14
"""Angles between which the inverse of an angle's distribution is interpolated."""
RESIDUES = (1, 2, 3, 4, 6, 8, 9, 12, 13, 16, 18)
"""Squares modulo 23."""


def random_points(K: int, D: int, seed: int) -> Points:
    """Independent uniform directions (K, D); the generator is one whose stream numpy keeps as it is."""
    points_KD = np.random.RandomState(seed).standard_normal((K, D))
    return points_KD / np.linalg.norm(points_KD, axis=1, keepdims=True)


def fibonacci_points(K: int, D: int) -> Points:
    """A Fibonacci lattice (K, D): in spherical coordinates, each through the inverse of its distribution on the sphere,
    a lattice of the cube.

    Point i has the first coordinate (i + 1/2) / K and as others the fractional parts of i g^-1, ..., i g^-(D-2), where
    g is the positive root of g^(D-1) = g + 1: the golden ratio for D = 3, where this is the Fibonacci lattice of the
    sphere. For D = 2 the points are equally spaced on the circle.
    """
    i_K = np.arange(K)
    share_KD = np.empty((K, D - 1))
    share_KD[:, 0] = (i_K + 0.5) / K
    for d in range(1, D - 1):
        share_KD[:, d] = np.mod(i_K * golden_ratio(D - 2) ** -d, 1)
    points_KD, radius_K = np.empty((K, D)), np.ones(K)
    for d in range(D - 2):
        angle_K = polar_angle(share_KD[:, d], power=D - 2 - d)
        points_KD[:, d] = radius_K * np.cos(angle_K)
        radius_K = radius_K * np.sin(angle_K)
    turn_K = 2 * math.pi * share_KD[:, -1]
    points_KD[:, -2], points_KD[:, -1] = radius_K * np.cos(turn_K), radius_K * np.sin(turn_K)
    return points_KD / np.linalg.norm(points_KD, axis=1, keepdims=True)


def golden_ratio(order: int) -> float:
    """The positive root of g^(order + 1) = g + 1, in its fixed-point iteration."""
    g = 1.5
    for _ in range(128):
        g = (1 + g) ** (1 / (order + 1))
    return g


def polar_angle(share_K: npt.NDArray[np.float64], power: int) -> npt.NDArray[np.float64]:
    """Angles in [0, pi] below which lie such shares of a density proportional to sin^power."""
    angle_T = np.linspace(0, math.pi, TABLE + 1)
    middle_T = (angle_T[1:] + angle_T[:-1]) / 2
    cumulative_T = np.concatenate([[0.0], np.cumsum(np.sin(middle_T) ** power)])
    return np.interp(share_K, cumulative_T / cumulative_T[-1], angle_T)


def leech_points() -> Points:
    """Shortest vectors of the Leech lattice (196,560, 24) at unit length.

    In the lattice's usual coordinates, in which they have the length sqrt(32): 1,104 with two entries +-4; 97,152 with
    eight entries +-2, an even number of them negative, on a word of weight 8 of the extended Golay code; 98,304 with an
    entry -3 and others 1, of which those on a word of the code change their sign (Conway and Sloane, Sphere Packings,
    Lattices and Groups, chapter 4, section 11).
    """
    words = golay_words()
    signs = np.array(list(itertools.product((1, -1), repeat=8)))
    even = signs[signs.prod(1) == 1]
    pairs = np.array(list(itertools.combinations(range(LEECH_DIM), 2)))
    fours = np.zeros((len(pairs), 4, LEECH_DIM), int)
    for sign, (first, second) in enumerate(itertools.product((4, -4), repeat=2)):
        fours[np.arange(len(pairs)), sign, pairs[:, 0]] = first
        fours[np.arange(len(pairs)), sign, pairs[:, 1]] = second
    octads = np.nonzero(words[words.sum(1) == 8])[1].reshape(-1, 8)
    twos = np.zeros((len(octads), len(even), LEECH_DIM), int)
    np.put_along_axis(twos, np.broadcast_to(octads[:, None], (len(octads), *even.shape)), 2 * even[None], axis=2)
    threes = (1 - 2 * words)[:, None] * (1 - 4 * np.eye(LEECH_DIM, dtype=int))
    shapes = [each.reshape(-1, LEECH_DIM) for each in (fours, twos, threes)]
    return np.concatenate(shapes) / math.sqrt(32)


def golay_words() -> npt.NDArray[np.int_]:
    """Words (4096, 24) of the extended binary Golay code: all sums of the shifts of the squares modulo 23, and a parity
    bit."""
    circulant = np.zeros((23, 23), int)
    for shift in range(23):
        circulant[shift, np.mod(np.add(RESIDUES, shift), 23)] = 1
    generators = np.concatenate([circulant, circulant.sum(1, keepdims=True) % 2], axis=1)[:12]
    bits = np.array(list(itertools.product((0, 1), repeat=12)))
    return bits @ generators % 2
