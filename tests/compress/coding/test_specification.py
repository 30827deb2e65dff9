"""A second decoder of the context coder, written from docs/artifact.md in plain Python.

It shares no code and no tables with the product, so the page and the product must agree.
"""

import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.compress.coding import context
from trainer.compress.coding.tables import LIMIT, SQUASH

Levels = NDArray[np.uint16]


def squash(x: int) -> int:
    return max(1, math.floor(65536 / (1 + math.exp(-x / 256))))


TABLE = [squash(x) for x in range(-2816, 2817)]


def stretch(p: int) -> int:
    low, high = 0, 5632
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if TABLE[middle] < p else (low, middle)
    return low - 2816


def clip(x: int, a: int, b: int) -> int:
    return min(max(x, a), b)


def lg(x: int) -> int:
    extra = 0
    while x > 4096:
        x, extra = x >> 4, extra + 32
    return (x**8).bit_length() - 1 + extra


class Range:
    def __init__(self, data: bytes) -> None:
        self.data, self.read, self.low, self.range, self.code = data, 0, 0, 2**32 - 1, 0
        for _ in range(4):
            self.code = self.code << 8 | self.byte()

    def byte(self) -> int:
        self.read += 1
        return self.data[self.read - 1] if self.read <= len(self.data) else 0

    def bit(self, one: int) -> int:
        bound = self.range * one >> 16
        bit = int(self.code < bound)
        if bit:
            self.range = bound
        else:
            self.code, self.range = self.code - bound, self.range - bound
            self.low = (self.low + bound) % 2**32
        while self.range < 2**24:
            self.code, self.range = self.code << 8 | self.byte(), self.range << 8
            self.low = (self.low << 8) % 2**32
        return bit

    def ended(self) -> bool:
        for k in (4, 3, 2, 1):
            m = -(-self.low // 256**k) * 256**k
            if m < self.low + self.range:
                return self.read - k == len(self.data) and self.code == m - self.low
        return self.read == len(self.data) and self.code == 0


class Kind:
    """One kind of decision: counters and weights made when they are first used."""

    def __init__(self, coder: Range, p: int, prior: list[int], weight: int, limit: int) -> None:
        self.coder, self.prior, self.limit = coder, prior, limit
        self.p: dict[object, int] = defaultdict(lambda: p)
        self.n: dict[object, int] = defaultdict(int)
        self.weight: dict[tuple[int, int], int] = defaultdict(lambda: weight)

    def bit(self, names: list[int], given: list[int], set_: int, speed: int) -> int:
        keys = list(enumerate(names))
        b = stretch(self.p[keys[0]] >> 6)
        inputs = [stretch(self.p[key] >> 6) - b for key in keys[1:]] + given
        total = sum(v * self.weight[set_, i] for i, v in enumerate(inputs))
        one = clip(TABLE[clip(b + (total >> 16), -2816, 2816) + 2816], 16, 65520)
        y = self.coder.bit(one)
        for i, v in enumerate(inputs):
            self.weight[set_, i] += (v * (65536 * y - one) * speed + 2**17) >> 18
        for key, prior in zip(keys, self.prior, strict=True):
            rate = 131072 // (2 * (self.n[key] + prior) + 3)
            self.p[key] += (y * (2**22 - 1) - self.p[key]) * rate >> 16
            self.n[key] = min(self.n[key] + 1, self.limit)
        return y


def decode(data: bytes, rows: int, columns: int, clusters: int, below: int) -> list[list[int]]:
    flags, base, data = data[0], data[1], data[2:]
    near = far = 0
    if flags & 8:
        near, far, data = data[0], data[1], data[2:]
        assert max(near, far) < 128
    speed = (4, 8, 16, 32)[flags >> 1 & 3]
    coder = Range(data)
    p = TABLE[22 * (base - 128) + 2816] << 6
    survivor = Kind(coder, p, [8, 16, 4, 2, 4, 4, 16, 4, 4], 8192, 1000)
    signs = Kind(coder, 2**21, [2, 2, 2, 4, 4, 2], 9830, 255)
    steps = Kind(coder, 2**21, [2, 2, 2, 2, 4, 2, 2], 6554, 255)
    places = Kind(coder, 2**21, [2], 0, 255)
    matrix: dict[tuple[int, int], int] = defaultdict(int)
    q: dict[int, int] = defaultdict(int)
    last: dict[int, int] = defaultdict(int)
    total = done = 0
    levels = [[0] * columns for _ in range(rows)]
    for r in range(rows):
        kept = size = inside = since = before = previous = 0
        h = lg(r + 1)
        for c in range(columns):

            def m(row: int, column: int) -> int:
                return matrix[row, column] if 0 <= column < columns else 0

            w, w2, f, f2 = m(r, c - 1), m(r, c - 2), 0, 0
            n = nw = ne = n2 = 0
            nb = 2 * q[c] + q[c - 1] + q[c + 1]
            nb += q[c - near] + q[c + near] if near else 2 * q[c]
            if near:
                n, nw, n2 = m(r, c - near), m(r, c - near - 1), m(r, c - 2 * near)
            if near > 1:
                ne = m(r, c - near + 1)
            share = 0
            if far:
                f, f2 = m(r, c - far), m(r, c - 2 * far)
                inside = inside if c % far else 0
                g = sum(q[x] for x in range(columns) if x // far == c // far)
                share = clip((lg(16 * g + 8) - lg(r * far + c % far + 1) + 48) >> 1, 0, 63)
            full = clip((lg(4 * nb + 4) - h + 48) >> 1, 0, 63)
            touch = sum(x != 0 for x in (w, n, nw, ne, w2, n2))
            if not flags & 1:
                crowd = clip((lg(16 * kept + 8) - lg(c + 8) + 48) >> 2, 0, 31)
                many = min(63, q[c] if q[c] < 24 else 24 + ((lg(q[c]) - 36) >> 1))
                a = [m(r - 1, c), m(r - 2, c), m(r - 3, c), w, n, f, ne]
                a += [m(r - 1, c - 1), m(r - 1, c + 1)]
                names = [
                    0,
                    c % 65536,
                    32 * crowd + min(31, lg(c + 1) >> 3),
                    32 * many + min(31, h >> 2 if h < 64 else 16 + ((h - 64) >> 3)),
                    sum((x != 0) << i for i, x in enumerate([w, w2, n, nw, ne, n2, f, f2])),
                    sum((x != 0) << i for i, x in enumerate(a)),
                    r % 65536,
                    64 * share + 8 * min(7, inside) + min(7, since),
                    64 * share + full,
                ]
                average = lg(65536 * (total + 1)) - lg(done + 1)
                plus = max(1, 65536 * (total + 1) * 30 // (done + 30))
                given = [
                    22 * (lg(65536 * nb // 6 + plus) - lg(r + 30) - average),
                    22 * (lg(65536 * kept + plus) - lg(c + 30) - average),
                ]
                y = survivor.bit(names, given, min(h >> 3, 15), speed)
                done, total, since = done + 1, total + y, since + 1
                if not y:
                    continue
            since, inside, value = 0, inside + 1, 1
            levels[r][c] = 1
            if clusters > 1:
                sign = int(below == 0)
                if 0 < below < clusters:
                    side = [int(x != 0) + int(x > 0) for x in (w, n, nw, ne, previous, before)]
                    u = int(last[c] != 0) + int(last[c] > 0)
                    names = [
                        0,
                        27 * side[0] + 9 * side[1] + 3 * side[2] + side[3],
                        clip(2 * w + 2 * n + nw + ne + 32, 0, 63),
                        c % 65536,
                        r % 65536,
                        side[4] + 3 * side[5] + 9 * u + 27 * side[1] + 81 * side[0],
                    ]
                    sign = signs.bit(names, [], 0, 2 * speed)
                d = 1 if sign else -1
                heavy = clip(lg(4 * size + 2) - lg(4 * kept + 2) + 32, 0, 63) if kept else 0
                values = [
                    0,
                    sign,
                    2 * (clip(d * (2 * w + 2 * n + nw + ne), -16, 15) + 16) + (touch > 0),
                    min(63, abs(previous)),
                    r % 4096,
                    4 * full + min(3, touch),
                    heavy,
                ]
                most = (clusters - below if sign else below) - 1
                i = s = 0
                while s + (1 << width(i)) <= most:
                    if not steps.bit([80 * v + i for v in values], [], i, 2 * speed):
                        break
                    s, i = s + (1 << width(i)), i + 1
                place, node = 0, 1
                for k in range(width(i)):
                    bit = places.bit([8 * i + node], [], 0, 0) if k < 3 else coder.bit(32768)
                    place, node = 2 * place + bit, 2 * node + bit
                assert s + place <= most
                value = (s + place + 1) * d
                levels[r][c] = below + value if sign else below + 1 + value
            matrix[r, c] = last[c] = value
            before, previous = previous, value
            size, kept = size + abs(value), kept + 1
            q[c] += 1
    assert coder.ended()
    return levels


def width(i: int) -> int:
    return 0 if i < 16 else 2 + (i - 16) // 4


@pytest.mark.parametrize(
    ("shape", "clusters", "below", "density", "near", "far", "speed"),
    [
        ((40, 49), 16, 7, 0.15, 7, 0, 0),
        ((12, 150), 8, 4, 0.3, 5, 25, 1),
        ((30, 64), 256, 100, 0.2, 0, 9, 2),
        ((60, 36), 1, 0, 0.05, 1, 18, 3),
        ((9, 20), 3000, 0, 1.0, 0, 0, 3),
        ((20, 30), 5, 5, 1.0, 2, 4, 0),
    ],
)
def test_second_decoder(
    shape: tuple[int, int],
    clusters: int,
    below: int,
    density: float,
    near: int,
    far: int,
    speed: int,
) -> None:
    rng = np.random.default_rng(0)
    # Rows and columns of different density, and values that hang together.
    full = np.minimum(1, 6 * density * rng.random((shape[0], 1)) ** 2 * rng.random(shape[1]))
    kept = rng.random(shape) < (full if density < 1 else 1)
    values = clusters / 2 + clusters / 5 * rng.normal(size=shape).cumsum(1) / 2
    levels = (values.round().clip(1, clusters) * kept).astype(np.uint16)
    blob = context.encode(levels, clusters, below, near, far, speed)
    assert (blob[0] >> 3, blob[0] & 1) == (near + far > 0, density == 1.0)
    assert decode(blob, *shape, clusters, below) == levels.tolist()


def test_squash_is_rounded_exactly() -> None:
    """Rational bounds around exp by its series, at points where the argument is small enough."""
    assert [int(x) for x in SQUASH] == TABLE
    for x in range(-LIMIT, LIMIT + 1, 64):
        power = sum((Fraction(-x, 256) ** n / math.factorial(n) for n in range(80)), Fraction(0))
        assert max(1, math.floor(65536 / (1 + power))) == SQUASH[x + LIMIT]
