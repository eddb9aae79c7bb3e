/* Convolutions that skip zeros, on a CPU: 3x3 and 1x1, stride 1, zero padding, fp32.
 *
 * This file is compiled once for each width of vectors (setup.py), with LANES = floats in a vector and NAME = a suffix
 * of the exported functions, into one library; mssr_basicsr/sparse/library.py chooses at run time.
 *
 * Activations. A row of W pixels is kept as S vectors, S * LANES >= W: lane l of vector j is pixel S * l + j, so the
 * pixel to the right is the same lane of the next vector. Shifts by a pixel are therefore other, aligned vectors; only
 * beyond the ends (j = -1 and j = S) is the vector another one moved by a lane. Pixels from W on are zero. Pixel
 * shuffle and nearest upsampling by r move whole vectors (vector j to r * j + dx), and cost nothing. A value is
 * [rows][channels][S][LANES], with ROW_GAP vectors after each row; it may have fewer rows than the image, row y then
 * being at y % rows: rows that nobody needs any more are overwritten.
 *
 * Convolution. The output is made in tiles of ROWS x VECTORS vectors, which are the accumulators. What a tile sees of
 * the input, all channels, is copied to a thread's own memory, padding included. Input channels are taken in blocks
 * that stay in the caches; for each block and output channel the kept weights are multiplied with the
 * vectors at their offsets. Accumulators wait in the thread's memory from block to block.
 *
 * Threads are made for each call and end with it, so there is nothing global: calls may come from several threads and
 * after fork(). They take the tiles of a band one by one, and wait for each other after each band.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef ROWS
#define ROWS 6
#endif
#define VECTORS 4
#define TILE_WIDTH (VECTORS + 2)
#define TILE_VECTORS ((ROWS + 2) * TILE_WIDTH) /* of a channel of the input tile */
#define ACCUMULATORS (ROWS * VECTORS)
#define MAX_INPUTS 8
#define ROW_GAP 5 /* otherwise the rows of a tile would often fall on the same places of the caches */
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define EXPORT(name) __attribute__((visibility("default"))) PASTE(name, NAME)

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t mask __attribute__((vector_size(LANES * 4)));

enum kind { CONVOLUTION, SUM, NEAREST, PACK, UNPACK };
enum activation { NONE, RELU, SLOPE };

/* Mirrored in library.py. */
struct value {
    vec *data;
    int32_t channels, height, width, vectors, rows;
};

struct operation {
    int32_t kind, inputs;
    const struct value *input[MAX_INPUTS]; /* concatenated channels */
    const struct value *residual;          /* added last, or NULL */
    const struct value *output;
    float *image;           /* (C, H, W) of PACK and UNPACK */
    const float *weights;   /* kept weights, by block, then output channel */
    const uint16_t *offset; /* of each: vectors from the start of its block's tile */
    const int32_t *start;   /* [blocks * out_channels + 1]: where each output channel's begin */
    const float *bias;      /* of CONVOLUTION and SUM, for each output channel; or NULL */
    const float *slope;     /* of SLOPE, for each output channel */
    int32_t in_channels, out_channels, block, activation, factor; /* factor: of pixel shuffle or NEAREST */
    float scale;            /* after the activation */
};

/* Rows first to last - 1 of an operation: of its output, or of its input if it upsamples. */
struct band {
    int32_t operation, first, last;
};

struct run {
    const struct operation *operations;
    const struct band *bands;
    int32_t num_bands, threads;
    size_t scratch; /* bytes */
    atomic_int *next;   /* of each band: the first part that nobody has taken */
    atomic_int ready, arrived, failed;
};

static vec *row_of(const struct value *value, int32_t channel, int32_t y)
{
    size_t vectors = (size_t)value->vectors, row = (size_t)value->channels * vectors + ROW_GAP;
    return value->data + (size_t)(y % value->rows) * row + (size_t)channel * vectors;
}

/* The vector of pixels one lane to the right (by = 1) or to the left (by = -1); zero beyond the end. */
static vec moved(vec from, int by)
{
    vec to = {0};
    if (by > 0)
        for (int l = 0; l + 1 < LANES; l++)
            to[l] = from[l + 1];
    else
        for (int l = 1; l < LANES; l++)
            to[l] = from[l - 1];
    return to;
}

/* The vector with the pixels beyond the image's width set to zero. */
static vec inside(vec all, const struct value *value, int32_t j)
{
    mask pixel;
    for (int l = 0; l < LANES; l++)
        pixel[l] = value->vectors * l + j;
    return (vec)((mask)all & (pixel < (mask){0} + value->width));
}

