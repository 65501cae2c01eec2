/* Runs the network of a package on its golden inputs and compares every layer with the golden vectors.
 *
 *   cc -std=c99 -O2 -o reference reference.c && ./reference PACKAGE
 *
 * Exit status: 0 every integer is equal, 1 one differs, 2 the package cannot be read. No libraries but C's own.
 * What each operation means is written down in SEMANTICS.md; this is the same in C, loop by loop. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME 256
#define PATH 1024
#define INPUTS 256 /* filter groups of a layer, parts of a concatenation */

enum op { ADDER, CONVOLUTION, SUM_POOL, RESCALE, MAX_POOL, SLICE, PAD, FLATTEN, CONCATENATE, SHUFFLE, OPS };
static const char *const OP_NAMES[OPS] = {
    "adder", "convolution", "sum_pool", "rescale", "max_pool", "slice", "pad", "flatten", "concatenate", "shuffle"};

struct step {
    char file[NAME];
    enum op op;
    int inputs, input[INPUTS], pad_value[INPUTS]; /* tensor 0 is the network's input, tensor i+1 step i's output */
    int residual;                                 /* a tensor, or -1 */
    int c, h, w;                                  /* of the output */
    int stride_h, stride_w, top, left, bottom, right, dilation_h, dilation_w, groups, kernel_h, kernel_w;
    int front; /* channels before: that pad adds, that slice leaves out */
    int shift, low, high, residual_multiplier;
    uint8_t *weight, *filter_group;
    int32_t *multiplier;
    int64_t *bias;
};

struct tensor {
    int c, h, w;
    int32_t *data; /* [C][H][W] */
};

static const char *package;

static void fail(const char *what, const char *where) {
    fprintf(stderr, "error: %s: %s\n", where, what);
    exit(2);
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) fail("out of memory", package);
    return memory;
}

static FILE *open_file(const char *folder, const char *name, const char *suffix) {
    char path[PATH];
    FILE *file;
    if (snprintf(path, sizeof path, "%s/%s/%s%s", package, folder, name, suffix) >= (int)sizeof path)
        fail("path too long", name);
    file = fopen(path, "r");
    if (!file) fail("cannot be opened", path);
    return file;
}

/* `count` numbers, one a line, in two's complement of `bits` bits. */
static int64_t *read_hex(const char *folder, const char *name, const char *suffix, size_t count, int bits) {
    FILE *file = open_file(folder, name, suffix);
    int64_t *values = allocate(count, sizeof *values);
    unsigned long long raw;
    size_t i;
    for (i = 0; i < count; i++) {
        if (fscanf(file, "%llx", &raw) != 1) fail("ends too early", name);
        if (bits < 64 && (raw >> (bits - 1)) & 1) raw |= ~0ULL << bits;
        memcpy(&values[i], &raw, sizeof raw);
    }
    if (fscanf(file, "%llx", &raw) == 1) fail("holds more than it should", name);
    fclose(file);
    return values;
}

static uint8_t *read_bytes(const char *folder, const char *name, const char *suffix, size_t count) {
    int64_t *values = read_hex(folder, name, suffix, count, 64);
    uint8_t *bytes = allocate(count, 1);
    size_t i;
    for (i = 0; i < count; i++) bytes[i] = (uint8_t)values[i];
    free(values);
    return bytes;
}

static size_t size_of(const struct tensor *t) { return (size_t)t->c * t->h * t->w; }

/* Pixel (c, y, x) of a feature map; outside it is `pad`. */
static int32_t pixel(const struct tensor *t, int c, int y, int x, int32_t pad) {
    if (y < 0 || y >= t->h || x < 0 || x >= t->w) return pad;
    return t->data[((size_t)c * t->h + y) * t->w + x];
}

/* The accumulator of output channel o at (y, x). */
static int64_t accumulate(const struct step *s, const struct tensor *tensors, int o, int y, int x) {
    int group = s->op == ADDER ? s->filter_group[o] : 0;
    const struct tensor *in = &tensors[s->input[group]];
    int32_t pad = s->inputs ? s->pad_value[group] : 0;
    int top = y * s->stride_h - s->top, left = x * s->stride_w - s->left;
    int pooling = s->op == SUM_POOL || s->op == RESCALE;
    int width = pooling ? 1 : in->c / s->groups;
    int first = pooling ? o : o / (s->c / s->groups) * width;
    int64_t total = 0;
    int c, i, j;
    if (s->op == RESCALE) return pixel(in, o, y, x, 0);
    for (c = 0; c < width; c++)
        for (i = 0; i < s->kernel_h; i++)
            for (j = 0; j < s->kernel_w; j++) {
                int32_t value = pixel(in, first + c, top + i * s->dilation_h, left + j * s->dilation_w, pad);
                if (s->op == SUM_POOL) {
                    total += value;
                } else {
                    uint8_t raw = s->weight[(((size_t)o * width + c) * s->kernel_h + i) * s->kernel_w + j];
                    if (s->op == ADDER)
                        total -= value > raw ? value - raw : raw - value;
                    else
                        total += (int64_t)(value - pad) * (raw < 128 ? raw : raw - 256);
                }
            }
    return total;
}

