/* The ops, and what creating, calling and shaping them shares. */
#ifndef ANNCVT_OP_H
#define ANNCVT_OP_H

#include "layer.h"

enum { ADDER, CONVOLUTION, BLOCK, UNBLOCK, MAX_POOL }; /* what an op does */
enum { MOST_RANK = 5 };

typedef struct {
  OrtCustomOp callbacks; /* first: onnxruntime hands out a pointer to it */
  int op, fused, residual;
  int inputs, rank, type, result; /* type: of x and of the weights; result: of y */
  const char *name;
} Op;

static inline int of_integers(const Op *op) { return op->type != TYPE_FLOAT; }
static inline int has_weights(const Op *op) { return op->op == ADDER || op->op == CONVOLUTION; }
static inline int takes_blocks(const Op *op) { return op->rank == MOST_RANK; } /* else x is plain */

typedef struct {
  const Op *op;
  Layer layer; /* sizes come with the input; of a pool only the window */
  Epilogue epilogue;
  int64_t channels; /* of Unblock */
  uint8_t pad_value;
  const Compiled *compiled; /* for this layer at some size */
  int totals;               /* of constant weights, for which there is such a kernel */
  char *constants;          /* packed for it, where the weights are constant */
} Kernel;

typedef struct {
  int64_t rank, dimensions[MOST_RANK];
  void *data;
} Input;

/* ops.c: errors, descriptions of inputs, and checks. */
OrtStatus *refuse(const char *message);
OrtStatus *dimensions_of(const OrtTensorTypeAndShapeInfo *info, Input *input);
OrtStatus *take_weight(const Input *weight, Layer *layer); /* sets what belongs to the weights in the layer */
OrtStatus *check_window(const Layer *layer);
OrtStatus *check_size(const Layer *layer);

/* between.c: ops that are no adders. */
OrtStatus *compute_between(const Kernel *kernel, OrtKernelContext *context, const Input *inputs);

/* What onnxruntime calls: of ops.c, and of shapes.c. */
OrtStatus *create(const OrtCustomOp *callbacks, OrtApi *api, const OrtKernelInfo *info, void **made);
void destroy(void *memory);
OrtStatus *compute(void *memory, OrtKernelContext *context);
OrtStatus *infer(const OrtCustomOp *callbacks, OrtShapeInferContext *context);

#endif
