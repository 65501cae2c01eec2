// A block of CUDA threads on the CPU: each thread is a fiber that runs until the next __syncthreads(), then the others
// do. Shared memory is poisoned before a block starts, so values that no thread wrote, or not yet, spoil the results.
// The compiler reports every access to memory (-fsanitize=thread, whose runtime library this file stands for): two
// threads that access the same word of shared memory between two barriers, one of them to write it, are a race.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

#define __global__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("anncvt_shared")))
#define alignas(n) __attribute__((aligned(n)))
#define ANNCVT_DEVICE inline

struct Index { uint x, y, z; };
static Index blockIdx, threadIdx;

struct __attribute__((aligned(8))) float2 { float x, y; };
struct __attribute__((aligned(16))) float4 { float x, y, z, w; };
struct __attribute__((aligned(16))) uint4 { uint x, y, z, w; };
struct __attribute__((aligned(16))) int4 { int x, y, z, w; };
struct __attribute__((aligned(8))) ushort4 { ushort x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline ushort4 make_ushort4(ushort x, ushort y, ushort z, ushort w) { return {x, y, z, w}; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

// __saturatef: [0, 1], and 0 for what is not a number.
static inline float anncvt_slope(float d, float s) {
  float value = fmaf(d, s, 0.5f);
  return value > 0 ? (value < 1 ? value : 1) : 0;
}

static inline uint anncvt_absdiff4(uint a, uint b, uint sum) {
  for (int i = 0; i < 32; i += 8) sum += abs(int(a >> i & 255) - int(b >> i & 255));
  return sum;
}

template <class To, class From> static inline To same_bits(From value) {
  To result;
  static_assert(sizeof result == sizeof value);
  memcpy(&result, &value, sizeof result);
  return result;
}

static inline float anncvt_from_float16(ushort bits) { return same_bits<_Float16>(bits); }
static inline ushort anncvt_to_float16(float value) { return same_bits<ushort>((_Float16)value); }
static inline uint anncvt_bits(float value) { return same_bits<uint>(value); }
static inline float anncvt_value(uint bits) { return same_bits<float>(bits); }

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> stacks;
static std::vector<char> ended;
static uint current;
static void (*body)(void **);
static void **arguments;
static const size_t STACK = 1 << 16;
extern char __start_anncvt_shared[] __attribute__((weak)), __stop_anncvt_shared[] __attribute__((weak));

#define UNOBSERVED __attribute__((no_sanitize("thread")))

// Of each word of shared memory: in which stretch between two barriers it was last written and read, and by whom.
struct Word { uint written, writer, read, reader; bool by_several; };
static std::vector<Word> words;
static uint stretch, races;

UNOBSERVED static void access(void *address, size_t bytes, bool write) {
  char *begin = (char *)address;
  if (begin < __start_anncvt_shared || begin >= __stop_anncvt_shared) return;
  for (size_t i = (begin - __start_anncvt_shared) / 4, end = i + (bytes + 3) / 4; i < end; i++) {
    Word &word = words[i];
    bool others = word.written == stretch && word.writer != current;
    if (write) {
      others |= word.read == stretch && (word.by_several || word.reader != current);
      word.written = stretch, word.writer = current;
    } else {
      word.by_several = word.read == stretch && (word.by_several || word.reader != current);
      word.read = stretch, word.reader = current;
    }
    races += others;
  }
}

extern "C" {
void __tsan_init() {}
UNOBSERVED void __tsan_read1(void *a) { access(a, 1, false); }
UNOBSERVED void __tsan_read2(void *a) { access(a, 2, false); }
UNOBSERVED void __tsan_read4(void *a) { access(a, 4, false); }
UNOBSERVED void __tsan_read8(void *a) { access(a, 8, false); }
UNOBSERVED void __tsan_read16(void *a) { access(a, 16, false); }
UNOBSERVED void __tsan_write1(void *a) { access(a, 1, true); }
UNOBSERVED void __tsan_write2(void *a) { access(a, 2, true); }
UNOBSERVED void __tsan_write4(void *a) { access(a, 4, true); }
UNOBSERVED void __tsan_write8(void *a) { access(a, 8, true); }
UNOBSERVED void __tsan_write16(void *a) { access(a, 16, true); }
UNOBSERVED void __tsan_read_range(void *a, size_t bytes) { access(a, bytes, false); }
UNOBSERVED void __tsan_write_range(void *a, size_t bytes) { access(a, bytes, true); }
}

static void __syncthreads() { swapcontext(&fibers[current], &scheduler); }

static void enter() {
  body(arguments);
  ended[current] = 1;
}

// Returns how many threads met a barrier that others did not: 0, if the program is right.
UNOBSERVED static int run_block(uint threads, int backwards) {
  if (fibers.size() < threads) {
    fibers.resize(threads);
    ended.resize(threads);
    stacks.resize(STACK * threads);
  }
  words.resize((__stop_anncvt_shared - __start_anncvt_shared + 3) / 4);
  if (__start_anncvt_shared) memset(__start_anncvt_shared, 0xff, __stop_anncvt_shared - __start_anncvt_shared);
  for (uint i = 0; i < threads; i++) {
    ended[i] = 0;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = &stacks[i * STACK];
    fibers[i].uc_stack.ss_size = STACK;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], enter, 0);
  }
  for (uint left = threads; left;) {
    uint before = left;
    stretch++;
    for (uint i = 0; i < threads; i++) {
      current = backwards ? threads - 1 - i : i;
      if (ended[current]) continue;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current]);
      left -= ended[current];
    }
    if (left && left != before) return left;
  }
  return 0;
}

// Returns as run_block does, or minus the number of races.
static int run_grid(void (*kernel)(void **), void **given, const uint *grid, uint threads, int backwards) {
  races = 0;
  body = kernel;
  arguments = given;
  for (uint z = 0; z < grid[2]; z++)
    for (uint y = 0; y < grid[1]; y++)
      for (uint x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        if (int wrong = run_block(threads, backwards)) return wrong;
      }
  return -int(races);
}