/* floor(total / 2^shift) for any sign: what an arithmetic shift does in hardware; C leaves >> of negatives open. */
static int64_t shifted(int64_t total, int shift) {
    return total >= 0 ? total >> shift : ~(~total >> shift);
}

static int32_t requantise(const struct step *s, const struct tensor *tensors, int64_t accumulator, int o, int y, int x) {
    int64_t total = accumulator * s->multiplier[o] + s->bias[o];
    if (s->residual >= 0) total += (int64_t)pixel(&tensors[s->residual], o, y, x, 0) * s->residual_multiplier;
    total = shifted(total + ((int64_t)1 << (s->shift - 1)), s->shift);
    return (int32_t)(total < s->low ? s->low : total > s->high ? s->high : total);
}

/* One output of an operation that has no accumulator. */
static int32_t rearrange(const struct step *s, const struct tensor *tensors, int o, int y, int x) {
    const struct tensor *in = &tensors[s->input[0]];
    int32_t best = 0;
    int i, j;
    if (s->op == CONCATENATE) {
        for (i = 0; i + 1 < s->inputs && o >= tensors[s->input[i]].c; i++) o -= tensors[s->input[i]].c;
        return pixel(&tensors[s->input[i]], o, y, x, 0);
    }
    if (s->op == FLATTEN) return in->data[o];
    if (s->op == SLICE) return pixel(in, s->front + o, y * s->stride_h, x * s->stride_w, 0);
    if (s->op == SHUFFLE) return pixel(in, o % s->groups * (in->c / s->groups) + o / s->groups, y, x, 0);
    if (s->op == PAD) {
        int c = o - s->front;
        return c < 0 || c >= in->c ? s->pad_value[0] : pixel(in, c, y - s->top, x - s->left, s->pad_value[0]);
    }
    for (i = 0; i < s->kernel_h; i++)
        for (j = 0; j < s->kernel_w; j++) {
            int32_t value = pixel(in, o, y * s->stride_h - s->top + i * s->dilation_h,
                                  x * s->stride_w - s->left + j * s->dilation_w, 0);
            if (value > best) best = value;
        }
    return best;
}

static void execute(const struct step *s, struct tensor *tensors, struct tensor *out, int32_t *accumulators) {
    int o, y, x;
    size_t at = 0;
    for (o = 0; o < s->c; o++)
        for (y = 0; y < s->h; y++)
            for (x = 0; x < s->w; x++, at++) {
                if (s->shift) {
                    accumulators[at] = (int32_t)accumulate(s, tensors, o, y, x);
                    out->data[at] = requantise(s, tensors, accumulators[at], o, y, x);
                } else {
                    out->data[at] = rearrange(s, tensors, o, y, x);
                }
            }
}

static int compare(const char *folder, const struct step *s, const char *suffix, const int32_t *found, size_t count) {
    int64_t *golden = read_hex(folder, s->file, suffix, count, 32);
    size_t i;
    for (i = 0; i < count; i++)
        if (golden[i] != found[i]) {
            printf("%s/%s%s: number %lu is %ld, golden %ld\n", folder, s->file, suffix, (unsigned long)i,
                   (long)found[i], (long)golden[i]);
            break;
        }
    free(golden);
    return i == count;
}

static int next(FILE *file) {
    int value;
    if (fscanf(file, "%d", &value) != 1) fail("is damaged", "network.txt");
    return value;
}

