// Runs a model in onnxruntime from C++, with the native library: no Python, no headers of onnxruntime.
//
//   run_onnx LIBONNXRUNTIME NATIVE_LIBRARY MODEL THREADS BATCH CHANNELS HEIGHT WIDTH IN OUT
//
// IN and OUT are float32, the input named "image", the output "logits". The session is made and run twice.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ort_api.h"

OrtApi *ort;

struct OrtEnv;
struct OrtSession;
struct OrtMemoryInfo;

#define CreateEnv ENTRY(3, OrtStatus *, int, const char *, OrtEnv **)
#define GetErrorMessage ENTRY(2, const char *, const OrtStatus *)
#define CreateSession ENTRY(7, OrtStatus *, const OrtEnv *, const char *, const OrtSessionOptions *, OrtSession **)
#define Run                                                                                                        \
  ENTRY(9, OrtStatus *, OrtSession *, const void *, const char *const *, const OrtValue *const *, size_t,          \
        const char *const *, size_t, OrtValue **)
#define CreateSessionOptions ENTRY(10, OrtStatus *, OrtSessionOptions **)
#define SetIntraOpNumThreads ENTRY(24, OrtStatus *, OrtSessionOptions *, int)
#define CreateTensorWithDataAsOrtValue                                                                             \
  ENTRY(49, OrtStatus *, const OrtMemoryInfo *, void *, size_t, const int64_t *, size_t, int, OrtValue **)
#define GetTensorShapeElementCount ENTRY(64, OrtStatus *, const OrtTensorTypeAndShapeInfo *, size_t *)
#define CreateCpuMemoryInfo ENTRY(69, OrtStatus *, int, int, OrtMemoryInfo **)
#define ReleaseEnv ENTRY(92, void, OrtEnv *)
#define ReleaseMemoryInfo ENTRY(94, void, OrtMemoryInfo *)
#define ReleaseSession ENTRY(95, void, OrtSession *)
#define ReleaseValue ENTRY(96, void, OrtValue *)
#define ReleaseSessionOptions ENTRY(100, void, OrtSessionOptions *)
#define RegisterCustomOpsLibrary_V2 ENTRY(228, OrtStatus *, OrtSessionOptions *, const char *)

static void check(OrtStatus *status) {
  if (!status) return;
  std::fprintf(stderr, "%s\n", GetErrorMessage(status));
  ReleaseStatus(status);
  std::exit(1);
}

static std::vector<float> run(const OrtEnv *env, char **words, std::vector<float> &image) {
  OrtSessionOptions *options;
  OrtSession *session;
  OrtMemoryInfo *memory;
  OrtValue *input, *output = nullptr;
  OrtTensorTypeAndShapeInfo *info;
  const int64_t shape[] = {std::atoll(words[5]), std::atoll(words[6]), std::atoll(words[7]), std::atoll(words[8])};
  check(CreateSessionOptions(&options));
  check(SetIntraOpNumThreads(options, std::atoi(words[4])));
  check(RegisterCustomOpsLibrary_V2(options, words[2]));
  check(CreateSession(env, words[3], options, &session));
  check(CreateCpuMemoryInfo(0, 0, &memory));
  check(CreateTensorWithDataAsOrtValue(memory, image.data(), image.size() * sizeof(float), shape, 4, TYPE_FLOAT, &input));
  const char *const from[] = {"image"}, *const to[] = {"logits"};
  check(Run(session, nullptr, from, &input, 1, to, 1, &output));
  size_t count;
  void *data;
  check(GetTensorTypeAndShape(output, &info));
  check(GetTensorShapeElementCount(info, &count));
  check(GetTensorMutableData(output, &data));
  std::vector<float> logits(static_cast<float *>(data), static_cast<float *>(data) + count);
  ReleaseTensorTypeAndShapeInfo(info);
  ReleaseValue(output);
  ReleaseValue(input);
  ReleaseMemoryInfo(memory);
  ReleaseSession(session);
  ReleaseSessionOptions(options);
  return logits;
}

int main(int count, char **words) {
  if (count != 11) return 2;
  void *library = dlopen(words[1], RTLD_NOW);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  const OrtApiBase *(*base)(void) = (const OrtApiBase *(*)(void))dlsym(library, "OrtGetApiBase");
  ort = base()->GetApi(API_VERSION);
  if (!ort) return 2;
  std::vector<float> image(std::atoll(words[5]) * std::atoll(words[6]) * std::atoll(words[7]) * std::atoll(words[8]));
  std::FILE *file = std::fopen(words[9], "rb");
  if (!file || std::fread(image.data(), sizeof(float), image.size(), file) != image.size()) return 2;
  std::fclose(file);
  OrtEnv *env;
  check(CreateEnv(3, "run_onnx", &env));
  const std::vector<float> first = run(env, words, image), logits = run(env, words, image);
  ReleaseEnv(env);
  file = std::fopen(words[10], "wb");
  if (!file || std::fwrite(logits.data(), sizeof(float), logits.size(), file) != logits.size()) return 2;
  std::fclose(file);
  return first == logits ? 0 : 3;
}
