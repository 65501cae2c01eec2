/* What the parts of the library share: a layer, the compiled kernels there are, memory, layouts. */
#ifndef ANNCVT_LAYER_H
#define ANNCVT_LAYER_H

#include <math.h>

#include "ort_api.h"

/* Loops that the compiler makes for several instruction sets, chosen from when the library is loaded. */
#if defined(__x86_64__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define EVERY_LEVEL __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#endif
#ifndef EVERY_LEVEL
#define EVERY_LEVEL
#endif

enum { LANES = 16, ALIGNMENT = 64 };

/* The operands of a layer. Blocked tensors are [N, ceil(C/16), H, W, 16], lanes beyond the last channel zero. */
typedef struct {
  int64_t channels, height, width; /* of one image */
  int64_t outputs, kernel[2];
  int64_t strides[2], pads[4], dilations[2], groups;
} Layer;

/* FIXED_ADDER: floats in and out, 16-bit fixed point inside. An integer adder ends with int32 sums, fused with bytes; a
   convolution is always fused, that of an image reads a plain x. */
enum { FLOAT_ADDER, FIXED_ADDER, INTEGER_ADDER, INTEGER_CONVOLUTION, IMAGE_CONVOLUTION };
enum { WEIGHT_ZERO = 128 }; /* of a convolution's weights */
static inline int of_bytes(int kind) { return kind >= INTEGER_ADDER; }
static inline int convolves(int kind) { return kind >= INTEGER_CONVOLUTION; }
/* How long the totals become that fused integers are made of: 32 bits; 32 bits when they are shifted; longer. */
enum { SHORT, LONG, WIDE };
enum { FIXED_NUMBERS = 6 }; /* fixed_point.RANGE */

/* Weights of an integer kernel: [panels, cells, kh, kw, steps, vectors, group/together, lanes, together]. Where channels
   meet only themselves they are one long row of lanes, as if of one group. */
typedef struct {
  int panels;            /* of one group */
  int vectors, lanes;    /* a panel is vectors * lanes outputs */
  int group, together;   /* channels of one step; of those, side by side */
  int cells, cell;       /* cells of one group's channels, channels of a cell */
  int columns;           /* of the window, beside the cells; 1 where those span all columns of it */
  int bytes;             /* of a weight */
  int maxima;            /* the kernel sums max(x, w): base holds the sum of the weights */
  int centred;           /* the kernel subtracts the zero point from x */
  int totals;            /* the longest that the kernel can compute: SHORT or LONG */
  const int16_t *order;  /* output of each lane of a panel */
} Panels;

/* What a fused layer does with its sums: y = clip(scale * sum + shift + residual, low, high). Integers:
   y = clip((multiplier * sum + bias + share * residual + 2^(bits-1)) >> bits, low, high), to which kernels are told the
   numbers when they are called. */
typedef struct {
  int fused, residual;
  float low, high;
  int32_t bits, share;
} Epilogue;

/* A function compiled by TVM for one layer of one size and one instruction set. Generated. */
typedef struct {
  int kind, level;
  Layer layer;
  int blocked;       /* x is blocked, else plain */
  int maxima;        /* float: shift holds scale times the sum of the weights */
  int depth;         /* floats: channels side by side in the weights */
  Epilogue epilogue;
  Panels panels;     /* integer */
  int (*function)(void *, const void *, int32_t, void *);
} Compiled;

extern const Compiled compiled_kernels[];
extern const int compiled_count;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t blocks(int64_t channels) { return ceil_div(channels, LANES); }
static inline int64_t reach(const Layer *layer, int axis) {
  return layer->dilations[axis] * (layer->kernel[axis] - 1) + 1;
}
static inline int64_t out_height(const Layer *layer) {
  return (layer->height + layer->pads[0] + layer->pads[2] - reach(layer, 0)) / layer->strides[0] + 1;
}
static inline int64_t out_width(const Layer *layer) {
  return (layer->width + layer->pads[1] + layer->pads[3] - reach(layer, 1)) / layer->strides[1] + 1;
}
static inline int64_t depth_of(const Layer *layer) { return layer->channels / layer->groups; }
static inline int64_t taps_of(const Layer *layer) {
  return depth_of(layer) * layer->kernel[0] * layer->kernel[1];
}

