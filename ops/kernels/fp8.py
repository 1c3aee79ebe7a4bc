"""Exact fp8 and bfloat16 conversions, in integer arithmetic.

NOTE [integer casts]: Triton's interpreter truncates float32 -> bfloat16, loses the carry of
float32 -> fp8 and reads fp8 NaN and infinity wrongly, and GPUs before sm_89 have no fp8 casts.
Integer arithmetic gives the bits of torch's casts on all of them.
"""

import triton
import triton.language as tl

E4M3 = tl.constexpr(1)
E5M2 = tl.constexpr(2)
NATIVE = tl.constexpr(2)  # added to the code where the GPU decodes fp8 itself


@triton.jit
def encode_fp8(x, FP8: tl.constexpr):
    """float32 to fp8 bits (uint8): nearest even, saturating, NaN 0x7F with the sign kept."""
    raw = x.to(tl.int32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    if FP8 == E4M3:
        DROPPED: tl.constexpr = 20  # mantissa bits that fp8 lacks
        REBIAS: tl.constexpr = (127 - 7) << 3
        MIN_NORMAL: tl.constexpr = (127 - 6) << 23
        MAX: tl.constexpr = 0x43E00000  # 448
        MAGIC: tl.constexpr = (127 + 14) << 23  # 2^14: one ulp of it is fp8's smallest denormal
    else:
        DROPPED: tl.constexpr = 21
        REBIAS: tl.constexpr = (127 - 15) << 2
        MIN_NORMAL: tl.constexpr = (127 - 14) << 23
        MAX: tl.constexpr = 0x47600000  # 57344
        MAGIC: tl.constexpr = (127 + 7) << 23
    magnitude = tl.minimum(magnitude, MAX)
    # Half an ulp less one, plus the last kept bit: ties go to even, the carry into the exponent.
    half: tl.constexpr = (1 << (DROPPED - 1)) - 1
    normal = ((magnitude + half + ((magnitude >> DROPPED) & 1)) >> DROPPED) - REBIAS
    # Below the normals the float adder rounds: adding the magic number leaves whole fp8 ulps.
    # Clamped first, so that the lanes that take the other branch cannot overflow.
    small = tl.minimum(magnitude, MIN_NORMAL).to(tl.float32, bitcast=True)
    magic = tl.full(small.shape, MAGIC, tl.int32).to(tl.float32, bitcast=True)
    denormal = (small + magic).to(tl.int32, bitcast=True) - MAGIC
    code = tl.where(magnitude < MIN_NORMAL, denormal, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | ((raw >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_fp8(code, FP8: tl.constexpr):
    """fp8 bits (uint8) to float32, exactly; NaN and infinity included."""
    wide = code.to(tl.int32)
    if FP8 == E4M3:
        # The same fields, shifted, are a float16 that is 2^8 too small (bias 15 instead of 7).
        half = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)
    # e5m2 is the upper byte of a float16.
    return (wide << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def native_fp8(code, FP8: tl.constexpr):
    """fp8 bits (uint8) as the GPU's own type, for which it has exact conversions."""
    return code.to(tl.float8e4nv if FP8 == E4M3 + NATIVE else tl.float8e5, bitcast=True)


@triton.jit
def round_bf16(x):
    """float32 to bfloat16, nearest even. See NOTE [integer casts]."""
    raw = x.to(tl.int32, bitcast=True)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    # Rounding could carry a NaN's mantissa into infinity.
    is_nan = (raw & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.where(is_nan, 0x7FC0, rounded)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
