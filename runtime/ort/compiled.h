/* The binary interface of functions compiled by TVM: tensors of DLPack, arguments of TVM's FFI. */
#ifndef ANNCVT_COMPILED_H
#define ANNCVT_COMPILED_H

#include "layer.h"

typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t rank;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  int32_t type_index;
  uint32_t padding;
  void *pointer;
} Argument;

enum { DEVICE_CPU = 1, TENSOR_POINTER = 7 };
/* DLDataTypeCode */
enum { CODE_INT = 0, CODE_UINT = 1, CODE_FLOAT = 2 };

typedef struct {
  void *synchronisation;
  int32_t tasks;
} ParallelEnvironment;

/* parallel.c: kernels called from this thread run on the threads of this session. */
void use_context(const OrtKernelContext *context);

#endif
