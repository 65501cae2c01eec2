/* The constants of compiled kernels, in the order in which these read them. */
#include <string.h>

#include "layer.h"

enum { PARAMETERS = 5 };

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Lanes of outputs of all groups. */
static int64_t panel_lanes(const Compiled *kernel) {
  const Panels *panels = &kernel->panels;
  return panel_groups(&kernel->layer) * panels->panels * panels->vectors * panels->lanes;
}

Packing packing(const Compiled *kernel) {
  const Layer *layer = &kernel->layer;
  const int64_t window = layer->kernel[0] * layer->kernel[1], lanes = blocks(layer->outputs) * LANES;
  size_t weight, first, second, third = 0;
  if (!of_bytes(kernel->kind)) {
    const int64_t depth = kernel->depth, fixed = kernel->kind == FIXED_ADDER;
    weight = lanes * ceil_div(depth_of(layer), depth) * depth * window * (fixed ? sizeof(int16_t) : sizeof(float));
    first = (lanes + (fixed ? 0 : LANES)) * sizeof(float);
    second = lanes * sizeof(float);
    third = fixed ? FIXED_NUMBERS * sizeof(float) : 0;
  } else {
    const Panels *panels = &kernel->panels;
    weight = panel_lanes(kernel) * panels->cells * panels->cell * layer->kernel[0] * panels->columns * panels->bytes;
    first = panel_lanes(kernel) * sizeof(int32_t);
    second = kernel->epilogue.fused ? panel_lanes(kernel) * sizeof(int64_t) : 0;
    third = PARAMETERS * sizeof(int32_t);
  }
  Packing places = {0, aligned(weight), aligned(weight) + aligned(first), 0, 0};
  places.third = places.second + aligned(second);
  places.bytes = places.third + aligned(third);
  return places;
}

void pack_float(const Compiled *kernel, const float *weight, const float *scale, const float *shift, char *memory) {
  const Layer *layer = &kernel->layer;
  const Packing places = packing(kernel);
  const int64_t depth = depth_of(layer), window = layer->kernel[0] * layer->kernel[1];
  const int64_t side = kernel->depth, cells = ceil_div(depth, side), outputs = blocks(layer->outputs);
  float *packed = (float *)(memory + places.weight);
  float *scales = (float *)(memory + places.first), *shifts = (float *)(memory + places.second);
  memset(memory, 0, places.bytes);
  for (int64_t o = 0; o < layer->outputs; ++o) {
    double sum = 0;
    for (int64_t c = 0; c < depth; ++c)
      for (int64_t k = 0; k < window; ++k) {
        const float value = weight[(o * depth + c) * window + k];
        const int64_t cell = (o / LANES * cells + c / side) * window + k;
        packed[(cell * side + c % side) * LANES + o % LANES] = value;
        sum += value;
      }
    scales[o] = scale ? scale[o] : 1;
    shifts[o] = (float)((shift ? shift[o] : 0) + (kernel->maxima ? (double)scales[o] * sum : 0));
  }
  for (int lane = 0; lane < LANES; ++lane) scales[outputs * LANES + lane] = 2; /* 2 max(x, w) - x - w = |x - w| */
}

/* Where the weight of a lane for one tap of the window, of `rows` x `columns` beside the cells, lies. */
static int64_t place(const Panels *panels, int64_t rows, int64_t panel, int64_t lane, int64_t c, int64_t r, int64_t s) {
  const int64_t steps = panels->cell / panels->group, parts = panels->group / panels->together;
  const int64_t in_cell = c % panels->cell, in_step = in_cell % panels->group;
  int64_t at = ((panel * panels->cells + c / panels->cell) * rows + r) * panels->columns + s;
  at = (at * steps + in_cell / panels->group) * panels->vectors + lane / panels->lanes;
  at = (at * parts + in_step / panels->together) * panels->lanes + lane % panels->lanes;
  return at * panels->together + in_step % panels->together;
}

/* What has to be added to the sums of a filter whose weights add up to `sum`. */
static int64_t missing(const Compiled *kernel, int64_t sum, uint8_t zero) {
  if (convolves(kernel->kind)) return kernel->panels.centred ? 0 : -zero * sum;
  return kernel->panels.maxima ? sum : 0;
}

void pack_integer(const Compiled *kernel, const uint8_t *weight, uint8_t zero, const int32_t *multiplier,
                  const int64_t *bias, const Epilogue *end, char *memory) {
  const Layer *layer = &kernel->layer;
  const Panels *panels = &kernel->panels;
  const Packing places = packing(kernel);
  const int64_t depth = depth_of(layer), rows = layer->kernel[0], columns = layer->kernel[1];
  const int64_t groups = panel_groups(layer), filters = layer->outputs / groups, width = panels->vectors * panels->lanes;
  const int spanned = panels->columns != columns, shift = convolves(kernel->kind) ? WEIGHT_ZERO : 0;
  char *packed = memory + places.weight;
  int32_t *first = (int32_t *)(memory + places.first); /* the multiplier, or what is missing to the sums */
  int64_t *offset = (int64_t *)(memory + places.second);
  const int32_t parameters[PARAMETERS] = {zero, end->bits, (int32_t)end->low, (int32_t)end->high, end->share};
  memset(memory, 0, places.bytes);
  memcpy(memory + places.third, parameters, sizeof parameters);
  for (int64_t panel = 0; panel < groups * panels->panels; ++panel)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t filter = panel % panels->panels * width + panels->order[lane];
      if (filter >= filters) continue;
      const int64_t o = panel / panels->panels * filters + filter, slot = panel * width + lane;
      const uint8_t *next = weight + o * depth * rows * columns;
      int64_t sum = 0;
      for (int64_t c = 0; c < depth; ++c)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t s = 0; s < columns; ++s) {
            const int16_t value = (int16_t)(*next++ - shift); /* its lower byte is the value as a byte */
            const int64_t at = spanned ? place(panels, rows, panel, lane, s * depth + c, r, 0)
                                       : place(panels, rows, panel, lane, c, r, s);
            if (panels->bytes == 1)
              packed[at] = (char)value;
            else
              ((int16_t *)packed)[at] = value;
            sum += value;
          }
      const int64_t more = missing(kernel, sum, zero);
      first[slot] = multiplier ? multiplier[o] : (int32_t)more;
      if (multiplier) offset[slot] = bias[o] + more * multiplier[o] + (1ll << (end->bits - 1));
    }
}
