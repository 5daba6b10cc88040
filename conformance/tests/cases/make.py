"""Makes the case files beside it, in exact rational arithmetic and the standard library alone.

An oracle that shares no code with the workspace: values are `fractions.Fraction`, rounding is
written out. Run it from anywhere: python3 make.py
"""
import json, pathlib, random, struct
from fractions import Fraction as F

HERE = pathlib.Path(__file__).parent


def exponent(x):
    """floor(log2 |x|) of a nonzero rational."""
    x = abs(x)
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if F(2) ** e <= x else e - 1


def e4m3(code):
    e, f = code >> 3 & 15, code & 7
    v = F(f, 8) * F(2) ** -6 if e == 0 else (1 + F(f, 8)) * F(2) ** (e - 7)
    return -v if code >> 7 else v


def e4m3_exponent(code):
    """The exponent field's, subnormals included: what the tensor core aligns by."""
    return max(code >> 3 & 15, 1) - 7


def rne(x):
    """Nearest integer, ties to even."""
    q, r = divmod(x.numerator, x.denominator)
    twice = 2 * r - x.denominator
    return q + (1 if twice > 0 or (twice == 0 and q % 2) else 0)


def round_to(x, fraction_bits, lowest_exponent):
    """x to a binary format's grid, nearest even (no overflow is met here)."""
    if x == 0:
        return x
    grid = F(2) ** (max(exponent(x), lowest_exponent) - fraction_bits)
    return (rne(abs(x) / grid) * grid) * (1 if x > 0 else -1)


def f32(x):
    return round_to(x, 23, -126)


def bf16(x):
    return round_to(x, 7, -126)


def bits32(x):
    return struct.unpack("<I", struct.pack("<f", float(x)))[0]


def to_e4m3(x):
    """Saturating cast, nearest even; returns the code."""
    sign = 0x80 if x < 0 else 0
    v = min(abs(round_to(x, 3, -6)), F(448))
    return sign | next(c for c in range(0x7F) if e4m3(c) == v)


def truncate(x, grid):
    return (abs(x) / grid).__floor__() * grid * (1 if x > 0 else -1)


def hopper_step(a, b, c):
    """One group of up to 32 products: aligned to the largest exponent, cut to 13 fraction bits.

    The exponent of a product is the sum of its factors'; a zero takes no part.
    """
    terms = [
        (e4m3(x) * e4m3(y), e4m3_exponent(x) + e4m3_exponent(y))
        for x, y in zip(a, b)
        if e4m3(x) and e4m3(y)
    ]
    terms += [(c, exponent(c))] if c else []
    if not terms:
        return F(0)
    grid = F(2) ** (max(e for _, e in terms) - 13)
    total = sum((truncate(v, grid) for v, _ in terms), F(0))
    return total and truncate(total, F(2) ** (exponent(total) - 13))


