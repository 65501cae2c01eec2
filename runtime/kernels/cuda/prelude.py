"""What generated CUDA code calls: a few lines of CUDA in front of it, in place of headers that NVRTC would look for.

``anncvt_slope(d, s)`` is ``saturate(s*d + 0.5)``, one instruction; ``anncvt_absdiff4`` adds the absolute differences of
four unsigned bytes to a sum, one instruction. Halves travel as their 16 bits.
"""

DEVICE = """
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

static __device__ __forceinline__ float anncvt_slope(float d, float s) { return __saturatef(fmaf(d, s, 0.5f)); }

static __device__ __forceinline__ uint anncvt_absdiff4(uint a, uint b, uint sum) {
  uint result;
  asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
  return result;
}

static __device__ __forceinline__ float anncvt_from_float16(ushort bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

static __device__ __forceinline__ ushort anncvt_to_float16(float value) {
  ushort bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

static __device__ __forceinline__ uint anncvt_bits(float value) { return __float_as_uint(value); }
static __device__ __forceinline__ float anncvt_value(uint bits) { return __uint_as_float(bits); }
"""

#: Plain C++, for any processor: bfloat16 is the upper half of a float32, rounded to nearest, ties to even.
COMMON = """
static ANNCVT_DEVICE float anncvt_from_bfloat16(ushort bits) { return anncvt_value((uint)bits << 16); }

static ANNCVT_DEVICE ushort anncvt_to_bfloat16(float value) {
  uint bits = anncvt_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (ushort)0x7fff;
  return (ushort)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
"""

TEXT = f"{DEVICE}\n#define ANNCVT_DEVICE __device__ __forceinline__\n{COMMON}"