/* Copies what the output tile at (y, j) sees, with one pixel around it, as far as the rows before last_row need it. */
static void copy_tile(const struct operation *op, int32_t y, int32_t last_row, int32_t j, vec *tile)
{
    for (int32_t i = 0; i < op->inputs; i++) {
        const struct value *in = op->input[i];
        int32_t last = j + VECTORS + 1 < in->vectors ? j + VECTORS + 1 : in->vectors;
        for (int32_t c = 0; c < in->channels; c++) {
            for (int32_t r = 0; r < ROWS + 2; r++, tile += TILE_WIDTH) {
                int32_t row = y + r - 1;
                if (row < 0 || row >= in->height || row > last_row) {
                    memset(tile, 0, TILE_WIDTH * sizeof(vec));
                    continue;
                }
                const vec *from = row_of(in, c, row);
                if (j > 0 && last == j + VECTORS + 1) {
                    for (int32_t v = 0; v < TILE_WIDTH; v++)
                        tile[v] = from[j - 1 + v];
                    continue;
                }
                tile[0] = j > 0 ? from[j - 1] : moved(from[in->vectors - 1], -1);
                for (int32_t v = j; v < last; v++)
                    tile[v - j + 1] = from[v];
                for (int32_t v = last; v < j + VECTORS + 1; v++)
                    tile[v - j + 1] = v == in->vectors ? moved(from[0], 1) : (vec){0};
            }
        }
    }
}

/* acc += weights * the vectors of the tile at their offsets. */
static inline __attribute__((always_inline)) void multiply(const vec *tile, const float *weight,
                                                           const uint16_t *offset, int32_t count, vec *memory)
{
    vec acc[ACCUMULATORS];
#pragma GCC unroll 32
    for (int a = 0; a < ACCUMULATORS; a++)
        acc[a] = memory[a];
    for (int32_t i = 0; i < count; i++) {
        const vec *from = tile + offset[i];
        vec w = weight[i] - (vec){0};
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                acc[r * VECTORS + v] += w * from[r * TILE_WIDTH + v];
    }
#pragma GCC unroll 32
    for (int a = 0; a < ACCUMULATORS; a++)
        memory[a] = acc[a];
}

static inline vec activated(const struct operation *op, int32_t channel, vec x)
{
    mask negative = x < (vec){0}; /* not NaN: it stays */
    if (op->activation == RELU)
        return (vec)(~negative & (mask)x);
    if (op->activation == SLOPE)
        return (vec)((negative & (mask)(x * op->slope[channel])) | (~negative & (mask)x));
    return x;
}

/* Accumulators of one output channel to where they belong, which pixel shuffle decides. */
static void finish(const struct operation *op, int32_t channel, int32_t y, int32_t last, int32_t j, const vec *acc)
{
    const struct value *out = op->output;
    int32_t f = op->factor, dx = channel % f, dy = channel / f % f, vectors = out->vectors / f;
    int32_t count = vectors - j < VECTORS ? vectors - j : VECTORS;
    int padded = out->vectors * LANES != out->width;
    for (int32_t r = 0; r < ROWS && y + r < last; r++) {
        int32_t row = f * (y + r) + dy;
        vec *to = row_of(out, channel / (f * f), row);
        const vec *residual = op->residual ? row_of(op->residual, channel / (f * f), row) : NULL;
        for (int32_t v = 0; v < count; v++) {
            int32_t at = f * (j + v) + dx;
            vec x = activated(op, channel, acc[r * VECTORS + v]) * op->scale;
            if (residual)
                x += residual[at];
            to[at] = padded ? inside(x, out, at) : x;
        }
    }
}

static void convolve_tile(const struct operation *op, int32_t y, int32_t last, int32_t j, vec *scratch)
{
    int32_t blocks = (op->in_channels + op->block - 1) / op->block;
    vec *accumulators = scratch, *tile = scratch + (size_t)op->out_channels * ACCUMULATORS;
    copy_tile(op, y, last, j, tile);
    for (int32_t b = 0; b < blocks; b++, tile += (size_t)op->block * TILE_VECTORS) {
        const int32_t *start = op->start + (size_t)b * (size_t)op->out_channels;
        for (int32_t c = 0; c < op->out_channels; c++) {
            vec *acc = accumulators + (size_t)c * ACCUMULATORS;
            if (b == 0)
                for (int a = 0; a < ACCUMULATORS; a++)
                    acc[a] = (vec){0} + (op->bias ? op->bias[c] : 0.0f);
            multiply(tile, op->weights + start[c], op->offset + start[c], start[c + 1] - start[c], acc);
            if (b == blocks - 1)
                finish(op, c, y, last, j, acc);
        }
    }
}