def gemm(a, a_scale, b, b_scale, k):
    out = []
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            acc = F(0)
            for block in range(0, k, 128):
                partial = F(0)
                for g in range(block, min(block + 128, k), 32):
                    end = min(g + 32, k)
                    partial = hopper_step(x[g:end], y[g:end], partial)
                scale = f32(a_scale[i][block // 128] * b_scale[j // 128][block // 128])
                acc = f32(scale * partial + acc)
            out.append(acc)
    return out


def save(name, op, params, tensors):
    source = "exact rationals, make.py"
    header = {"__metadata__": {"op": op, "params": json.dumps(params), "source": source}}
    data = b""
    size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    for key, (dtype, shape, payload) in sorted(
        tensors.items(), key=lambda t: (-size[t[1][0]], t[0])
    ):
        offsets = [len(data), len(data) + len(payload)]
        header[key] = {"data_offsets": offsets, "dtype": dtype, "shape": shape}
        data += payload
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (HERE / name).write_bytes(struct.pack("<Q", len(text)) + text + data)


def f32_bytes(values):
    return b"".join(struct.pack("<f", float(v)) for v in values)


def bf16_bytes(values):
    return b"".join(struct.pack("<H", bits32(v) >> 16) for v in values)


rng = random.Random(20241227)
finite = [c for c in range(256) if c & 0x7F != 0x7F]

# wgmma: codes over the whole range, C from far below to far above the products.
m, n, k = 64, 8, 32
a = [[rng.choice(finite) for _ in range(k)] for _ in range(m)]
b = [[rng.choice(finite) for _ in range(n)] for _ in range(k)]
c = [
    [f32(F(rng.randint(-(2**20), 2**20)) * F(2) ** rng.randint(-40, 0)) for _ in range(n)]
    for _ in range(m)
]
d = [
    hopper_step(a[i], [b[t][j] for t in range(k)], c[i][j]) for i in range(m) for j in range(n)
]
save(
    "mma_wgmma_e4m3.safetensors",
    "mma",
    {"arch": "sm_90", "instr": "wgmma", "qualifier": "m64n8k32.f32.e4m3.e4m3",
     "m": m, "n": n, "k": k, "a": "e4m3", "b": "e4m3", "d": "f32"},
    {"a": ("F8_E4M3", [m, k], bytes(sum(a, []))), "b": ("F8_E4M3", [k, n], bytes(sum(b, []))),
     "c": ("F32", [m, n], f32_bytes(sum(c, []))), "out.d": ("F32", [m, n], f32_bytes(d))},
)

# GEMM with ragged sizes: a second scale row in b, a third K block of 44 elements.
m, n, k = 5, 130, 300
a = [[rng.choice(finite) for _ in range(k)] for _ in range(m)]
b = [[rng.choice(finite) for _ in range(k)] for _ in range(n)]
a_scale = [[f32(F(rng.randint(1, 2**24), 2**28)) for _ in range(3)] for _ in range(m)]
b_scale = [[f32(F(rng.randint(1, 2**24), 2**28)) for _ in range(3)] for _ in range(2)]
d = gemm(a, a_scale, b, b_scale, k)
for out, dtype, payload in [
    ("f32", "F32", f32_bytes(d)),
    ("bf16", "BF16", bf16_bytes([bf16(x) for x in d])),
]:
    save(
        f"gemm_fp8_{out}.safetensors",
        "gemm_fp8",
        {"arch": "sm_90", "m": m, "n": n, "k": k, "promotion_interval": 128,
         "a_tile": [1, 128], "b_block": [128, 128], "d": out},
        {"a": ("F8_E4M3", [m, k], bytes(sum(a, []))), "b": ("F8_E4M3", [n, k], bytes(sum(b, []))),
         "a_scale": ("F32", [m, 3], f32_bytes(sum(a_scale, []))),
         "b_scale": ("F32", [2, 3], f32_bytes(sum(b_scale, []))), "out.d": (dtype, [m, n], payload)},
    )

# Casts: ragged, with a tile of zeros and a tile below the floor.
m, k = 4, 300
x = [[bf16(F(rng.gauss(0, 1)) * F(2) ** rng.randint(-12, 12)) for _ in range(k)] for _ in range(m)]
x[1][:128] = [F(0)] * 128
x[2][:128] = [bf16(F(rng.gauss(0, 1)) / 2**20) for _ in range(128)]
floor = f32(F(1, 10000))


def cast(x, rows, columns, pow2):
    scales, codes = [], [[0] * len(x[0]) for _ in x]
    for i0 in range(0, len(x), rows):
        for j0 in range(0, len(x[0]), columns):
            block = [
                (i, j)
                for i in range(i0, min(i0 + rows, len(x)))
                for j in range(j0, min(j0 + columns, len(x[0])))
            ]
            s = f32(max([abs(x[i][j]) for i, j in block] + [floor]) / 448)
            if pow2 and s != F(2) ** exponent(s):
                s = F(2) ** (exponent(s) + 1)
            scales.append(s)
            for i, j in block:
                codes[i][j] = to_e4m3(f32(x[i][j] / s))
    return scales, sum(codes, [])


for kind in ("f32", "pow2"):
    scales, codes = cast(x, 1, 128, kind == "pow2")
    save(
        f"quantize_tile_{kind}.safetensors",
        "quantize_tile",
        {"format": "e4m3", "tile": 128, "scale": kind, "amax_floor": float(floor)},
        {"x": ("BF16", [m, k], bf16_bytes(sum(x, []))),
         "out.q": ("F8_E4M3", [m, k], bytes(codes)), "out.scale": ("F32", [m, 3], f32_bytes(scales))},
    )
scales, codes = cast(x, 128, 128, False)
save(
    "quantize_block.safetensors",
    "quantize_block",
    {"format": "e4m3", "block": [128, 128], "scale": "f32", "amax_floor": float(floor)},
    {"x": ("F32", [m, k], f32_bytes(sum(x, []))),
     "out.q": ("F8_E4M3", [m, k], bytes(codes)), "out.scale": ("F32", [1, 3], f32_bytes(scales))},
)
