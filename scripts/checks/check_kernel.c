/* Random convolutions of kernel.c against the sum that defines them, in double precision; see check_kernel.sh. */
#define NAME checked
#include "../../mssr_basicsr/sparse/kernel.c"

#include <math.h>
#include <stdio.h>

static uint32_t state = 1;

static int32_t below(int32_t n) /* a random number from 0 to n - 1 */
{
    state = state * 1664525u + 1013904223u;
    return (int32_t)((state >> 8) % (uint32_t)n);
}

static float value(void)
{
    return (float)below(2001) / 1000.0f - 1.0f;
}

static void *allocate(size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!memory)
        exit(2);
    return memory;
}

static struct value new_value(int32_t channels, int32_t height, int32_t width)
{
    struct value v = {NULL, channels, height, width, (width + LANES - 1) / LANES, height};
    v.data = allocate((size_t)height * ((size_t)channels * (size_t)v.vectors + ROW_GAP) * sizeof(vec));
    return v;
}

/* The largest relative error of one random convolution. */
static double check_one(void)
{
    int32_t ci = 1 + below(40), co = 1 + below(20), h = 1 + below(20), w = 1 + below(90), k = below(2) ? 3 : 1;
    int32_t block = 1 + below(9), blocks = (ci + block - 1) / block, keep = below(5);
    float *image = allocate((size_t)(ci * h * w) * 4), *result = allocate((size_t)(co * h * w) * 4);
    float *dense = allocate((size_t)(co * ci * k * k) * 4), *weights = allocate((size_t)(co * ci * k * k) * 4);
    float *bias = allocate((size_t)co * 4), *slope = allocate((size_t)co * 4);
    uint16_t *offset = allocate((size_t)(co * ci * k * k) * 2);
    int32_t *start = allocate((size_t)(blocks * co + 1) * 4), count = 0;
    for (int32_t i = 0; i < ci * h * w; i++)
        image[i] = value();
    for (int32_t i = 0; i < co * ci * k * k; i++)
        dense[i] = below(4) < keep ? value() : 0.0f;
    for (int32_t c = 0; c < co; c++) {
        bias[c] = value();
        slope[c] = value();
    }
    for (int32_t b = 0; b < blocks; b++)
        for (int32_t c = 0; c < co; c++) {
            start[b * co + c] = count;
            for (int32_t i = b * block; i < ci && i < (b + 1) * block; i++)
                for (int32_t t = 0; t < k * k; t++) {
                    float weight = dense[(c * ci + i) * k * k + t];
                    if (weight == 0.0f)
                        continue;
                    int32_t ky = t / k + 1 - k / 2, kx = t % k + 1 - k / 2;
                    weights[count] = weight;
                    offset[count++] = (uint16_t)((i - b * block) * TILE_VECTORS + ky * TILE_WIDTH + kx);
                }
        }
    start[blocks * co] = count;
    struct value in = new_value(ci, h, w), out = new_value(co, h, w);
    struct operation operations[3] = {
        {.kind = PACK, .output = &in, .image = image, .factor = 1},
        {.kind = CONVOLUTION, .inputs = 1, .input = {&in}, .output = &out, .weights = weights, .offset = offset,
         .start = start, .bias = bias, .slope = slope, .in_channels = ci, .out_channels = co, .block = block,
         .activation = SLOPE, .factor = 1, .scale = 0.5f},
        {.kind = UNPACK, .inputs = 1, .input = {&out}, .image = result, .factor = 1},
    };
    struct band bands[3] = {{0, 0, h}, {1, 0, h}, {2, 0, h}};
    if (mssr_run_checked(operations, 3, bands, 3, 1 + below(3)))
        exit(2);
    double error = 0, largest = 1e-3;
    for (int32_t c = 0; c < co; c++)
        for (int32_t y = 0; y < h; y++)
            for (int32_t x = 0; x < w; x++) {
                double sum = bias[c];
                for (int32_t i = 0; i < ci; i++)
                    for (int32_t t = 0; t < k * k; t++) {
                        int32_t row = y + t / k - k / 2, column = x + t % k - k / 2;
                        if (row >= 0 && row < h && column >= 0 && column < w)
                            sum += (double)dense[(c * ci + i) * k * k + t] * image[(i * h + row) * w + column];
                    }
                sum = 0.5 * (sum < 0 ? sum * slope[c] : sum);
                error = fmax(error, fabs(sum - result[(c * h + y) * w + x]));
                largest = fmax(largest, fabs(sum));
            }
    void *all[] = {image, result, dense, weights, bias, slope, offset, start, in.data, out.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    return error / largest;
}

int main(void)
{
    int32_t shape[4];
    mssr_tile_checked(shape);
    double worst = 0;
    for (int i = 0; i < 300; i++)
        worst = fmax(worst, check_one());
    printf("300 convolutions with %d lanes, largest relative error %.1e\n", (int)shape[0], worst);
    return worst > 1e-5;
}