/* One row of any operation but a convolution. */
static void run_row(const struct operation *op, int32_t y)
{
    const struct value *in = op->input[0], *out = op->output;
    int32_t f = op->factor;
    if (op->kind == PACK || op->kind == UNPACK) {
        const struct value *value = op->kind == PACK ? out : in;
        int32_t width = value->width, vectors = value->vectors;
        for (int32_t c = 0; c < value->channels; c++) {
            float *packed = (float *)row_of(value, c, y);
            float *plain = op->image + ((size_t)c * (size_t)value->height + (size_t)y) * (size_t)width;
            for (int32_t l = 0; l < LANES; l++)
                for (int32_t j = 0; j < vectors; j++) {
                    int32_t x = vectors * l + j;
                    if (op->kind == PACK)
                        packed[j * LANES + l] = x < width ? plain[x] : 0.0f;
                    else if (x < width)
                        plain[x] = packed[j * LANES + l];
                }
        }
        return;
    }
    for (int32_t c = 0; c < out->channels; c++) {
        const vec *from = row_of(in, c, y);
        if (op->kind == NEAREST) {
            for (int32_t dy = 0; dy < f; dy++) {
                vec *to = row_of(out, c, f * y + dy);
                for (int32_t j = 0; j < out->vectors; j++)
                    to[j] = from[j / f];
            }
        } else {
            vec *to = row_of(out, c, y);
            const vec *residual = op->residual ? row_of(op->residual, c, y) : NULL;
            for (int32_t j = 0; j < out->vectors; j++) {
                vec x = op->bias ? inside(from[j] + op->bias[c], out, j) : from[j];
                x = activated(op, c, x) * op->scale;
                to[j] = residual ? x + residual[j] : x;
            }
        }
    }
}

/* One thread's share of all bands. */
static void *work(void *argument)
{
    struct run *run = argument;
    vec *scratch = aligned_alloc(64, run->scratch);
    if (!scratch)
        atomic_store(&run->failed, 1); /* the call fails; the others wait for this thread after each band */
    while (!atomic_load(&run->ready))
        sched_yield();
    for (int32_t b = 0; b < run->num_bands; b++) {
        const struct band *band = run->bands + b;
        const struct operation *op = run->operations + band->operation;
        int is_convolution = op->kind == CONVOLUTION;
        int32_t across = is_convolution ? (op->input[0]->vectors + VECTORS - 1) / VECTORS : 1;
        int32_t height = is_convolution ? ROWS : 1;
        int32_t parts = across * ((band->last - band->first + height - 1) / height);
        for (int32_t p; scratch && (p = atomic_fetch_add(run->next + b, 1)) < parts;) {
            int32_t y = band->first + p / across * height;
            if (is_convolution)
                convolve_tile(op, y, band->last, p % across * VECTORS, scratch);
            else
                run_row(op, y);
        }
        atomic_fetch_add(&run->arrived, 1);
        for (int spins = 0; atomic_load(&run->arrived) < (b + 1) * run->threads; spins++)
            if (spins > 2000)
                sched_yield();
    }
    free(scratch);
    return NULL;
}

/* Runs the bands in their order, on this thread and threads - 1 others. Returns 0, or 1 if memory runs out. */
int EXPORT(mssr_run_)(const struct operation *operations, int32_t num_operations, const struct band *bands,
                      int32_t num_bands, int32_t threads)
{
    struct run run = {.operations = operations, .bands = bands, .num_bands = num_bands, .threads = 1};
    for (int32_t i = 0; i < num_operations; i++) {
        const struct operation *op = operations + i;
        if (op->kind == CONVOLUTION) {
            size_t channels = (size_t)(op->in_channels + op->block) * TILE_VECTORS;
            size_t bytes = (channels + (size_t)op->out_channels * ACCUMULATORS) * sizeof(vec);
            run.scratch = bytes > run.scratch ? bytes : run.scratch;
        }
    }
    run.scratch = (run.scratch + 64) / 64 * 64;
    run.next = calloc((size_t)num_bands + 1, sizeof *run.next);
    pthread_t *others = malloc((size_t)threads * sizeof *others);
    if (!run.next || !others) {
        free(run.next);
        free(others);
        return 1;
    }
    int32_t started = 0;
    while (started < threads - 1 && pthread_create(others + started, NULL, work, &run) == 0)
        started++;
    run.threads = started + 1;
    atomic_store(&run.ready, 1);
    work(&run);
    for (int32_t i = 0; i < started; i++)
        pthread_join(others[i], NULL);
    free(run.next);
    free(others);
    return atomic_load(&run.failed) ? 1 : 0;
}

/* Shape of the tiles, which a weight's offset depends on (lanes, rows, vectors across), and the gap between rows. */
void EXPORT(mssr_tile_)(int32_t *shape)
{
    shape[0] = LANES;
    shape[1] = ROWS;
    shape[2] = VECTORS;
    shape[3] = ROW_GAP;
}

/* Whether this processor has the instructions that this file was compiled for. */
int32_t EXPORT(mssr_supported_)(void)
{
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") != 0;
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}
