/* Shapes of outputs, when a model is loaded. What is not known yet is left open. */
#include <string.h>

#include "op.h"

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

OrtStatus *infer(const OrtCustomOp *callbacks, OrtShapeInferContext *context) {
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
  if (op->op == MAX_POOL) {
    TRY(shape_attribute(context, "kernel_shape", layer.kernel, 2));
  } else {
    TRY(input_shape(context, 1, &weight, &unused));
    if (weight.rank != 4 || !known(weight.dimensions, 4)) return NULL;
  }
  TRY(shape_attribute(context, "strides", layer.strides, 2));
  TRY(shape_attribute(context, "pads", layer.pads, 4));
  TRY(shape_attribute(context, "dilations", layer.dilations, 2));
  layer.groups = 1; /* the size does not depend on it */
  TRY(check_window(&layer));
  if (op->op != MAX_POOL) TRY(take_weight(&weight, &layer));
  layer.height = size[2];
  layer.width = size[3];
  TRY(check_size(&layer));
  const int in_blocks = takes_blocks(op) || op->fused;
  if (op->op != MAX_POOL) shape[1] = in_blocks ? blocks(layer.outputs) : layer.outputs;
  shape[2] = out_height(&layer);
  shape[3] = out_width(&layer);
  return set_shape(context, op->result, shape, in_blocks ? 5 : 4, batch);
}
