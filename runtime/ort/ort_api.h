/* The part of onnxruntime's C API that the library uses, of API version 17 (onnxruntime 1.17).

   onnxruntime hands out a table of functions that only grows at its end, so an entry is known by its index for good.
   Names, types and the order are those of onnxruntime_c_api.h. */
#ifndef ANNCVT_ORT_API_H
#define ANNCVT_ORT_API_H

#include <stddef.h>
#include <stdint.h>

enum { API_VERSION = 17 };

/* ONNXTensorElementDataType */
enum { TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_INT32 = 6, TYPE_INT64 = 7 };
/* OrtErrorCode */
enum { FAILED = 1, INVALID_ARGUMENT = 2 };
/* OrtOpAttrType */
enum { ATTRIBUTE_INT = 1, ATTRIBUTE_INTS = 2 };

typedef struct OrtStatus OrtStatus; /* NULL: no error */
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtOpAttr OrtOpAttr;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtCustomOp OrtCustomOp;
typedef void *const OrtApi; /* the first entry of the table */

typedef struct {
  OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *, OrtKernelContext *);
  void (*KernelDestroy)(void *);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
};

extern OrtApi *ort; /* set when the library is registered */

#define ENTRY(index, result, ...) ((result(*)(__VA_ARGS__))ort[index])

#define CreateStatus ENTRY(0, OrtStatus *, int, const char *)
#define CreateCustomOpDomain ENTRY(26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define CustomOpDomain_Add ENTRY(27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)
#define AddCustomOpDomain ENTRY(28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define GetTensorMutableData ENTRY(51, OrtStatus *, OrtValue *, void **)
#define CreateTensorTypeAndShapeInfo ENTRY(57, OrtStatus *, OrtTensorTypeAndShapeInfo **)
#define SetTensorElementType ENTRY(58, OrtStatus *, OrtTensorTypeAndShapeInfo *, int)
#define SetDimensions ENTRY(59, OrtStatus *, OrtTensorTypeAndShapeInfo *, const int64_t *, size_t)
#define GetDimensionsCount ENTRY(61, OrtStatus *, const OrtTensorTypeAndShapeInfo *, size_t *)
#define GetDimensions ENTRY(62, OrtStatus *, const OrtTensorTypeAndShapeInfo *, int64_t *, size_t)
#define GetSymbolicDimensions ENTRY(63, OrtStatus *, const OrtTensorTypeAndShapeInfo *, const char **, size_t)
#define GetTensorTypeAndShape ENTRY(65, OrtStatus *, const OrtValue *, OrtTensorTypeAndShapeInfo **)
#define KernelInfoGetAttribute_float ENTRY(85, OrtStatus *, const OrtKernelInfo *, const char *, float *)
#define KernelInfoGetAttribute_int64 ENTRY(86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define KernelContext_GetInput ENTRY(90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define KernelContext_GetOutput \
  ENTRY(91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define ReleaseStatus ENTRY(93, void, OrtStatus *)
#define ReleaseTensorTypeAndShapeInfo ENTRY(99, void, OrtTensorTypeAndShapeInfo *)
#define KernelInfoGetAttributeArray_int64 \
  ENTRY(163, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *, size_t *)
#define KernelInfoGetConstantInput_tensor \
  ENTRY(249, OrtStatus *, const OrtKernelInfo *, size_t, int *, const OrtValue **)
#define ShapeInferContext_GetInputTypeShape \
  ENTRY(268, OrtStatus *, const OrtShapeInferContext *, size_t, OrtTensorTypeAndShapeInfo **)
#define ShapeInferContext_GetAttribute \
  ENTRY(269, OrtStatus *, const OrtShapeInferContext *, const char *, const OrtOpAttr **)
#define ShapeInferContext_SetOutputTypeShape \
  ENTRY(270, OrtStatus *, const OrtShapeInferContext *, size_t, const OrtTensorTypeAndShapeInfo *)
#define SetSymbolicDimensions ENTRY(271, OrtStatus *, OrtTensorTypeAndShapeInfo *, const char **, size_t)
#define ReadOpAttr ENTRY(272, OrtStatus *, const OrtOpAttr *, int, void *, size_t, size_t *)
#define KernelContext_ParallelFor \
  ENTRY(274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)

/* Return the status of a call from the function around it, if there is one. */
#define TRY(call)                      \
  do {                                 \
    OrtStatus *status_ = (call);       \
    if (status_) return status_;       \
  } while (0)

#endif
