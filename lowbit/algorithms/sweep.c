/* Columns rounded one after the other, each told of the errors of those before it: the loop of
   `lowbit_kernels.reference.round_columns` for a CPU; compiled on request by columns.py.

   Rows of the weight never meet, so four registers of them go through all columns together: their errors so far
   stay in the first-level cache (with AVX-512 32 KB for 128 columns), their sums in eight registers. What a loop
   of operations on whole rows pays for is the start of each, and the way through memory between them. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS 4
#define ROWS (LANES * PARTS)

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

typedef struct {
  const float *base, *mixing, *scales, *zeros, *start, *inverse; /* inverse: NULL for GPTQ */
  const int64_t *groups;
  float *levels, *errors;
  int64_t columns, stride, rows; /* stride: of mixing, in floats */
  float largest;
} Task;

/* base + sum of mixing[i] * errors[i] over the columns before, in two chains for each part. */
static void sum_up(const vec *errors, const float *mixing, int64_t before, vec *sums) {
  vec a0 = sums[0], a1 = sums[1], a2 = sums[2], a3 = sums[3];
  vec b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
  int64_t i = 0;
  for (; i + 1 < before; i += 2) {
    const vec *even = errors + i * PARTS, *odd = even + PARTS;
    const float m = mixing[i], n = mixing[i + 1];
    a0 += m * even[0], a1 += m * even[1], a2 += m * even[2], a3 += m * even[3];
    b0 += n * odd[0], b1 += n * odd[1], b2 += n * odd[2], b3 += n * odd[3];
  }
  if (i < before) {
    const vec *even = errors + i * PARTS;
    const float m = mixing[i];
    a0 += m * even[0], a1 += m * even[1], a2 += m * even[2], a3 += m * even[3];
  }
  sums[0] = a0 + b0, sums[1] = a1 + b1, sums[2] = a2 + b2, sums[3] = a3 + b3;
}

static inline float within(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

/* Far from the grid the nearest code is the last one; near it, adding 1.5 * 2^23 rounds, half to even. */
static inline float nearest(float value) {
  return (within(value, -65536.0f, 65536.0f) + 12582912.0f) - 12582912.0f;
}

static void round_tile(const Task *t, int64_t first, int64_t count) {
  vec errors[t->columns * PARTS], sums[PARTS];
  float scale[ROWS], zero[ROWS], start[ROWS], level[ROWS];
  float *wanted = (float *)sums;
  for (int r = 0; r < ROWS; r++) scale[r] = 1.0f, zero[r] = start[r] = 0.0f;
  memset(sums, 0, sizeof sums);
  const size_t bytes = count * sizeof(float);
  for (int64_t k = 0; k < t->columns; k++) {
    const int64_t at = k * t->rows + first, group = t->groups[k] * t->rows + first;
    float *error = (float *)(errors + k * PARTS);
    memcpy(wanted, t->base + at, bytes);
    memcpy(start, t->start + at, bytes);
    memcpy(scale, t->scales + group, bytes);
    memcpy(zero, t->zeros + group, bytes);
    sum_up(errors, t->mixing + k * t->stride, k, sums);
    if (t->inverse)
      for (int r = 0; r < ROWS; r++) wanted[r] = wanted[r] * t->inverse[k] + start[r] * scale[r];
    for (int r = 0; r < ROWS; r++)
      level[r] = within(nearest(wanted[r] / scale[r]) + zero[r], 0.0f, t->largest) - zero[r];
    if (t->inverse)
      for (int r = 0; r < ROWS; r++) error[r] = (start[r] - level[r]) * scale[r];
    else
      for (int r = 0; r < ROWS; r++) error[r] = start[r] - level[r] * scale[r];
    memcpy(t->levels + at, level, bytes);
    memcpy(t->errors + at, error, bytes);
  }
}

void lowbit_round_columns(
    const float *base, const float *mixing, int64_t stride, const float *scales, const float *zeros,
    const int64_t *groups, float largest, const float *start, const float *inverse, float *levels, float *errors,
    int64_t columns, int64_t rows, int threads) {
  const Task task = {base, mixing, scales, zeros, start, inverse, groups, levels, errors, columns, stride, rows, largest};
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < rows; first += ROWS)
    round_tile(&task, first, rows - first < ROWS ? rows - first : ROWS);
}
