/* The ops of the domain ai.anncvt, version 1, for onnxruntime's CPU provider.

   Adder2d(x, w)                                     float, [N, C, H, W]
   AdderInteger2d(x, w)                              uint8 -> int32
   Block(x), Unblock(x) <channels>                   float, [N, C, H, W] <-> [N, ceil(C/16), H, W, 16]
   FusedAdder2d(x, w, scale, shift)                  float, blocked: clip(scale * adder + shift, low, high)
   FusedAdder2dResidual(x, w, scale, shift, residual)  the same with a blocked residual added before the clip

   The definitions in standard operators are what anncvt writes into a model. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"

OrtApi *ort;

enum { ADDER, INTEGER, FUSED, FUSED_RESIDUAL, BLOCK, UNBLOCK, OPS };
enum { MOST_RANK = 5 };

typedef struct {
  OrtCustomOp callbacks; /* first: onnxruntime hands out a pointer to it */
  int op, inputs, rank, type, result;
  const char *name;
} Op;

typedef struct {
  const Op *op;
  Layer layer; /* sizes come with the input */
  Epilogue epilogue;
  int64_t channels; /* of Unblock */
  uint8_t pad_value;
  const Compiled *compiled; /* for this layer at some size */
  char *constants;          /* packed for it, where the weights are constant */
} Kernel;

typedef struct {
  int64_t rank, dimensions[MOST_RANK];
  void *data;
} Input;

static OrtStatus *refuse(const char *message) { return CreateStatus(INVALID_ARGUMENT, message); }
static OrtStatus *no_memory(void) { return CreateStatus(FAILED, "ai.anncvt: out of memory"); }

