/* Weights for 16-bit fixed point: suitable() and pack() of runtime/kernels/fixed_point.py, which explains the numbers. */
#include <string.h>

#include "layer.h"

enum { HALF = 32766, SPREAD = 64 };
#define MAGIC 12582912.0 /* 1.5 * 2^23 */

typedef struct {
  double low, high, deviation; /* zero lies within the ends */
} Range;

static Range range_of(const Layer *layer, const float *weight) {
  const int64_t count = layer->outputs * taps_of(layer);
  Range range = {0, 0, 0};
  double mean = 0;
  for (int64_t i = 0; i < count; ++i) {
    range.low = fmin(range.low, weight[i]);
    range.high = fmax(range.high, weight[i]);
    mean += weight[i] / (double)count;
  }
  for (int64_t i = 0; i < count; ++i) range.deviation += fabs(weight[i] - mean) / (double)count;
  return range;
}

int suits_fixed(const Layer *layer, const float *weight) {
  const Range range = range_of(layer, weight);
  return range.high > range.low && range.high - range.low <= SPREAD * range.deviation;
}

void pack_fixed(const Compiled *kernel, const float *weight, const float *scale, const float *shift, char *memory) {
  const Layer *layer = &kernel->layer;
  const Packing places = packing(kernel);
  const Range range = range_of(layer, weight);
  const double step = (float)((range.high - range.low) / (2 * HALF));
  const double middle = rint((range.low + range.high) / 2 / step); /* in steps: zero is a whole number of them */
  const int64_t depth = depth_of(layer), window = layer->kernel[0] * layer->kernel[1], cells = blocks(depth);
  int16_t *packed = (int16_t *)(memory + places.weight);
  float *scales = (float *)(memory + places.first), *shifts = (float *)(memory + places.second);
  memset(memory, 0, places.bytes);
  for (int64_t o = 0; o < layer->outputs; ++o) {
    double sum = 0;
    for (int64_t c = 0; c < cells * LANES; ++c) /* channels that are added have the weight 0 */
      for (int64_t k = 0; k < window; ++k) {
        const double value = c < depth ? weight[(o * depth + c) * window + k] : 0;
        const double whole = fmin(fmax(rint(value / step) - middle, -HALF - 1), HALF + 1);
        const int64_t cell = (o / LANES * cells + c / LANES) * window + k;
        packed[cell * LANES * LANES + c % LANES / 2 * 2 * LANES + o % LANES * 2 + c % 2] = (int16_t)whole;
        sum += whole - middle;
      }
    scales[o] = scale ? scale[o] : 1;
    shifts[o] = (float)((shift ? shift[o] : 0) + scales[o] * step * sum);
  }
  const double values[] = {(middle - HALF) * step, (middle + HALF) * step, 1 / step, MAGIC - middle, step, 2 * step};
  float *end = (float *)(memory + places.third);
  for (int i = 0; i < FIXED_NUMBERS; ++i) end[i] = (float)values[i];
}