static inline int is_depthwise(const Layer *layer) {
  return layer->groups > 1 && layer->groups == layer->channels && layer->groups == layer->outputs;
}

/* Groups whose outputs have panels of their own. */
static inline int64_t panel_groups(const Layer *layer) { return is_depthwise(layer) ? 1 : layer->groups; }

/* Output columns whose tap in kernel column `s` lies inside the image: from *first to before *last. */
static inline void inside(const Layer *layer, int64_t s, int64_t *first, int64_t *last) {
  const int64_t shift = layer->pads[1] - s * layer->dilations[1], step = layer->strides[1], width = out_width(layer);
  const int64_t end = layer->width + shift;
  *first = shift > 0 ? ceil_div(shift, step) : 0;
  *last = end > 0 ? ceil_div(end, step) : 0;
  if (*first > width) *first = width;
  if (*last > width) *last = width;
  if (*last < *first) *last = *first;
}

/* memory.c: memory of the calling thread, aligned, kept for the next request; NULL where there is none. */
void *workspace(size_t bytes);
void release(void *memory);

/* parallel.c: task(data, 0 .. count-1) on the threads of the session that calls. */
OrtStatus *parallel(const OrtKernelContext *context, int64_t count, void (*task)(void *, size_t), void *data);

/* layout.c */
OrtStatus *block(const OrtKernelContext *context, const void *x, void *y, int64_t channels, int64_t pixels, int bytes);
OrtStatus *unblock(const OrtKernelContext *context, const void *x, void *y, int64_t channels, int64_t pixels, int bytes);

/* pack.c: bytes of packed constants, and packing; all of them in one piece of memory. */
typedef struct {
  size_t weight, first, second, third, bytes; /* places in the piece, and its size */
} Packing;
Packing packing(const Compiled *kernel);
void pack_float(const Compiled *kernel, const float *weight, const float *scale, const float *shift, char *memory);
/* fixed.c: whether the weights of a layer lose nothing in fixed point; packing them. */
int suits_fixed(const Layer *layer, const float *weight);
void pack_fixed(const Compiled *kernel, const float *weight, const float *scale, const float *shift, char *memory);
/* multiplier and bias: of a fused layer, else NULL. zero: what is padded, of a convolution what counts as nothing. */
void pack_integer(const Compiled *kernel, const uint8_t *weight, uint8_t zero, const int32_t *multiplier,
                  const int64_t *bias, const Epilogue *end, char *memory);

/* compiled.c: the best compiled kernel for a layer of any size on this processor, or the one for its size whose
   constants are those of `like`, or NULL; totals: how long they become. Calling it, kernels of floats for one image only. note_layer: a layer with
   constant weights got `compiled`, see anncvt_layers(). */
const Compiled *find_compiled(int kind, const Layer *layer, const Epilogue *epilogue, int totals, const Compiled *like);
void note_layer(const Compiled *compiled);
OrtStatus *call_compiled(const OrtKernelContext *context, const Compiled *kernel, int64_t images, const void *x,
                         const char *constants, const void *residual, void *y);

/* generic.c: any layer, plain tensors, one image. */
OrtStatus *adder_float(const OrtKernelContext *context, const Layer *layer, const float *x, const float *weight, float *y);
OrtStatus *adder_integer(const OrtKernelContext *context, const Layer *layer, const uint8_t *x, const uint8_t *weight,
                         uint8_t pad_value, int32_t *y);
OrtStatus *convolve(const OrtKernelContext *context, const Layer *layer, const uint8_t *x, const uint8_t *weight,
                    uint8_t zero, int32_t *y);

/* fuse.c: the end of a fused layer of one image in plain loops, from plain sums to blocked y; residual: blocked or NULL.
   first and second: scale and shift, or multiplier and bias. */
OrtStatus *fuse_float(const OrtKernelContext *context, const Layer *layer, const Epilogue *end, const void *sums,
                      const void *first, const void *second, const void *residual, void *y);
OrtStatus *fuse_integer(const OrtKernelContext *context, const Layer *layer, const Epilogue *end, const void *sums,
                        const void *first, const void *second, const void *residual, void *y);

#endif
