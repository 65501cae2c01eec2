/* Ops: created once per node of a model, called with its inputs. */
#include <stdlib.h>
#include <string.h>

#include "op.h"

OrtStatus *refuse(const char *message) { return CreateStatus(INVALID_ARGUMENT, message); }
static OrtStatus *no_memory(void) { return CreateStatus(FAILED, "ai.anncvt: out of memory"); }

OrtStatus *dimensions_of(const OrtTensorTypeAndShapeInfo *info, Input *input) {
  size_t rank;
  TRY(GetDimensionsCount(info, &rank));
  input->rank = (int64_t)rank;
  if (rank > MOST_RANK) return refuse("ai.anncvt: an input has more than five dimensions");
  return GetDimensions(info, input->dimensions, rank);
}

static OrtStatus *describe(const OrtValue *value, Input *input) {
  OrtTensorTypeAndShapeInfo *info;
  TRY(GetTensorTypeAndShape(value, &info));
  OrtStatus *status = dimensions_of(info, input);
  ReleaseTensorTypeAndShapeInfo(info);
  if (status) return status;
  return GetTensorMutableData((OrtValue *)value, &input->data);
}

OrtStatus *take_weight(const Input *weight, Layer *layer) {
  const int64_t *size = weight->dimensions;
  if (weight->rank != 4 || size[0] < 1 || size[1] < 1 || size[2] < 1 || size[3] < 1)
    return refuse("ai.anncvt: weights must be [O, C/group, kh, kw]");
  if (size[0] % layer->groups) return refuse("ai.anncvt: the number of filters must be a multiple of group");
  layer->outputs = size[0];
  layer->channels = size[1] * layer->groups;
  layer->kernel[0] = size[2];
  layer->kernel[1] = size[3];
  return NULL;
}

static int positive(const int64_t *values, int count) {
  for (int i = 0; i < count; ++i)
    if (values[i] < 1 || values[i] > INT32_MAX) return 0;
  return 1;
}

OrtStatus *check_window(const Layer *layer) {
  if (!positive(layer->strides, 2) || !positive(layer->dilations, 2) || !positive(&layer->groups, 1))
    return refuse("ai.anncvt: strides, dilations and group must be positive");
  for (int i = 0; i < 4; ++i)
    if (layer->pads[i] < 0 || layer->pads[i] > INT32_MAX) return refuse("ai.anncvt: pads must not be negative");
  return NULL;
}

OrtStatus *check_size(const Layer *layer) {
  const int64_t height = layer->height + layer->pads[0] + layer->pads[2];
  const int64_t width = layer->width + layer->pads[1] + layer->pads[3];
  if (height < reach(layer, 0) || width < reach(layer, 1))
    return refuse("ai.anncvt: the padded image is smaller than the window");
  if (layer->channels * layer->height * layer->width > INT32_MAX)
    return refuse("ai.anncvt: an image has more than 2^31 - 1 elements");
  if (taps_of(layer) > 1 << 22) return refuse("ai.anncvt: a filter has more than 2^22 taps");
  return NULL;
}

/* Kernel: created once per node. */

static OrtStatus *read_array(const OrtKernelInfo *info, const char *name, int64_t *values, size_t count) {
  size_t found = count;
  OrtStatus *status = KernelInfoGetAttributeArray_int64(info, name, values, &found);
  if (!status && found == count) return NULL;
  if (status) ReleaseStatus(status);
  return refuse("ai.anncvt: kernel_shape, strides and dilations must have 2 entries, pads 4");
}

static OrtStatus *read_window(const OrtKernelInfo *info, Layer *layer) {
  TRY(read_array(info, "strides", layer->strides, 2));
  TRY(read_array(info, "pads", layer->pads, 4));
  TRY(read_array(info, "dilations", layer->dilations, 2));
  OrtStatus *absent = KernelInfoGetAttribute_int64(info, "group", &layer->groups);
  if (absent) {
    ReleaseStatus(absent);
    layer->groups = 1;
  }
  return check_window(layer);
}

