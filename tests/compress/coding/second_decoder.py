"""A second decoder of .dcz files, written from docs/artifact.md in plain Python.

It shares no code and no tables with the product, so the page and the product must agree.
`decode_file` reads a whole file, `decode` a layer of the context coder. Of what a decoder must
refuse, only what comes for free is looked at.
"""

import json
import math
import struct
import zlib
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "artifact.md"
# What `struct` calls them; bf16 is the upper half of an f32.
FORMATS = {
    "f32": "f", "f16": "e", "bf16": "H", "f64": "d", "i64": "q", "i32": "i", "i16": "h",
    "i8": "b", "u8": "B", "bool": "?",
}  # fmt: skip
Decoded = tuple[str, list[int], bytes]  # dtype, shape, elements


def preset_dictionary() -> bytes:
    """The one that the page prints: the first block of indented lines after its announcement."""
    text = PAGE.read_text(encoding="utf-8").split("\nThe dictionary is the following lines", 1)[1]
    lines = text.split("\n\n", 2)[1].splitlines()
    return "".join(line.removeprefix("    ") for line in lines).encode()


def decode_file(content: bytes) -> dict[str, Decoded]:
    """The tensors of a file by name, in its order."""
    assert content[:4] in (b"DCZ\1", b"DCZ\2", b"DCZ\3")
    sections = []
    at, checksum = 4, zlib.crc32(content[:4])
    while at < len(content):
        length, at = varint(content, at)
        payload, at = content[at : at + length], at + length
        checksum = zlib.crc32(payload, checksum)
        assert content[at : at + 4] == checksum.to_bytes(4, "little")
        sections.append(payload)
        at += 4
    inflate = zlib.decompressobj(-15, zdict=preset_dictionary())
    rows = json.loads(inflate.decompress(sections.pop(0)))["tensors"]
    kinds = {row[3] for row in rows if len(row) > 2}
    assert content[3] == (3 if "t" in kinds else 2 if "u" in kinds else 1)
    coded = {row[0]: sections.pop(0) for row in rows if len(row) > 5}
    need = defaultdict(int)
    for row in rows:
        if len(row) > 2:
            need[row[-1]] += {5: math.prod(row[2]), 6: row[4], 7: 1}[len(row)]
    streams = {t: iter(floats(sections.pop(0), need[t], t)) for t in sorted(need)}
    assert not sections
    found: dict[str, tuple[str, list[int], list[Any]]] = {}
    for name, *row in rows:
        if len(row) == 1:
            found[name] = found[row[0]]
            continue
        dtype, shape, kind, *counted, stored = row
        if kind in ("u", "t"):
            step, (below, above) = next(streams[stored]), counted
            levels = layer(coded[name], shape, below + above, below)
            integers = [0, *range(-below, 0), *range(1, above + 1)]
            values = [integers[level] for level in levels]
            if kind == "t":
                values = multiples(values, math.prod(shape[1:]))
            found[name] = (dtype, shape, [i * step for i in values])
            continue
        count = counted[0] if counted else math.prod(shape)
        values = [next(streams[stored]) for _ in range(count)]
        if kind != "r":
            k, b = max(1, count), sum(value < 0 for value in values)
            levels = layer(coded[name], shape, *((1, 0) if kind == "m" else (k, b)))
            if kind == "m":
                ahead = iter(values)
                values = [next(ahead) if level else 0.0 for level in levels]
                assert next(ahead, None) is None
            else:
                values = [values[level - 1] if level else 0 for level in levels]
        found[name] = (dtype, shape, values)
    for name, dtype, shape, kind, *_ in [row for row in rows if len(row) == 6]:
        if kind == "q":
            _, sides, scales = found[name + "_quantizer.scale"]
            assert sides in ([], [1], shape[:1])
            each = math.prod(shape) // len(scales)
            values = [v * scales[i // each] for i, v in enumerate(found[name][2])]
            found[name] = (dtype, shape, values)
    for row in rows:
        if len(row) == 2:
            found[row[0]] = found[row[1]]
    assert all(next(stream, None) is None for stream in streams.values())
    return {name: (t, shape, packed(values, t)) for name, (t, shape, values) in found.items()}


def multiples(levels: list[int], columns: int) -> list[int]:
    """What the levels of a trellis stand for, row-major."""
    states = [0] * columns
    found = []
    for place, level in enumerate(levels):
        state = states[place % columns]
        size = 2 * abs(level) - (1 if state % 2 and level else 0)
        found.append(size if level > 0 else -size)
        states[place % columns] = state // 2 ^ state % 2 * 33 ^ abs(level) % 2 * 10
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def packed(values: list[Any], dtype: str) -> bytes:
    if dtype == "bf16":  # read as bits, and never converted
        return struct.pack(f"<{len(values)}H", *values)
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)


def floats(blob: bytes, count: int, dtype: str) -> list[Any]:
    """Raw floats: `count` numbers."""
    form = FORMATS[dtype]
    size = struct.calcsize(form)
    raw = blob[1:]
    if blob and blob[0]:
        coder = Range(raw)
        planes = []
        for plane in range(size):
            p, n = [2**21] * 256, [0] * 256
            planes.append([])
            for _ in range(count):
                node = 1
                for _ in range(8):
                    bit = coder.bit(clip(p[node] >> 6, 16, 65520))
                    if blob[0] >> plane & 1:
                        rate = 131072 // (2 * n[node] + 3)
                        p[node] += (bit * (2**22 - 1) - p[node]) * rate >> 16
                        n[node] = min(n[node] + 1, 255)
                    node = 2 * node + bit
                planes[-1].append(node - 256)
        assert coder.ended()
        raw = b"".join(bytes(element) for element in zip(*planes[::-1], strict=True))
    return list(struct.unpack(f"<{count}{form}", raw))


def layer(blob: bytes, shape: list[int], clusters: int, below: int) -> list[int]:
    """The levels of a coded layer, row-major."""
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    size = rows * columns
    if blob[0] in (2, 3):
        return gaps(blob[1:], size, clusters, huffman if blob[0] == 2 else ans)
    if blob[0] == 4:
        return groups(blob[1:], shape, clusters)
    if blob[0] == 1:
        rows, columns = columns, rows
    if columns > 65536:
        folded = decode(blob[1:], -(-size // 65536), 65536, clusters, below)
        flat = [level for row in folded for level in row]
        assert not any(flat[size:])
        matrix = [flat[r * columns : (r + 1) * columns] for r in range(rows)]
    else:
        matrix = decode(blob[1:], rows, columns, clusters, below)
    if blob[0] == 1:
        matrix = [list(column) for column in zip(*matrix, strict=True)]
    return [level for row in matrix for level in row]


def gaps(blob: bytes, size: int, clusters: int, coder: Any) -> list[int]:
    survivors, at = varint(blob, 0)
    fillers, at = varint(blob, at)
    longest = 2 ** blob[at] - 1
    length, at = varint(blob, at + 1)
    symbols = coder(blob[at : at + length], survivors + fillers, longest + 1)
    values = iter(coder(blob[at + length :], survivors, clusters))
    levels: list[int] = []
    for symbol in symbols:
        levels += [0] * symbol
        if symbol < longest:
            levels.append(next(values) + 1)
    assert next(values, None) is None
    return levels + [0] * (size - len(levels))


def groups(blob: bytes, shape: list[int], clusters: int) -> list[int]:
    m = blob[0]
    length, at = varint(blob, 1)
    outputs, inputs = (shape[0] if shape else 1), (shape[1] if len(shape) > 1 else 1)
    kernel = math.prod(shape[2:])
    size = outputs * inputs * kernel
    symbols = ans(blob[at : at + length], -(-size // m), 2**m)
    survives = [symbol >> i & 1 for symbol in symbols for i in range(m)]
    values = iter(ans(blob[at + length :], sum(survives), clusters))
    moved = [next(values) + 1 if kept else 0 for kept in survives]
    assert not any(moved[size:])
    return [
        moved[(o * kernel + k) * inputs + i]
        for o in range(outputs)
        for i in range(inputs)
        for k in range(kernel)
    ]


def table(blob: bytes, alphabet: int) -> tuple[list[int], int]:
    """A number for each symbol, zeros as 0 and how many in a run; where the table ends."""
    found: list[int] = []
    at = 0
    while len(found) < alphabet:
        number, at = varint(blob, at)
        run = 1
        if number == 0:
            run, at = varint(blob, at)
        found += [number] * run
    return found, at


def huffman(blob: bytes, count: int, alphabet: int) -> list[int]:
    lengths, at = table(blob, alphabet)  # a length below 128 is a varint of one byte
    used = sorted((n, symbol) for symbol, n in enumerate(lengths) if n)
    if len(used) < 2:
        assert at == len(blob)
        return [used[0][1]] * count if count else []
    codes, code, before = {}, 0, 0
    for n, symbol in used:
        code, before = code << (n - before), n
        codes[n, code] = symbol
        code += 1
    bits = iter("".join(f"{byte:08b}" for byte in blob[at:]))
    out = []
    for _ in range(count):
        n = code = 0
        while (n, code) not in codes:
            n, code = n + 1, 2 * code + int(next(bits))
        out.append(codes[n, code])
    rest = list(bits)
    assert len(rest) < 8
    assert set(rest) <= {"0"}
    return out


def ans(blob: bytes, count: int, alphabet: int) -> list[int]:
    if count == 0 or alphabet == 1:
        assert not blob
        return [0] * count
    shares, at = table(blob, alphabet)
    t = max(12, alphabet.bit_length() + 4)
    assert sum(shares) == 2**t
    before = accumulate(shares[:-1], initial=0)
    left = [(c * (2**24 - alphabet) >> t) + i for i, c in enumerate(before)] + [2**24]
    words = [int.from_bytes(blob[i : i + 4], "little") for i in range(at, len(blob), 4)]
    state = words.pop() if words else 0
    if words:
        state = 2**32 * state + words.pop()
    out = []
    for _ in range(count):
        q = state % 2**24
        i = bisect_right(left, q) - 1
        out.append(i)
        state = (state >> 24) * (left[i + 1] - left[i]) + q - left[i]
        if state < 2**32 and words:
            state = 2**32 * state + words.pop()
    assert (state, words) == (0, [])
    return out


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
    """The levels of the context coder, row by row."""
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
