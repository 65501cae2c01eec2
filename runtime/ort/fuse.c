/* The ends of fused layers in plain loops: 16 channels of plain sums to the blocked result. */
#include "layer.h"

/* Pixels whose 16 channels stay in the first-level cache while these are written one after the other. */
enum { PIXELS = 256 };

typedef struct {
  const Epilogue *end;
  const void *sums, *first, *second, *residual;
  void *y;
  int64_t outputs, pixels, parts;
} Job;

static inline float finish_float(const Epilogue *end, float low, float high, float sum, float scale, float shift,
                                 float residual) {
  const float value = scale * sum + shift + residual;
  (void)end;
  return value < low ? low : value > high ? high : value;
}

/* Unsigned where a sum may leave int64: it wraps, as in the definition. */
static inline uint8_t finish_integer(const Epilogue *end, int64_t low, int64_t high, int32_t sum, int32_t multiplier,
                                     int64_t bias, uint8_t residual) {
  const uint64_t half = 1ull << (end->bits - 1), scaled = (uint64_t)((int64_t)sum * multiplier);
  const uint64_t share = (uint64_t)((int64_t)residual * end->share);
  const int64_t value = (int64_t)(scaled + (uint64_t)bias + half + share) >> end->bits;
  return (uint8_t)(value < low ? low : value > high ? high : value);
}

/* The 16 channels of some pixels are finished one after the other, in contiguous loops, and put side by side at the end. */
#define FUSE(name, type, sum_type, first_type, second_type, bound_type)                                               \
  EVERY_LEVEL static void row_##name(type *restrict y, const Epilogue *end, const sum_type *restrict sums,            \
                                     first_type first, second_type second, const type *restrict residual,             \
                                     int64_t count) {                                                                 \
    const Epilogue copy = *end;                                                                                       \
    const bound_type low = (bound_type)copy.low, high = (bound_type)copy.high;                                        \
    for (int64_t p = 0; p < count; ++p) y[p] = finish_##name(&copy, low, high, sums[p], first, second, residual[p]);  \
  }                                                                                                                   \
  static void run_##name(void *data, size_t task) {                                                                   \
    const Job *job = data;                                                                                            \
    const int64_t block = (int64_t)task / job->parts, from = (int64_t)task % job->parts * PIXELS;                     \
    const int64_t left = job->pixels - from, count = left < PIXELS ? left : PIXELS;                                   \
    const int64_t rest = job->outputs - block * LANES, lanes = rest < LANES ? rest : LANES;                           \
    const int64_t base = (block * job->pixels + from) * LANES;                                                        \
    const type *residual = job->residual ? (const type *)job->residual + base : NULL;                                 \
    type *y = (type *)job->y + base, row[LANES][PIXELS] = {{0}}, other[PIXELS] = {0};                                 \
    for (int64_t lane = 0; lane < lanes; ++lane) {                                                                    \
      const int64_t o = block * LANES + lane;                                                                         \
      if (residual)                                                                                                   \
        for (int64_t p = 0; p < count; ++p) other[p] = residual[p * LANES + lane];                                    \
      row_##name(row[lane], job->end, (const sum_type *)job->sums + o * job->pixels + from,                           \
                 ((const first_type *)job->first)[o], ((const second_type *)job->second)[o], other, count);           \
    }                                                                                                                 \
    for (int64_t p = 0; p < count; ++p)                                                                               \
      for (int lane = 0; lane < LANES; ++lane) y[p * LANES + lane] = row[lane][p];                                    \
  }                                                                                                                   \
  OrtStatus *fuse_##name(const OrtKernelContext *context, const Layer *layer, const Epilogue *end, const void *sums,  \
                         const void *first, const void *second, const void *residual, void *y) {                      \
    const int64_t pixels = out_height(layer) * out_width(layer), parts = ceil_div(pixels, PIXELS);                    \
    Job job = {end, sums, first, second, residual, y, layer->outputs, pixels, parts};                                 \
    return parallel(context, blocks(layer->outputs) * parts, run_##name, &job);                                       \
  }

FUSE(float, float, float, float, float, float)
FUSE(integer, uint8_t, int32_t, int32_t, int64_t, int64_t)