static OrtStatus *read_within(const OrtKernelInfo *info, const char *name, int64_t low, int64_t high, int64_t *value) {
  TRY(KernelInfoGetAttribute_int64(info, name, value));
  return *value < low || *value > high ? refuse("ai.anncvt: shift must be 1 to 31, low and high within 0 to 255") : NULL;
}

static OrtStatus *read_integer_attributes(const OrtKernelInfo *info, Kernel *kernel) {
  Epilogue *end = &kernel->epilogue;
  int64_t value = 0, low, high;
  OrtStatus *absent = KernelInfoGetAttribute_int64(info, "pad_value", &value);
  if (absent) ReleaseStatus(absent);
  if (value < 0 || value > 255) return refuse("ai.anncvt: pad_value must be 0 to 255");
  kernel->pad_value = (uint8_t)value;
  if (!end->fused) return NULL;
  TRY(read_within(info, "shift", 1, 31, &value));
  TRY(read_within(info, "low", 0, 255, &low));
  TRY(read_within(info, "high", low, 255, &high));
  end->bits = (int32_t)value;
  end->low = (float)low;
  end->high = (float)high;
  if (!end->residual) return NULL;
  TRY(KernelInfoGetAttribute_int64(info, "residual_multiplier", &value));
  if (value < INT32_MIN || value > INT32_MAX) return refuse("ai.anncvt: residual_multiplier must fit 32 bits");
  end->share = (int32_t)value;
  return NULL;
}

static OrtStatus *read_attributes(const OrtKernelInfo *info, Kernel *kernel) {
  const Op *op = kernel->op;
  if (op->op == BLOCK) return NULL;
  if (op->op == UNBLOCK) {
    TRY(KernelInfoGetAttribute_int64(info, "channels", &kernel->channels));
    return positive(&kernel->channels, 1) ? NULL : refuse("ai.anncvt: channels must be positive");
  }
  kernel->epilogue.fused = op->fused;
  kernel->epilogue.residual = op->residual;
  if (op->op == MAX_POOL) TRY(read_array(info, "kernel_shape", kernel->layer.kernel, 2));
  TRY(read_window(info, &kernel->layer));
  if (op->op == MAX_POOL)
    return positive(kernel->layer.kernel, 2) ? NULL : refuse("ai.anncvt: kernel_shape must be positive");
  if (of_integers(op)) return read_integer_attributes(info, kernel);
  if (!op->fused) return NULL;
  TRY(KernelInfoGetAttribute_float(info, "low", &kernel->epilogue.low));
  return KernelInfoGetAttribute_float(info, "high", &kernel->epilogue.high);
}

