/* Plain [C, pixels] to blocked [ceil(C/16), pixels, 16] and back, one image. */
#include <string.h>

#include "layer.h"

/* Pixels of one task: the rows of 16 channels that are read or written at once stay in the first-level cache. */
enum { PIXELS = 256 };

typedef struct {
  const char *x;
  char *y;
  int64_t channels, pixels, parts;
} Job;

#define LAYOUT(name, type)                                                                   \
  static void block_##name(void *data, size_t task) {                                        \
    const Job *job = data;                                                                   \
    const int64_t b = task / job->parts, from = task % job->parts * PIXELS;                  \
    const int64_t left = job->pixels - from, count = left < PIXELS ? left : PIXELS;          \
    const int64_t valid = job->channels - b * LANES;                                         \
    const type *x = (const type *)job->x + b * LANES * job->pixels + from;                   \
    type *y = (type *)job->y + (b * job->pixels + from) * LANES;                             \
    if (valid >= LANES) {                                                                    \
      for (int64_t p = 0; p < count; ++p)                                                    \
        for (int c = 0; c < LANES; ++c) y[p * LANES + c] = x[c * job->pixels + p];           \
    } else {                                                                                 \
      memset(y, 0, count * LANES * sizeof *y);                                               \
      for (int64_t p = 0; p < count; ++p)                                                    \
        for (int64_t c = 0; c < valid; ++c) y[p * LANES + c] = x[c * job->pixels + p];       \
    }                                                                                        \
  }                                                                                          \
  static void unblock_##name(void *data, size_t task) {                                      \
    const Job *job = data;                                                                   \
    const int64_t b = task / job->parts, from = task % job->parts * PIXELS;                  \
    const int64_t left = job->pixels - from, count = left < PIXELS ? left : PIXELS;          \
    const int64_t rest = job->channels - b * LANES, valid = rest < LANES ? rest : LANES;     \
    const type *x = (const type *)job->x + (b * job->pixels + from) * LANES;                 \
    type *y = (type *)job->y + b * LANES * job->pixels + from;                               \
    for (int64_t c = 0; c < valid; ++c)                                                      \
      for (int64_t p = 0; p < count; ++p) y[c * job->pixels + p] = x[p * LANES + c];         \
  }

LAYOUT(bytes, uint8_t)
LAYOUT(words, uint32_t)

static OrtStatus *run(const OrtKernelContext *context, Job *job, void (*task)(void *, size_t)) {
  job->parts = ceil_div(job->pixels, PIXELS);
  return parallel(context, blocks(job->channels) * job->parts, task, job);
}

OrtStatus *block(const OrtKernelContext *context, const void *x, void *y, int64_t channels, int64_t pixels, int bytes) {
  Job job = {x, y, channels, pixels, 0};
  return run(context, &job, bytes == 1 ? block_bytes : block_words);
}

OrtStatus *unblock(const OrtKernelContext *context, const void *x, void *y, int64_t channels, int64_t pixels, int bytes) {
  Job job = {x, y, channels, pixels, 0};
  return run(context, &job, bytes == 1 ? unblock_bytes : unblock_words);
}
