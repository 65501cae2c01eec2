/* Finding and calling compiled kernels. */
#include "compiled.h"

#include <stdatomic.h>
#include <string.h>

static atomic_uint_fast64_t calls;

/* How often compiled kernels ran in this process: tells a test, or a puzzled user, that they do. */
__attribute__((visibility("default"))) uint64_t anncvt_compiled_calls(void) { return atomic_load(&calls); }

/* Layers with constant weights that sessions in this process were made of: all that this kind of library may have a
   compiled kernel for, those that it has one for, those computed in fixed point. */
static atomic_uint_fast64_t layers[3];

__attribute__((visibility("default"))) void anncvt_layers(uint64_t counts[3]) {
  for (int i = 0; i < 3; ++i) counts[i] = atomic_load(&layers[i]);
}

void note_layer(const Compiled *compiled) {
  atomic_fetch_add(&layers[0], 1);
  if (compiled) atomic_fetch_add(&layers[1], 1);
  if (compiled && compiled->kind == FIXED_ADDER) atomic_fetch_add(&layers[2], 1);
}

/* Levels of x86-64; elsewhere there is only level 0, made for the machine that built the library. */
static int supported(int level) {
#if defined(__x86_64__)
  if (level == 0) return 1;
  const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                   __builtin_cpu_supports("bmi2");
  if (level == 1) return avx2;
  const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl");
  if (level == 2) return avx512;
  return avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return level == 0;
#endif
}

static int same_layer(const Layer *a, const Layer *b, int any_size) {
  Layer other = *b;
  if (any_size) {
    other.height = a->height;
    other.width = a->width;
  }
  return memcmp(a, &other, sizeof other) == 0;
}

const Compiled *find_compiled(int kind, const Layer *layer, const Epilogue *epilogue, int totals, const Compiled *like) {
  const Compiled *best = NULL;
  for (int i = 0; i < compiled_count; ++i) {
    const Compiled *kernel = &compiled_kernels[i];
    if (kernel->kind != kind || kernel->epilogue.fused != epilogue->fused ||
        kernel->epilogue.residual != epilogue->residual)
      continue;
    if (!of_bytes(kind) && (kernel->epilogue.low != epilogue->low || kernel->epilogue.high != epilogue->high))
      continue;
    if (!same_layer(&kernel->layer, layer, !like)) continue;
    if (like ? kernel->level != like->level : !supported(kernel->level)) continue;
    if (of_bytes(kind) && kernel->panels.totals < totals) continue;
    const int same = best && kernel->level == best->level; /* then the one that does less is faster */
    if (!best || kernel->level > best->level || (same && kernel->panels.totals < best->panels.totals)) best = kernel;
  }
  return best;
}

enum { MOST_ARGUMENTS = 7, MOST_DIMENSIONS = 6 };

typedef struct {
  Tensor tensors[MOST_ARGUMENTS];
  int64_t shapes[MOST_ARGUMENTS][MOST_DIMENSIONS];
  Argument arguments[MOST_ARGUMENTS];
  int count;
} Call;

static void add(Call *call, const void *data, int code, int bits, int rank, const int64_t *shape) {
  const int at = call->count++;
  memcpy(call->shapes[at], shape, rank * sizeof *shape);
  call->tensors[at] = (Tensor){(void *)data, DEVICE_CPU, 0, rank, code, bits, 1, call->shapes[at], NULL, 0};
  call->arguments[at] = (Argument){TENSOR_POINTER, 0, &call->tensors[at]};
}

#define ADD(data, code, bits, ...)                                                        \
  do {                                                                                    \
    const int64_t shape_[] = {__VA_ARGS__};                                               \
    add(&call, data, code, bits, (int)(sizeof shape_ / sizeof *shape_), shape_);          \
  } while (0)

OrtStatus *call_compiled(const OrtKernelContext *context, const Compiled *kernel, int64_t images, const void *x,
                         const char *constants, const void *residual, void *y) {
  const Layer *layer = &kernel->layer;
  const Packing places = packing(kernel);
  const int64_t outputs = blocks(layer->outputs), height = out_height(layer), width = out_width(layer);
  const int fused = kernel->epilogue.fused;
  const int integer = of_bytes(kernel->kind), code = integer ? CODE_UINT : CODE_FLOAT, bits = integer ? 8 : 32;
  Call call;
  call.count = 0;
  if (kernel->blocked)
    ADD(x, code, bits, images, blocks(layer->channels), layer->height, layer->width, LANES);
  else
    ADD(x, code, bits, images, layer->channels, layer->height, layer->width);
  if (kernel->kind == FLOAT_ADDER) {
    const int64_t cells = ceil_div(depth_of(layer), kernel->depth);
    ADD(constants + places.weight, code, bits, outputs, cells, layer->kernel[0], layer->kernel[1], kernel->depth, LANES);
    ADD(constants + places.first, code, bits, outputs + 1, LANES);
    ADD(constants + places.second, code, bits, outputs, LANES);
  } else if (kernel->kind == FIXED_ADDER) {
    const int64_t cells = ceil_div(depth_of(layer), LANES), pairs = LANES / 2;
    ADD(constants + places.weight, CODE_INT, 16, outputs, cells, layer->kernel[0], layer->kernel[1], pairs, 2 * LANES);
    ADD(constants + places.first, code, bits, outputs, LANES);
    ADD(constants + places.second, code, bits, outputs, LANES);
    ADD(constants + places.third, code, bits, FIXED_NUMBERS);
  } else {
    const Panels *panels = &kernel->panels;
    const int64_t all = panel_groups(layer) * panels->panels, lanes = panels->vectors * panels->lanes;
    ADD(constants + places.weight, convolves(kernel->kind) ? CODE_INT : CODE_UINT, 8 * panels->bytes, all,
        panels->cells, layer->kernel[0], panels->columns, panels->cell / panels->group, lanes * panels->group);
    ADD(constants + places.first, CODE_INT, 32, all * lanes);
    if (fused) ADD(constants + places.second, CODE_INT, 64, all * lanes);
    ADD(constants + places.third, CODE_INT, 32, 5);
  }
  if (residual) ADD(residual, code, bits, images, outputs, height, width, LANES);
  if (integer && !fused)
    ADD(y, CODE_INT, 32, images, outputs, height, width, LANES);
  else
    ADD(y, code, bits, images, outputs, height, width, LANES);
  Argument result = {0, 0, NULL};
  use_context(context);
  atomic_fetch_add(&calls, 1);
  if (kernel->function(NULL, call.arguments, call.count, &result))
    return CreateStatus(FAILED, "ai.anncvt: a compiled kernel refused its arguments, or there is no memory");
  return NULL;
}