/* Input `index` if it is a constant, else data NULL. */
static OrtStatus *constant(const OrtKernelInfo *info, size_t index, Input *input) {
  int is_constant = 0;
  const OrtValue *value = NULL;
  input->data = NULL;
  TRY(KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  return is_constant && value ? describe(value, input) : NULL;
}

static OrtStatus *check_lanes(const Kernel *kernel, const Input *scale, const Input *shift) {
  if (scale->rank != 1 || shift->rank != 1 || scale->dimensions[0] != kernel->layer.outputs ||
      shift->dimensions[0] != kernel->layer.outputs)
    return refuse("ai.anncvt: what a fused adder has for each filter must be [O]");
  return NULL;
}

static int kind_of(const Kernel *kernel) {
  if (kernel->op->op == CONVOLUTION) return takes_blocks(kernel->op) ? INTEGER_CONVOLUTION : IMAGE_CONVOLUTION;
  return of_integers(kernel->op) ? INTEGER_ADDER : FLOAT_ADDER;
}

/* Convolutions of an image in groups are left to plain loops. */
static int left_to_loops(const Kernel *kernel) {
  return kind_of(kernel) == IMAGE_CONVOLUTION && kernel->layer.groups > 1;
}

static void pack(const Kernel *kernel, const Compiled *compiled, const Input *inputs, char *memory) {
  const int fused = kernel->epilogue.fused;
  const void *first = fused ? inputs[2].data : NULL, *second = fused ? inputs[3].data : NULL;
  if (of_integers(kernel->op))
    pack_integer(compiled, inputs[1].data, kernel->pad_value, first, second, &kernel->epilogue, memory);
  else
    (compiled->kind == FIXED_ADDER ? pack_fixed : pack_float)(compiled, inputs[1].data, first, second, memory);
}

/* How long what a fused integer layer shifts may become; compiled kernels know no WIDE. As `totals` in integer_layer.py. */
static int totals_of(const Kernel *kernel, const Layer *layer, const Input *inputs) {
  const Epilogue *end = &kernel->epilogue;
  double multiplier = 0, bias = 0;
  if (!end->fused || !of_integers(kernel->op)) return SHORT;
  for (int64_t o = 0; o < layer->outputs; ++o) {
    multiplier = fmax(multiplier, fabs((double)((const int32_t *)inputs[2].data)[o]));
    bias = fmax(bias, fabs((double)((const int64_t *)inputs[3].data)[o]));
  }
  /* Kernels that sum up maxima have twice the sums on the way, those that subtract no zero point of a convolution, too. */
  const double weight = kernel->op->op == CONVOLUTION ? WEIGHT_ZERO : 1;
  const double sums = 2 * 255 * weight * multiplier * taps_of(layer);
  const double rest = bias + 255 * fabs((double)end->share) + ldexp(1, end->bits);
  if (fmax(sums, sums / 2 + rest) < 1ll << 31) return SHORT;
  return ldexp(sums + rest, -end->bits) < INT32_MAX - 1 ? LONG : WIDE;
}

/* The best kernel for constant weights: in fixed point if there is one and they allow it. */
static const Compiled *find_for(const Kernel *kernel, const Input *inputs) {
  const Layer *layer = &kernel->layer;
  if (!of_integers(kernel->op)) {
    const Compiled *fixed = find_compiled(FIXED_ADDER, layer, &kernel->epilogue, SHORT, NULL);
    if (fixed && suits_fixed(layer, inputs[1].data)) return fixed;
  }
  return find_compiled(kind_of(kernel), layer, &kernel->epilogue, kernel->totals, NULL);
}

/* Weights that never change are packed once. */
static OrtStatus *prepare(const OrtKernelInfo *info, Kernel *kernel) {
  Input inputs[4];
  memset(inputs, 0, sizeof inputs);
  const size_t constants = kernel->epilogue.fused ? 4 : 2;
  for (size_t i = 1; i < constants; ++i) {
    TRY(constant(info, i, &inputs[i]));
    if (!inputs[i].data) return NULL;
  }
  TRY(take_weight(&inputs[1], &kernel->layer));
  if (kernel->epilogue.fused) TRY(check_lanes(kernel, &inputs[2], &inputs[3]));
  kernel->totals = totals_of(kernel, &kernel->layer, inputs);
  if (left_to_loops(kernel) || kernel->totals == WIDE) return NULL;
  kernel->compiled = find_for(kernel, inputs);
  note_layer(kernel->compiled);
  if (!kernel->compiled) return NULL;
  kernel->constants = aligned_alloc(ALIGNMENT, packing(kernel->compiled).bytes);
  if (!kernel->constants) return no_memory();
  pack(kernel, kernel->compiled, inputs, kernel->constants);
  return NULL;
}

void destroy(void *memory) {
  Kernel *kernel = memory;
  free(kernel->constants);
  free(kernel);
}

OrtStatus *create(const OrtCustomOp *callbacks, OrtApi *api, const OrtKernelInfo *info, void **made) {
  (void)api;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return no_memory();
  kernel->op = (const Op *)callbacks;
  OrtStatus *status = read_attributes(info, kernel);
  if (!status && has_weights(kernel->op)) status = prepare(info, kernel);
  if (status)
    destroy(kernel);
  else
    *made = kernel;
  return status;
}

/* Kernel: called. */

/* Memory of one call, released together. */
typedef struct {
  void *pieces[6];
  int count;
} Scratch;

static void *take(Scratch *scratch, int64_t bytes) {
  void *piece = workspace((size_t)bytes);
  if (piece) scratch->pieces[scratch->count++] = piece;
  return piece;
}

static void finish(Scratch *scratch) {
  while (scratch->count) release(scratch->pieces[--scratch->count]);
}

/* A call of an adder or a convolution for one image; x, residual and y are blocked where the op says so. */
typedef struct {
  const OrtKernelContext *context;
  const Kernel *kernel;
  const Compiled *compiled; /* NULL: generic loops */
  const char *constants;
  Layer layer;
  int64_t in_pixels, out_pixels;
  int bytes;          /* of an element of x */
  void *in, *out;     /* memory for x and y in the other layout */
  const Input *inputs;
} Call;

static OrtStatus *compute_image(const Call *call, const char *x, const char *residual, char *y) {
  const Layer *layer = &call->layer;
  const Kernel *kernel = call->kernel;
  const OrtKernelContext *context = call->context;
  if (call->compiled) {
    if (kernel->epilogue.fused)
      return call_compiled(context, call->compiled, 1, x, call->constants, residual, y);
    if (call->compiled->blocked)
      TRY(block(context, x, call->in, layer->channels, call->in_pixels, call->bytes));
    else if (call->in)
      memcpy(call->in, x, layer->channels * call->in_pixels * call->bytes);
    TRY(call_compiled(context, call->compiled, 1, call->in ? call->in : x, call->constants, NULL, call->out));
    return unblock(context, call->out, y, layer->outputs, call->out_pixels, 4);
  }
  const int integers = of_integers(kernel->op), fused = kernel->epilogue.fused;
  const void *plain = takes_blocks(kernel->op) ? call->in : x, *weight = call->inputs[1].data;
  void *sums = fused ? call->out : y;
  if (takes_blocks(kernel->op)) TRY(unblock(context, x, call->in, layer->channels, call->in_pixels, call->bytes));
  if (kernel->op->op == CONVOLUTION)
    TRY(convolve(context, layer, plain, weight, kernel->pad_value, sums));
  else if (integers)
    TRY(adder_integer(context, layer, plain, weight, kernel->pad_value, sums));
  else
    TRY(adder_float(context, layer, plain, weight, sums));
  if (!fused) return NULL;
  return (integers ? fuse_integer : fuse_float)(context, layer, &kernel->epilogue, sums, call->inputs[2].data,
                                                call->inputs[3].data, residual, y);
}

/* The compiled kernel of the call and its constants, if there is one for this size. */
static OrtStatus *choose(Call *call, Scratch *scratch) {
  const Kernel *kernel = call->kernel;
  const Compiled *like = kernel->compiled;
  const int totals = like ? kernel->totals : totals_of(kernel, &call->layer, call->inputs);
  if (totals == WIDE) return NULL;
  if (!like) like = find_compiled(kind_of(kernel), &call->layer, &kernel->epilogue, totals, NULL);
  if (like) call->compiled = find_compiled(like->kind, &call->layer, &kernel->epilogue, totals, like);
  if (!call->compiled) return NULL;
  call->constants = kernel->constants;
  if (!call->constants) {
    char *packed = take(scratch, packing(call->compiled).bytes);
    if (!packed) return no_memory();
    pack(kernel, call->compiled, call->inputs, packed);
    call->constants = packed;
  }
  return NULL;
}

static OrtStatus *memory_for(Call *call, Scratch *scratch, int aligned) {
  const Layer *layer = &call->layer;
  const int fused = call->kernel->epilogue.fused, compiled = call->compiled != NULL;
  if (fused == compiled) return NULL; /* each layout is the one that is needed */
  int64_t in = blocks(layer->channels) * LANES * call->in_pixels, out = blocks(layer->outputs) * LANES * call->out_pixels;
  if (compiled && !call->compiled->blocked) in = aligned ? 0 : layer->channels * call->in_pixels;
  if (fused && !takes_blocks(call->kernel->op)) in = 0;
  if (in && !(call->in = take(scratch, in * call->bytes))) return no_memory();
  if (!(call->out = take(scratch, out * 4))) return no_memory();
  return NULL;
}

static OrtStatus *check_inputs(const Kernel *kernel, const Input *inputs, Layer *layer) {
  const Input *x = &inputs[0];
  if (x->rank != kernel->op->rank) return refuse("ai.anncvt: x must be [N, C, H, W], or blocked [N, C/16, H, W, 16]");
  TRY(take_weight(&inputs[1], layer));
  layer->height = x->dimensions[2];
  layer->width = x->dimensions[3];
  const int64_t channels = takes_blocks(kernel->op) ? blocks(layer->channels) : layer->channels;
  if (x->dimensions[1] != channels || (takes_blocks(kernel->op) && x->dimensions[4] != LANES))
    return refuse("ai.anncvt: x does not have the channels that the weights expect");
  TRY(check_size(layer));
  if (kernel->op->op == CONVOLUTION && taps_of(layer) > 1 << 16)
    return refuse("ai.anncvt: a filter of a convolution has more than 2^16 taps");
  if (!kernel->epilogue.fused) return NULL;
  TRY(check_lanes(kernel, &inputs[2], &inputs[3]));
  if (!kernel->epilogue.residual) return NULL;
  const int64_t wanted[] = {x->dimensions[0], blocks(layer->outputs), out_height(layer), out_width(layer), LANES};
  if (inputs[4].rank != MOST_RANK || memcmp(inputs[4].dimensions, wanted, sizeof wanted))
    return refuse("ai.anncvt: the residual must have the shape of y");
  return NULL;
}

static int is_aligned(const void *pointer) { return (uintptr_t)pointer % ALIGNMENT == 0; }

static OrtStatus *run_adder(Call *call, OrtKernelContext *context, Scratch *scratch) {
  const Kernel *kernel = call->kernel;
  const Input *inputs = call->inputs;
  const int fused = kernel->epilogue.fused;
  call->layer = kernel->layer;
  TRY(check_inputs(kernel, inputs, &call->layer));
  const Layer *layer = &call->layer;
  const int64_t images = inputs[0].dimensions[0], height = out_height(layer), width = out_width(layer);
  const int64_t shape[] = {images, fused ? blocks(layer->outputs) : layer->outputs, height, width, LANES};
  OrtValue *value;
  char *y;
  TRY(KernelContext_GetOutput(context, 0, shape, fused ? 5 : 4, &value));
  TRY(GetTensorMutableData(value, (void **)&y));
  call->in_pixels = layer->height * layer->width;
  call->out_pixels = height * width;
  call->bytes = of_integers(kernel->op) ? 1 : 4;
  TRY(choose(call, scratch));
  const int64_t channels = takes_blocks(kernel->op) ? blocks(layer->channels) * LANES : layer->channels;
  const int64_t in_step = channels * call->in_pixels * call->bytes;
  const int64_t out_bytes = kernel->op->result == TYPE_UINT8 ? 1 : 4;
  const int64_t out_step = (fused ? blocks(layer->outputs) * LANES : layer->outputs) * call->out_pixels * out_bytes;
  const char *x = inputs[0].data, *residual = kernel->epilogue.residual ? inputs[4].data : NULL;
  /* Only buffers of a caller are less aligned than compiled kernels need. */
  if (fused && !(is_aligned(x) && is_aligned(y) && is_aligned(residual))) call->compiled = NULL;
  if (fused && call->compiled && of_integers(kernel->op) && images)
    return call_compiled(context, call->compiled, images, x, call->constants, residual, y);
  TRY(memory_for(call, scratch, is_aligned(x) && (images == 1 || in_step % ALIGNMENT == 0)));
  for (int64_t image = 0; image < images; ++image)
    TRY(compute_image(call, x + image * in_step, residual ? residual + image * out_step : NULL, y + image * out_step));
  return NULL;
}

OrtStatus *compute(void *memory, OrtKernelContext *context) {
  const Kernel *kernel = memory;
  Input inputs[MOST_RANK];
  for (int i = 0; i < kernel->op->inputs; ++i) {
    const OrtValue *value;
    TRY(KernelContext_GetInput(context, i, &value));
    TRY(describe(value, &inputs[i]));
  }
  if (!has_weights(kernel->op)) return compute_between(kernel, context, inputs);
  Scratch scratch = {{NULL}, 0};
  Call call;
  memset(&call, 0, sizeof call);
  call.context = context;
  call.kernel = kernel;
  call.inputs = inputs;
  OrtStatus *status = run_adder(&call, context, &scratch);
  finish(&scratch);
  return status;
}