static void read_step(FILE *file, struct step *s, int input_c, const struct step *steps, int at) {
    char op[NAME];
    int i, source;
    size_t count;
    if (fscanf(file, " step %255s %255s", s->file, op) != 2) fail("is damaged", "network.txt");
    for (i = 0; i < OPS && strcmp(op, OP_NAMES[i]); i++) continue;
    if (i == OPS) fail("has an operation that this program does not know", op);
    s->op = (enum op)i;
    s->inputs = next(file);
    if (s->inputs < 1 || s->inputs > INPUTS) fail("has too many inputs", s->file);
    for (i = 0; i < s->inputs; i++) {
        s->input[i] = next(file);
        if (s->input[i] < 0 || s->input[i] > at) fail("reads a tensor that is not there yet", s->file);
    }
    for (i = 0; i < s->inputs; i++) s->pad_value[i] = next(file);
    s->residual = next(file);
    if (s->residual > at) fail("reads a tensor that is not there yet", s->file);
    s->c = next(file), s->h = next(file), s->w = next(file);
    s->stride_h = next(file), s->stride_w = next(file);
    s->top = next(file), s->left = next(file), s->bottom = next(file), s->right = next(file);
    s->dilation_h = next(file), s->dilation_w = next(file), s->groups = next(file);
    s->kernel_h = next(file), s->kernel_w = next(file), s->front = next(file);
    s->shift = next(file), s->low = next(file), s->high = next(file), s->residual_multiplier = next(file);
    if (s->shift) {
        int64_t *values = read_hex("layers", s->file, ".multiplier.hex", (size_t)s->c, 32);
        s->multiplier = allocate((size_t)s->c, sizeof *s->multiplier);
        for (i = 0; i < s->c; i++) s->multiplier[i] = (int32_t)values[i];
        free(values);
        s->bias = read_hex("layers", s->file, ".bias.hex", (size_t)s->c, 64);
    }
    if (s->op == ADDER || s->op == CONVOLUTION) {
        source = s->input[0] ? steps[s->input[0] - 1].c : input_c;
        count = (size_t)s->c * (source / s->groups) * s->kernel_h * s->kernel_w;
        s->weight = read_bytes("layers", s->file, ".weight.hex", count);
    }
    if (s->op == ADDER) s->filter_group = read_bytes("layers", s->file, ".filter_group.hex", (size_t)s->c);
}

int main(int argc, char **argv) {
    FILE *file;
    struct step *steps;
    struct tensor *tensors;
    uint8_t *table;
    int count, images, image, i, version, equal = 0, wrong = 0;
    if (argc != 2) {
        fprintf(stderr, "usage: %s PACKAGE\n", argv[0]);
        return 2;
    }
    package = argv[1];
    file = open_file(".", "network", ".txt");
    if (fscanf(file, " anncvt-integer %d", &version) != 1 || version != 1) fail("is of another version", "network.txt");
    tensors = allocate(1, sizeof *tensors);
    tensors[0].c = next(file), tensors[0].h = next(file), tensors[0].w = next(file);
    images = next(file);
    count = next(file);
    steps = allocate((size_t)count, sizeof *steps);
    tensors = realloc(tensors, (size_t)(count + 1) * sizeof *tensors);
    if (!tensors) fail("out of memory", package);
    for (i = 0; i < count; i++) {
        read_step(file, &steps[i], tensors[0].c, steps, i);
        tensors[i + 1].c = steps[i].c, tensors[i + 1].h = steps[i].h, tensors[i + 1].w = steps[i].w;
    }
    fclose(file);
    table = read_bytes(".", "table", ".hex", (size_t)tensors[0].c * 256);
    for (i = 0; i <= count; i++) tensors[i].data = allocate(size_of(&tensors[i]), sizeof(int32_t));
    for (image = 0; image < images; image++) {
        char folder[NAME];
        size_t plane = (size_t)tensors[0].h * tensors[0].w, at;
        uint8_t *pixels;
        snprintf(folder, sizeof folder, "golden/%03d", image);
        pixels = read_bytes(folder, "pixels", ".hex", size_of(&tensors[0]));
        for (at = 0; at < size_of(&tensors[0]); at++) tensors[0].data[at] = table[at / plane * 256 + pixels[at]];
        free(pixels);
        for (i = 0; i < count; i++) {
            size_t size = size_of(&tensors[i + 1]);
            int32_t *accumulators = allocate(size, sizeof *accumulators);
            int same;
            execute(&steps[i], tensors, &tensors[i + 1], accumulators);
            same = !steps[i].shift || compare(folder, &steps[i], ".accumulator.hex", accumulators, size);
            same = compare(folder, &steps[i], ".output.hex", tensors[i + 1].data, size) && same;
            free(accumulators);
            if (same) equal++; else wrong++;
        }
    }
    for (i = 0; i <= count; i++) free(tensors[i].data);
    for (i = 0; i < count; i++) {
        free(steps[i].weight), free(steps[i].filter_group), free(steps[i].multiplier), free(steps[i].bias);
    }
    free(tensors), free(steps), free(table);
    printf("%d images, %d layers each: %d equal, %d different\n", images, count, equal, wrong);
    return wrong != 0;
}
