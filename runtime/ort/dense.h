/* Adder layers of many filters in plain loops: 16 filters are the lanes of two vectors, a few pixels are in registers.

   Included once for each type of operands, with NAME(name), ELEMENT, SUM, VECTOR (8 sums) and DISTANCE(vector). */

/* w: [taps, 16], x: [taps, TILE], sums: [TILE, 16]. */
EVERY_LEVEL static void NAME(tile)(SUM *sums, const SUM *x, const SUM *w, int64_t taps) {
  VECTOR low[TILE] = {{0}}, high[TILE] = {{0}};
  for (int64_t k = 0; k < taps; ++k) {
    VECTOR first, second;
    memcpy(&first, w + k * LANES, sizeof first);
    memcpy(&second, w + k * LANES + LANES / 2, sizeof second);
    _Pragma("GCC unroll 4") for (int p = 0; p < TILE; ++p) {
      low[p] -= DISTANCE(x[k * TILE + p] - first);
      high[p] -= DISTANCE(x[k * TILE + p] - second);
    }
  }
  for (int p = 0; p < TILE; ++p) {
    memcpy(sums + p * LANES, &low[p], sizeof low[p]);
    memcpy(sums + p * LANES + LANES / 2, &high[p], sizeof high[p]);
  }
}

/* The windows of TILE output pixels from `pixel` on, of one group, as [taps, TILE]. */
static void NAME(gather)(const Job *job, int64_t group, int64_t pixel, SUM *x) {
  const Layer *layer = job->layer;
  const int64_t width = out_width(layer), pixels = out_height(layer) * width, depth = depth_of(layer);
  const ELEMENT *image = (const ELEMENT *)job->x + group * depth * layer->height * layer->width;
  for (int p = 0; p < TILE; ++p) {
    const int64_t at = pixel + p < pixels ? pixel + p : pixels - 1; /* what is beyond is not stored */
    const int64_t top = at / width * layer->strides[0] - layer->pads[0];
    const int64_t left = at % width * layer->strides[1] - layer->pads[1];
    SUM *next = x + p;
    for (int64_t c = 0; c < depth; ++c)
      for (int64_t r = 0; r < layer->kernel[0]; ++r)
        for (int64_t s = 0; s < layer->kernel[1]; ++s, next += TILE) {
          const int64_t line = top + r * layer->dilations[0], column = left + s * layer->dilations[1];
          const int inside = line >= 0 && line < layer->height && column >= 0 && column < layer->width;
          *next = inside ? (SUM)image[(c * layer->height + line) * layer->width + column] : (SUM)job->pad_value;
        }
  }
}

/* 16 filters of one group as [taps, 16]; a task is such a block. */
static void NAME(arrange)(void *data, size_t task) {
  const Job *job = data;
  const int64_t taps = taps_of(job->layer), filters = job->layer->outputs / job->layer->groups;
  const int64_t each = blocks(filters), first = task % each * LANES, group = task / each;
  SUM *packed = (SUM *)job->packed + (int64_t)task * taps * LANES;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const int64_t filter = first + lane < filters ? first + lane : filters - 1;
    const ELEMENT *weight = (const ELEMENT *)job->weight + (group * filters + filter) * taps;
    for (int64_t k = 0; k < taps; ++k) packed[k * LANES + lane] = weight[k];
  }
}

/* TILES tiles of pixels for all filters of a group. */
static void NAME(tiles)(void *data, size_t task) {
  Job *job = data;
  const Layer *layer = job->layer;
  const int64_t taps = taps_of(layer), filters = layer->outputs / layer->groups, each = blocks(filters);
  const int64_t pixels = out_height(layer) * out_width(layer), parts = ceil_div(pixels, TILE * TILES);
  const int64_t group = task / parts, begin = task % parts * TILE * TILES;
  SUM sums[TILE * LANES], *x = workspace(TILES * TILE * taps * sizeof *x);
  if (!x) {
    atomic_store(&job->failed, 1);
    return;
  }
  for (int64_t t = 0; t < TILES && begin + t * TILE < pixels; ++t)
    NAME(gather)(job, group, begin + t * TILE, x + t * TILE * taps);
  for (int64_t b = 0; b < each; ++b)
    for (int64_t t = 0; t < TILES && begin + t * TILE < pixels; ++t) {
      NAME(tile)(sums, x + t * TILE * taps, (const SUM *)job->packed + (group * each + b) * taps * LANES, taps);
      const int64_t first = begin + t * TILE, left = pixels - first, rest = filters - b * LANES;
      for (int64_t lane = 0; lane < LANES && lane < rest; ++lane)
        for (int64_t p = 0; p < TILE && p < left; ++p)
          ((SUM *)job->y)[(group * filters + b * LANES + lane) * pixels + first + p] = sums[p * LANES + lane];
    }
  release(x);
}

static OrtStatus *NAME(dense)(const OrtKernelContext *context, Job *job) {
  const Layer *layer = job->layer;
  const int64_t all = layer->groups * blocks(layer->outputs / layer->groups);
  const int64_t parts = ceil_div(out_height(layer) * out_width(layer), TILE * TILES);
  job->packed = workspace(all * taps_of(layer) * LANES * sizeof(SUM));
  if (!job->packed) return CreateStatus(FAILED, "ai.anncvt: out of memory");
  OrtStatus *status = parallel(context, all, NAME(arrange), job);
  if (!status) status = parallel(context, layer->groups * parts, NAME(tiles), job);
  release(job->packed);
  if (!status && atomic_load(&job->failed)) return CreateStatus(FAILED, "ai.anncvt: out of memory");
  return status;
}

#undef NAME
#undef ELEMENT
#undef SUM
#undef VECTOR
#undef DISTANCE
