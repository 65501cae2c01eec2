/* Ops between adders: changes of layout, pooling. */
#include <string.h>

#include "op.h"

static OrtStatus *change_layout(const Kernel *kernel, OrtKernelContext *context, const Input *x) {
  const int to_blocks = kernel->op->op == BLOCK;
  const int64_t *size = x->dimensions;
  if (x->rank != kernel->op->rank || (!to_blocks && size[4] != LANES))
    return refuse("ai.anncvt: Block takes [N, C, H, W], Unblock [N, ceil(C/16), H, W, 16]");
  const int64_t channels = to_blocks ? size[1] : kernel->channels, pixels = size[2] * size[3];
  if (!to_blocks && size[1] != blocks(channels)) return refuse("ai.anncvt: Unblock has other channels than x");
  const int64_t shape[] = {size[0], to_blocks ? blocks(channels) : channels, size[2], size[3], LANES};
  OrtValue *value;
  char *y;
  TRY(KernelContext_GetOutput(context, 0, shape, to_blocks ? 5 : 4, &value));
  TRY(GetTensorMutableData(value, (void **)&y));
  const int bytes = of_integers(kernel->op) ? 1 : 4;
  const int64_t plain = channels * pixels * bytes, blocked = blocks(channels) * LANES * pixels * bytes;
  for (int64_t image = 0; image < size[0]; ++image) {
    const char *from = (const char *)x->data + image * (to_blocks ? plain : blocked);
    char *to = y + image * (to_blocks ? blocked : plain);
    TRY((to_blocks ? block : unblock)(context, from, to, channels, pixels, bytes));
  }
  return NULL;
}

typedef struct {
  Layer window;
  const uint8_t *x;
  uint8_t *y;
} Pool;

/* y = max(y, x) for `count` pixels, those of x `step` pixels apart. */
static void larger(uint8_t *restrict y, const uint8_t *restrict x, int64_t count, int64_t step) {
  for (int64_t j = 0; j < count; ++j, y += LANES, x += step * LANES)
    for (int lane = 0; lane < LANES; ++lane) y[lane] = y[lane] > x[lane] ? y[lane] : x[lane];
}

/* A row of the result; padding never wins. */
static void pool_row(void *data, size_t task) {
  const Pool *pool = data;
  const Layer *window = &pool->window;
  const int64_t height = out_height(window), width = out_width(window);
  const int64_t plane = (int64_t)task / height, row = (int64_t)task % height;
  const uint8_t *x = pool->x + plane * window->height * window->width * LANES;
  uint8_t *y = pool->y + (int64_t)task * width * LANES;
  memset(y, 0, width * LANES);
  for (int64_t r = 0; r < window->kernel[0]; ++r) {
    const int64_t line = row * window->strides[0] + r * window->dilations[0] - window->pads[0];
    if (line < 0 || line >= window->height) continue;
    for (int64_t s = 0; s < window->kernel[1]; ++s) {
      int64_t first, last;
      inside(window, s, &first, &last);
      const int64_t column = first * window->strides[1] + s * window->dilations[1] - window->pads[1];
      larger(y + first * LANES, x + (line * window->width + column) * LANES, last - first, window->strides[1]);
    }
  }
}

static OrtStatus *max_pool(const Kernel *kernel, OrtKernelContext *context, const Input *x) {
  const int64_t *size = x->dimensions;
  if (x->rank != kernel->op->rank || size[4] != LANES)
    return refuse("ai.anncvt: MaxPoolInteger takes [N, ceil(C/16), H, W, 16]");
  Pool pool = {kernel->layer, x->data, NULL};
  pool.window.channels = size[1] * LANES;
  pool.window.height = size[2];
  pool.window.width = size[3];
  TRY(check_size(&pool.window));
  const int64_t shape[] = {size[0], size[1], out_height(&pool.window), out_width(&pool.window), LANES};
  OrtValue *value;
  TRY(KernelContext_GetOutput(context, 0, shape, 5, &value));
  TRY(GetTensorMutableData(value, (void **)&pool.y));
  return parallel(context, shape[0] * shape[1] * shape[2], pool_row, &pool);
}

OrtStatus *compute_between(const Kernel *kernel, OrtKernelContext *context, const Input *inputs) {
  if (kernel->op->op == MAX_POOL) return max_pool(kernel, context, inputs);
  return change_layout(kernel, context, inputs);
}
