/* The ops of the domain ai.anncvt, version 1, for onnxruntime's CPU provider.

   Adder2d(x, w)                                     float, [N, C, H, W]
   AdderInteger2d(x, w)                              uint8 -> int32
   Block(x), Unblock(x) <channels>                   float, [N, C, H, W] <-> [N, ceil(C/16), H, W, 16]
   FusedAdder2d(x, w, scale, shift)                  float, blocked: clip(scale * adder + shift, low, high)
   FusedAdder2dResidual(x, w, scale, shift, residual)  the same with a blocked residual added before the clip
   BlockInteger, UnblockInteger, FusedAdderInteger2d(x, w, multiplier, bias), FusedAdderInteger2dResidual(..., residual)
                                                     the same of uint8, requantised in int64
   FusedConvInteger2d(x, w, multiplier, bias)        uint8 [N, C, H, W] -> blocked uint8, requantised convolution
   FusedConvInteger2dBlocked(x, w, multiplier, bias), FusedConvInteger2dBlockedResidual(..., residual)
                                                     the same of blocked x
   MaxPoolInteger(x)                                 uint8, blocked

   The definitions in standard operators are what anncvt writes into a model. */
#include <pthread.h>

#include "op.h"

OrtApi *ort;

static const char *name_of(const OrtCustomOp *op) { return ((const Op *)op)->name; }
static const char *provider_of(const OrtCustomOp *op) { return (void)op, NULL; }
static size_t inputs_of(const OrtCustomOp *op) { return (size_t)((const Op *)op)->inputs; }
static size_t outputs_of(const OrtCustomOp *op) { return (void)op, (size_t)1; }
static int type_of(const OrtCustomOp *callbacks, size_t index) {
  const Op *op = (const Op *)callbacks;
  if (op->fused && of_integers(op) && index == 2) return TYPE_INT32; /* multiplier */
  if (op->fused && of_integers(op) && index == 3) return TYPE_INT64; /* bias */
  return op->type;
}
static int result_of(const OrtCustomOp *op, size_t index) { return (void)index, ((const Op *)op)->result; }
static int required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }

#define OP(op, fused, residual, name, inputs, rank, type, result)                                                                    \
  {                                                                                                                 \
    {API_VERSION, NULL,     name_of,  provider_of, type_of, inputs_of, result_of, outputs_of, NULL,    destroy, required, \
     required,    required, one,      one,         one,     one,       create,    compute,    infer,   one,     one},     \
        op, fused, residual, inputs, rank, type, result, name                                                                        \
  }

static const Op ops[] = {
    OP(ADDER, 0, 0, "Adder2d", 2, 4, TYPE_FLOAT, TYPE_FLOAT),
    OP(ADDER, 0, 0, "AdderInteger2d", 2, 4, TYPE_UINT8, TYPE_INT32),
    OP(ADDER, 1, 0, "FusedAdder2d", 4, 5, TYPE_FLOAT, TYPE_FLOAT),
    OP(ADDER, 1, 1, "FusedAdder2dResidual", 5, 5, TYPE_FLOAT, TYPE_FLOAT),
    OP(ADDER, 1, 0, "FusedAdderInteger2d", 4, 5, TYPE_UINT8, TYPE_UINT8),
    OP(ADDER, 1, 1, "FusedAdderInteger2dResidual", 5, 5, TYPE_UINT8, TYPE_UINT8),
    OP(CONVOLUTION, 1, 0, "FusedConvInteger2d", 4, 4, TYPE_UINT8, TYPE_UINT8),
    OP(CONVOLUTION, 1, 0, "FusedConvInteger2dBlocked", 4, 5, TYPE_UINT8, TYPE_UINT8),
    OP(CONVOLUTION, 1, 1, "FusedConvInteger2dBlockedResidual", 5, 5, TYPE_UINT8, TYPE_UINT8),
    OP(BLOCK, 0, 0, "Block", 1, 4, TYPE_FLOAT, TYPE_FLOAT),
    OP(BLOCK, 0, 0, "BlockInteger", 1, 4, TYPE_UINT8, TYPE_UINT8),
    OP(UNBLOCK, 0, 0, "Unblock", 1, 5, TYPE_FLOAT, TYPE_FLOAT),
    OP(UNBLOCK, 0, 0, "UnblockInteger", 1, 5, TYPE_UINT8, TYPE_UINT8),
    OP(MAX_POOL, 0, 0, "MaxPoolInteger", 1, 5, TYPE_UINT8, TYPE_UINT8),
};
enum { OPS = sizeof ops / sizeof *ops };

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
