/* onnxruntime's threads for loops of ours and for the parallel loops of compiled kernels. */
#include <stdatomic.h>

#include "compiled.h"

/* Tasks of a parallel loop of a kernel: more than threads, so that a slow one does not keep the others waiting. */
enum { TASKS = 16 };

static _Thread_local const OrtKernelContext *calling;

typedef struct {
  int (*body)(int, ParallelEnvironment *, void *);
  ParallelEnvironment environment;
  void *data;
  atomic_int failed;
} Loop;

OrtStatus *parallel(const OrtKernelContext *context, int64_t count, void (*task)(void *, size_t), void *data) {
  if (count > 1) return KernelContext_ParallelFor(context, task, (size_t)count, 0, data);
  if (count == 1) task(data, 0);
  return NULL;
}

static void run(void *data, size_t task) {
  Loop *loop = data;
  if (loop->body((int)task, &loop->environment, loop->data)) atomic_store(&loop->failed, 1);
}

void use_context(const OrtKernelContext *context) { calling = context; }

/* What TVM's runtime provides to compiled kernels. They call through these pointers. */
static int launch(int (*body)(int, ParallelEnvironment *, void *), void *data, int tasks) {
  Loop loop = {body, {NULL, tasks > 0 ? tasks : TASKS}, data, 0};
  OrtStatus *status = parallel(calling, loop.environment.tasks, run, &loop);
  if (!status) return atomic_load(&loop.failed) ? -1 : 0;
  ReleaseStatus(status);
  return -1;
}

static void *allocate(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return workspace(bytes);
}

static int give_back(int device, int id, void *memory) {
  (void)device, (void)id;
  release(memory);
  return 0;
}

int (*__TVMBackendParallelLaunch)(int (*)(int, ParallelEnvironment *, void *), void *, int) = launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give_back;

/* Kernels explain a refused argument; what they are called with follows from their own description. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}
