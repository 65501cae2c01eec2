/* Calls one compiled kernel without TVM's runtime: run_kernel CODE:BITS:D0xD1x...:FILE ...; the last file is written.

   CODE and BITS are DLPack's. A parallel loop runs as TASKS tasks, one after the other. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>

enum { ARGUMENTS = 16, DIMENSIONS = 8, TASKS = 3 };

int __tvm_ffi_kernel(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);

static void *allocate(int device, int id, uint64_t size, int code, int bits) {
  return aligned_alloc(64, (size + 63) / 64 * 64);
}

static int release(int device, int id, void *pointer) {
  free(pointer);
  return 0;
}

static int launch(FTVMParallelLambda body, void *data, int tasks) {
  TVMParallelGroupEnv environment = {NULL, TASKS};
  for (int task = 0; task < TASKS; ++task)
    if (body(task, &environment, data)) return -1;
  return 0;
}

/* What a loader sets to TVM's runtime. */
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;
int (*__TVMBackendParallelLaunch)(FTVMParallelLambda, void *, int) = launch;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

int main(int count, char **words) {
  static DLTensor tensors[ARGUMENTS];
  static int64_t shapes[ARGUMENTS][DIMENSIONS];
  static TVMFFIAny arguments[ARGUMENTS];
  const char *path = NULL;
  size_t size = 0;
  for (int i = 0; i < count - 1; ++i) {
    DLTensor *tensor = &tensors[i];
    char *rest = words[i + 1];
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = (uint8_t)strtol(rest, &rest, 10);
    tensor->dtype.bits = (uint8_t)strtol(rest + 1, &rest, 10);
    tensor->dtype.lanes = 1;
    size = tensor->dtype.bits / 8;
    do {
      size *= shapes[i][tensor->ndim++] = strtol(rest + 1, &rest, 10);
    } while (*rest == 'x');
    tensor->shape = shapes[i];
    tensor->data = allocate(0, 0, size, 0, 0);
    path = rest + 1;
    FILE *file = fopen(path, "rb");
    if (!file || fread(tensor->data, 1, size, file) != size) return 2;
    fclose(file);
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = tensor;
  }
  TVMFFIAny result = {0};
  if (__tvm_ffi_kernel(NULL, arguments, count - 1, &result)) return 1;
  FILE *file = fopen(path, "wb");
  return !file || fwrite(tensors[count - 2].data, 1, size, file) != size || fclose(file);
}
