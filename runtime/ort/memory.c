/* Memory for one call. Large pieces fresh from the system cost a page fault every 4 KB, so each thread keeps some. */
#include <pthread.h>
#include <stdlib.h>

#include "layer.h"

enum { KEPT_BYTES = 32 << 20 };

typedef struct Piece {
  struct Piece *next;
  size_t bytes;
} Piece;

typedef struct {
  Piece *first;
  size_t bytes;
} Kept;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int usable;

static void forget(void *memory) {
  Kept *kept = memory;
  while (kept->first) {
    Piece *next = kept->first->next;
    free(kept->first);
    kept->first = next;
  }
  free(kept);
}

static void make_key(void) { usable = pthread_key_create(&key, forget) == 0; }

/* What this thread keeps; NULL where that cannot be known. */
static Kept *mine(void) {
  pthread_once(&once, make_key);
  if (!usable) return NULL;
  Kept *kept = pthread_getspecific(key);
  if (!kept) {
    kept = calloc(1, sizeof *kept);
    if (kept && pthread_setspecific(key, kept)) {
      free(kept);
      kept = NULL;
    }
  }
  return kept;
}

/* The thread that ends the process runs no destructors of keys. */
__attribute__((destructor)) static void forget_last(void) {
  Kept *kept = usable ? pthread_getspecific(key) : NULL;
  if (kept) {
    pthread_setspecific(key, NULL);
    forget(kept);
  }
}

void *workspace(size_t bytes) {
  Kept *kept = mine();
  Piece **best = NULL;
  if (bytes > SIZE_MAX - 2 * ALIGNMENT) return NULL;
  bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  for (Piece **at = kept ? &kept->first : NULL; at && *at; at = &(*at)->next)
    if ((*at)->bytes >= bytes && (!best || (*at)->bytes < (*best)->bytes)) best = at;
  Piece *piece;
  if (best) {
    piece = *best;
    *best = piece->next;
    kept->bytes -= piece->bytes;
  } else {
    piece = aligned_alloc(ALIGNMENT, bytes + ALIGNMENT);
    if (!piece) return NULL;
    piece->bytes = bytes;
  }
  return (char *)piece + ALIGNMENT;
}

void release(void *memory) {
  if (!memory) return;
  Piece *piece = (Piece *)((char *)memory - ALIGNMENT);
  Kept *kept = mine();
  if (!kept || piece->bytes > KEPT_BYTES) {
    free(piece);
    return;
  }
  piece->next = kept->first;
  kept->first = piece;
  kept->bytes += piece->bytes;
  /* The piece that waits longest is the last. */
  while (kept->bytes > KEPT_BYTES) {
    Piece **last = &kept->first;
    while ((*last)->next) last = &(*last)->next;
    kept->bytes -= (*last)->bytes;
    free(*last);
    *last = NULL;
  }
}
