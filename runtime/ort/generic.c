/* Adder layers of any shape in plain loops, for what no kernel was compiled for. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "layer.h"

/* Pixels in registers, and tiles of them that meet all filters while they are in a core's cache. */
enum { TILE = 4, TILES = 8 };
/* Filters of a group from which on lanes of filters are better than rows of pixels. */
enum { MANY = 4 };

typedef struct {
  const Layer *layer;
  const void *x, *weight;
  void *y;
  int pad_value;
  void *packed;
  atomic_int failed;
} Job;

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));

#define NAME(name) name##_floats
#define ELEMENT float
#define SUM float
#define VECTOR Floats
#define DISTANCE(vector) ((Floats)((Integers)(vector) & 0x7fffffff))
#include "dense.h"

#define NAME(name) name##_integers
#define ELEMENT uint8_t
#define SUM int32_t
#define VECTOR Integers
#define DISTANCE(vector) (((vector) ^ ((vector) >> 31)) - ((vector) >> 31))
#include "dense.h"

/* Few filters: one output row, `row` of filter `o`. A task is a filter's row. */
#define ADDER(name, type, sum_type, distance)                                                                      \
  EVERY_LEVEL static void taps_##name(sum_type *restrict y, const type *restrict x, sum_type w, int64_t count,     \
                                      int64_t step) {                                                              \
    if (step == 1)                                                                                                 \
      for (int64_t j = 0; j < count; ++j) y[j] -= distance((sum_type)x[j] - w);                                    \
    else                                                                                                           \
      for (int64_t j = 0; j < count; ++j) y[j] -= distance((sum_type)x[j * step] - w);                             \
  }                                                                                                                \
  static void row_##name(void *data, size_t task) {                                                                \
    const Job *job = data;                                                                                         \
    const Layer *layer = job->layer;                                                                               \
    const int64_t height = out_height(layer), width = out_width(layer), depth = depth_of(layer);                   \
    const int64_t o = task / height, row = task % height, group = o / (layer->outputs / layer->groups);            \
    const type *weight = (const type *)job->weight + o * taps_of(layer);                                           \
    sum_type *y = (sum_type *)job->y + (o * height + row) * width;                                                 \
    memset(y, 0, width * sizeof *y);                                                                               \
    for (int64_t c = 0; c < depth; ++c) {                                                                          \
      const type *plane = (const type *)job->x + (group * depth + c) * layer->height * layer->width;               \
      for (int64_t r = 0; r < layer->kernel[0]; ++r) {                                                             \
        const int64_t line = row * layer->strides[0] + r * layer->dilations[0] - layer->pads[0];                   \
        for (int64_t s = 0; s < layer->kernel[1]; ++s) {                                                           \
          const sum_type w = *weight++, border = distance((sum_type)job->pad_value - w);                           \
          int64_t first = 0, last = 0;                                                                             \
          if (line >= 0 && line < layer->height) inside(layer, s, &first, &last);                                  \
          const int64_t column = first * layer->strides[1] + s * layer->dilations[1] - layer->pads[1];             \
          for (int64_t j = 0; j < first; ++j) y[j] -= border;                                                      \
          if (first < last)                                                                                        \
            taps_##name(y + first, plane + line * layer->width + column, w, last - first, layer->strides[1]);      \
          for (int64_t j = last; j < width; ++j) y[j] -= border;                                                   \
        }                                                                                                          \
      }                                                                                                            \
    }                                                                                                              \
  }

static inline int32_t absolute(int32_t value) { return value < 0 ? -value : value; }

ADDER(float, float, float, fabsf)
ADDER(bytes, uint8_t, int32_t, absolute)

/* An output row of a convolution; what is padded counts as nothing. A task is a filter's row. */
static void row_convolution(void *data, size_t task) {
  const Job *job = data;
  const Layer *layer = job->layer;
  const int64_t height = out_height(layer), width = out_width(layer), depth = depth_of(layer);
  const int64_t o = task / height, row = task % height, group = o / (layer->outputs / layer->groups);
  const uint8_t *weight = (const uint8_t *)job->weight + o * taps_of(layer);
  int32_t *y = (int32_t *)job->y + (o * height + row) * width;
  memset(y, 0, width * sizeof *y);
  for (int64_t c = 0; c < depth; ++c)
    for (int64_t r = 0; r < layer->kernel[0]; ++r)
      for (int64_t s = 0; s < layer->kernel[1]; ++s) {
        const int32_t w = *weight++ - WEIGHT_ZERO;
        const int64_t line = row * layer->strides[0] + r * layer->dilations[0] - layer->pads[0];
        if (line < 0 || line >= layer->height) continue;
        int64_t first, last;
        inside(layer, s, &first, &last);
        const int64_t step = layer->strides[1], column = first * step + s * layer->dilations[1] - layer->pads[1];
        const uint8_t *x = (const uint8_t *)job->x + ((group * depth + c) * layer->height + line) * layer->width + column;
        for (int64_t j = first; j < last; ++j, x += step) y[j] += (*x - job->pad_value) * w;
      }
}

OrtStatus *convolve(const OrtKernelContext *context, const Layer *layer, const uint8_t *x, const uint8_t *weight,
                    uint8_t zero, int32_t *y) {
  Job job = {layer, x, weight, y, zero, NULL, 0};
  return parallel(context, layer->outputs * out_height(layer), row_convolution, &job);
}

OrtStatus *adder_float(const OrtKernelContext *context, const Layer *layer, const float *x, const float *weight, float *y) {
  Job job = {layer, x, weight, y, 0, NULL, 0};
  if (layer->outputs / layer->groups >= MANY) return dense_floats(context, &job);
  return parallel(context, layer->outputs * out_height(layer), row_float, &job);
}

OrtStatus *adder_integer(const OrtKernelContext *context, const Layer *layer, const uint8_t *x, const uint8_t *weight,
                         uint8_t pad_value, int32_t *y) {
  Job job = {layer, x, weight, y, pad_value, NULL, 0};
  if (layer->outputs / layer->groups >= MANY) return dense_integers(context, &job);
  return parallel(context, layer->outputs * out_height(layer), row_bytes, &job);
}