static OrtStatus *dimensions_of(const OrtTensorTypeAndShapeInfo *info, Input *input) {
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

/* The weights set what belongs to them in the layer. */
static OrtStatus *take_weight(const Input *weight, Layer *layer) {
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

static OrtStatus *check_window(const Layer *layer) {
  if (!positive(layer->strides, 2) || !positive(layer->dilations, 2) || !positive(&layer->groups, 1))
    return refuse("ai.anncvt: strides, dilations and group must be positive");
  for (int i = 0; i < 4; ++i)
    if (layer->pads[i] < 0 || layer->pads[i] > INT32_MAX) return refuse("ai.anncvt: pads must not be negative");
  return NULL;
}

static OrtStatus *check_size(const Layer *layer) {
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
  return refuse("ai.anncvt: strides and dilations must have 2 entries, pads 4");
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

static OrtStatus *read_attributes(const OrtKernelInfo *info, Kernel *kernel) {
  const int op = kernel->op->op;
  if (op == BLOCK) return NULL;
  if (op == UNBLOCK) {
    TRY(KernelInfoGetAttribute_int64(info, "channels", &kernel->channels));
    return positive(&kernel->channels, 1) ? NULL : refuse("ai.anncvt: channels must be positive");
  }
  TRY(read_window(info, &kernel->layer));
  if (op == INTEGER) {
    int64_t value = 0;
    OrtStatus *absent = KernelInfoGetAttribute_int64(info, "pad_value", &value);
    if (absent) ReleaseStatus(absent);
    if (value < 0 || value > 255) return refuse("ai.anncvt: pad_value must be 0 to 255");
    kernel->pad_value = (uint8_t)value;
  }
  if (op == FUSED || op == FUSED_RESIDUAL) {
    kernel->epilogue.fused = 1;
    kernel->epilogue.residual = op == FUSED_RESIDUAL;
    TRY(KernelInfoGetAttribute_float(info, "low", &kernel->epilogue.low));
    TRY(KernelInfoGetAttribute_float(info, "high", &kernel->epilogue.high));
  }
  return NULL;
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
    return refuse("ai.anncvt: scale and shift must be [O]");
  return NULL;
}

static int kind_of(const Kernel *kernel) { return kernel->op->op == INTEGER ? INTEGER_ADDER : FLOAT_ADDER; }

static void pack(const Kernel *kernel, const Compiled *compiled, const Input *inputs, char *memory) {
  if (kernel->op->op == INTEGER)
    pack_integer(compiled, inputs[1].data, kernel->pad_value, memory);
  else
    pack_float(compiled, inputs[1].data, kernel->epilogue.fused ? inputs[2].data : NULL,
               kernel->epilogue.fused ? inputs[3].data : NULL, memory);
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
  kernel->compiled = find_compiled(kind_of(kernel), &kernel->layer, &kernel->epilogue, NULL);
  if (!kernel->compiled) return NULL;
  kernel->constants = aligned_alloc(ALIGNMENT, packing(kernel->compiled).bytes);
  if (!kernel->constants) return no_memory();
  pack(kernel, kernel->compiled, inputs, kernel->constants);
  return NULL;
}

static void destroy(void *memory) {
  Kernel *kernel = memory;
  free(kernel->constants);
  free(kernel);
}

static OrtStatus *create(const OrtCustomOp *callbacks, OrtApi *api, const OrtKernelInfo *info, void **made) {
  (void)api;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return no_memory();
  kernel->op = (const Op *)callbacks;
  OrtStatus *status = read_attributes(info, kernel);
  if (!status && kernel->op->op < BLOCK) status = prepare(info, kernel);
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

/* A call of an adder for one image; x, residual and y are blocked where the op says so. */
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

static void fuse(void *data, size_t task);

typedef struct {
  const Call *call;
  const float *residual;
  float *y;
} Fusion;

static OrtStatus *compute_image(const Call *call, const char *x, const char *residual, char *y) {
  const Layer *layer = &call->layer;
  const Kernel *kernel = call->kernel;
  const OrtKernelContext *context = call->context;
  if (call->compiled) {
    if (kernel->epilogue.fused)
      return call_compiled(context, call->compiled, x, call->constants, residual, y);
    if (call->compiled->blocked)
      TRY(block(context, x, call->in, layer->channels, call->in_pixels, call->bytes));
    else if (call->in)
      memcpy(call->in, x, layer->channels * call->in_pixels * call->bytes);
    TRY(call_compiled(context, call->compiled, call->in ? call->in : x, call->constants, NULL, call->out));
    return unblock(context, call->out, y, layer->outputs, call->out_pixels, 4);
  }
  if (kernel->op->op == INTEGER)
    return adder_integer(context, layer, (const uint8_t *)x, call->inputs[1].data, kernel->pad_value, (int32_t *)y);
  if (!kernel->epilogue.fused)
    return adder_float(context, layer, (const float *)x, call->inputs[1].data, (float *)y);
  TRY(unblock(context, x, call->in, layer->channels, call->in_pixels, 4));
  TRY(adder_float(context, layer, call->in, call->inputs[1].data, call->out));
  Fusion fusion = {call, (const float *)residual, (float *)y};
  return parallel(context, blocks(layer->outputs), fuse, &fusion);
}

/* The end of a fused layer in plain loops: 16 channels of plain sums to the blocked result. */
static void fuse(void *data, size_t task) {
  const Fusion *fusion = data;
  const Call *call = fusion->call;
  const Epilogue *end = &call->kernel->epilogue;
  const int64_t pixels = call->out_pixels, base = (int64_t)task * pixels * LANES;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const int64_t o = (int64_t)task * LANES + lane;
    const int inside = o < call->layer.outputs;
    const float scale = inside ? ((const float *)call->inputs[2].data)[o] : 0;
    const float shift = inside ? ((const float *)call->inputs[3].data)[o] : 0;
    const float *sums = (const float *)call->out + o * pixels;
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t at = base + p * LANES + lane;
      float value = 0;
      if (inside) {
        value = scale * sums[p] + shift + (fusion->residual ? fusion->residual[at] : 0);
        value = value < end->low ? end->low : value > end->high ? end->high : value;
      }
      fusion->y[at] = value;
    }
  }
}

/* The compiled kernel of the call and its constants, if there is one for this size. */
static OrtStatus *choose(Call *call, Scratch *scratch) {
  const Kernel *kernel = call->kernel;
  const Compiled *like = kernel->compiled;
  if (!like) like = find_compiled(kind_of(kernel), &call->layer, &kernel->epilogue, NULL);
  if (like) call->compiled = find_compiled(kind_of(kernel), &call->layer, &kernel->epilogue, like);
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
  const int64_t channels = kernel->epilogue.fused ? blocks(layer->channels) : layer->channels;
  if (x->dimensions[1] != channels || (kernel->epilogue.fused && x->dimensions[4] != LANES))
    return refuse("ai.anncvt: x does not have the channels that the weights expect");
  TRY(check_size(layer));
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
  call->bytes = kernel->op->type == TYPE_UINT8 ? 1 : 4;
  TRY(choose(call, scratch));
  const int64_t in_step = (fused ? blocks(layer->channels) * LANES : layer->channels) * call->in_pixels * call->bytes;
  const int64_t out_step = (fused ? blocks(layer->outputs) * LANES : layer->outputs) * call->out_pixels * 4;
  const char *x = inputs[0].data, *residual = kernel->epilogue.residual ? inputs[4].data : NULL;
  const int aligned = is_aligned(x) && (images == 1 || in_step % ALIGNMENT == 0);
  /* Only buffers of a caller are less aligned than compiled kernels need. */
  if (fused && !(aligned && is_aligned(y) && is_aligned(residual))) call->compiled = NULL;
  TRY(memory_for(call, scratch, aligned));
  for (int64_t image = 0; image < images; ++image)
    TRY(compute_image(call, x + image * in_step, residual ? residual + image * out_step : NULL, y + image * out_step));
  return NULL;
}

static OrtStatus *change_layout(const Kernel *kernel, OrtKernelContext *context, const Input *x) {
  const int to_blocks = kernel->op->op == BLOCK;
  const int64_t *size = x->dimensions;
  if (x->rank != kernel->op->rank || (!to_blocks && size[4] != LANES))
    return refuse("ai.anncvt: Block takes [N, C, H, W], Unblock [N, ceil(C/16), H, W, 16]");
  const int64_t channels = to_blocks ? size[1] : kernel->channels, pixels = size[2] * size[3];
  if (!to_blocks && size[1] != blocks(channels)) return refuse("ai.anncvt: Unblock has other channels than x");
  const int64_t shape[] = {size[0], to_blocks ? blocks(channels) : channels, size[2], size[3], LANES};
  OrtValue *value;
  float *y;
  TRY(KernelContext_GetOutput(context, 0, shape, to_blocks ? 5 : 4, &value));
  TRY(GetTensorMutableData(value, (void **)&y));
  const int64_t plain = channels * pixels, blocked = blocks(channels) * LANES * pixels;
  for (int64_t image = 0; image < size[0]; ++image) {
    const float *from = (const float *)x->data + image * (to_blocks ? plain : blocked);
    float *to = y + image * (to_blocks ? blocked : plain);
    TRY((to_blocks ? block : unblock)(context, from, to, channels, pixels, 4));
  }
  return NULL;
}

static OrtStatus *compute(void *memory, OrtKernelContext *context) {
  const Kernel *kernel = memory;
  Input inputs[MOST_RANK];
  for (int i = 0; i < kernel->op->inputs; ++i) {
    const OrtValue *value;
    TRY(KernelContext_GetInput(context, i, &value));
    TRY(describe(value, &inputs[i]));
  }
  if (kernel->op->op >= BLOCK) return change_layout(kernel, context, inputs);
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

/* Shapes of outputs, when a model is loaded. What is not known yet is left open. */

static OrtStatus *shape_attribute(const OrtShapeInferContext *context, const char *name, int64_t *values, size_t count) {
  const OrtOpAttr *attribute;
  size_t bytes;
  TRY(ShapeInferContext_GetAttribute(context, name, &attribute));
  return ReadOpAttr(attribute, count == 1 ? ATTRIBUTE_INT : ATTRIBUTE_INTS, values, count * sizeof *values, &bytes);
}

static OrtStatus *input_shape(const OrtShapeInferContext *context, size_t index, Input *input, const char **batch) {
  OrtTensorTypeAndShapeInfo *info; /* belongs to the context */
  const char *names[MOST_RANK];
  TRY(ShapeInferContext_GetInputTypeShape(context, index, &info));
  TRY(dimensions_of(info, input));
  *batch = "";
  if (!input->rank) return NULL;
  TRY(GetSymbolicDimensions(info, names, (size_t)input->rank));
  *batch = names[0];
  return NULL;
}

static int known(const int64_t *sizes, int count) {
  for (int i = 0; i < count; ++i)
    if (sizes[i] < 1) return 0;
  return 1;
}

static OrtStatus *set_shape(OrtShapeInferContext *context, int type, const int64_t *shape, int rank, const char *batch) {
  const char *names[MOST_RANK] = {batch, "", "", "", ""};
  OrtTensorTypeAndShapeInfo *info;
  TRY(CreateTensorTypeAndShapeInfo(&info));
  OrtStatus *status = SetTensorElementType(info, type);
  if (!status) status = SetDimensions(info, shape, (size_t)rank);
  if (!status) status = SetSymbolicDimensions(info, names, (size_t)rank);
  if (!status) status = ShapeInferContext_SetOutputTypeShape(context, 0, info);
  ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

static OrtStatus *infer(const OrtCustomOp *callbacks, OrtShapeInferContext *context) {
  const Op *op = (const Op *)callbacks;
  Input x, weight;
  const char *batch, *unused;
  TRY(input_shape(context, 0, &x, &batch));
  const int64_t *size = x.dimensions;
  if (x.rank != op->rank || !known(size + 1, op->rank - 1) || (size[0] < 1 && !*batch)) return NULL;
  int64_t shape[] = {size[0], size[1], size[2], size[3], LANES};
  if (op->op == BLOCK) {
    shape[1] = blocks(size[1]);
    return set_shape(context, op->result, shape, 5, batch);
  }
  if (op->op == UNBLOCK) {
    TRY(shape_attribute(context, "channels", &shape[1], 1));
    return set_shape(context, op->result, shape, 4, batch);
  }
  Layer layer;
  memset(&layer, 0, sizeof layer);
  TRY(input_shape(context, 1, &weight, &unused));
  if (weight.rank != 4 || !known(weight.dimensions, 4)) return NULL;
  TRY(shape_attribute(context, "strides", layer.strides, 2));
  TRY(shape_attribute(context, "pads", layer.pads, 4));
  TRY(shape_attribute(context, "dilations", layer.dilations, 2));
  layer.groups = 1; /* the size does not depend on it */
  TRY(check_window(&layer));
  TRY(take_weight(&weight, &layer));
  layer.height = size[2];
  layer.width = size[3];
  TRY(check_size(&layer));
  shape[1] = op->rank == 5 ? blocks(layer.outputs) : layer.outputs;
  shape[2] = out_height(&layer);
  shape[3] = out_width(&layer);
  return set_shape(context, op->result, shape, op->rank, batch);
}

/* Registration. */

static const char *name_of(const OrtCustomOp *op) { return ((const Op *)op)->name; }
static const char *provider_of(const OrtCustomOp *op) { return (void)op, NULL; }
static size_t inputs_of(const OrtCustomOp *op) { return (size_t)((const Op *)op)->inputs; }
static size_t outputs_of(const OrtCustomOp *op) { return (void)op, (size_t)1; }
static int type_of(const OrtCustomOp *op, size_t index) { return (void)index, ((const Op *)op)->type; }
static int result_of(const OrtCustomOp *op, size_t index) { return (void)index, ((const Op *)op)->result; }
static int required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }

#define OP(op, name, inputs, rank, type, result)                                                                    \
  {                                                                                                                 \
    {API_VERSION, NULL,     name_of,  provider_of, type_of, inputs_of, result_of, outputs_of, NULL,    destroy, required, \
     required,    required, one,      one,         one,     one,       create,    compute,    infer,   one,     one},     \
        op, inputs, rank, type, result, name                                                                        \
  }

static const Op ops[OPS] = {
    OP(ADDER, "Adder2d", 2, 4, TYPE_FLOAT, TYPE_FLOAT),
    OP(INTEGER, "AdderInteger2d", 2, 4, TYPE_UINT8, TYPE_INT32),
    OP(FUSED, "FusedAdder2d", 4, 5, TYPE_FLOAT, TYPE_FLOAT),
    OP(FUSED_RESIDUAL, "FusedAdder2dResidual", 5, 5, TYPE_FLOAT, TYPE_FLOAT),
    OP(BLOCK, "Block", 1, 4, TYPE_FLOAT, TYPE_FLOAT),
    OP(UNBLOCK, "Unblock", 1, 5, TYPE_FLOAT, TYPE_FLOAT),
};

static pthread_mutex_t registering = PTHREAD_MUTEX_INITIALIZER;
static OrtCustomOpDomain *domain; /* as long as the process: sessions refer to it */

static OrtStatus *make_domain(void) {
  if (domain) return NULL;
  OrtCustomOpDomain *made;
  TRY(CreateCustomOpDomain("ai.anncvt", &made));
  for (int i = 0; i < OPS; ++i) TRY(CustomOpDomain_Add(made, &ops[i].callbacks));
  domain = made;
  return NULL;
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  OrtApi *api = base->GetApi(API_VERSION);
  if (!api) { /* older: it has no table of this version, but every table begins with CreateStatus */
    api = base->GetApi(1);
    return api ? ((OrtStatus * (*)(int, const char *)) api[0])(FAILED, "ai.anncvt: needs onnxruntime 1.17 or later")
               : NULL;
  }
  pthread_mutex_lock(&registering);
  OrtStatus *status = NULL;
  if (ort && ort != api)
    status = ((OrtStatus * (*)(int, const char *)) api[0])(
        FAILED, "ai.anncvt: registered with another onnxruntime in this process");
  else
    ort = api;
  if (!status) status = make_domain();
  if (!status) status = AddCustomOpDomain(options, domain);
  pthread_mutex_unlock(&registering);
  return status;
}
