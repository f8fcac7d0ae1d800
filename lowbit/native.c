/* The CPU's packed products in C, for processors with AVX-512 VNNI; compiled on request by native.py.

   Weights come in the layout of torch's four-bit kernel (cpu.py): blocks of 64 rows, in each 32 bytes per
   column, byte j holding row j in its low and row j + 32 in its high half. Scales are pairs of bfloat16
   [groups, rows, 2] for `(code - 8) * scale + zero`. Eight bits are two planes of four, one after the other.

   matvec: activations are scaled per group to 16 bits, `256 * high + low`, so that the products are of bytes
   (vpdpbusd) and exact. Four columns of a row must lie in one lane: two byte shuffles put them there.
   What limits it is then the memory that it reads.

   dequantize: bfloat16 [columns, rows], for a dense product.

   dense: a row times a bfloat16 matrix, where the processor multiplies bfloat16 (vdpbf16ps). */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 64
#define BYTES 32 /* of a block, per column */
#define AHEAD 3072 /* bytes; far enough for memory, near enough for the first-level cache */
#define LARGEST 32512.0f /* 127 * 256 */

typedef struct {
  int8_t *high, *low; /* [columns] */
  float *step;        /* [groups] */
  int32_t *sum;       /* [groups] of 256 * high + low */
} Limbs;

static inline __m512 widen(const uint16_t *values) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

/* Rounded to the nearest, ties to even; NaN stays NaN. */
static inline __m256i narrow(__m512 values) {
  __m512i bits = _mm512_castps_si512(values);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

static inline void scale_and_zero(const uint16_t *pairs, int part, __m512 *scale, __m512 *zero) {
  __m512i both = _mm512_loadu_si512(pairs + 32 * part);
  *scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

static void split(const uint16_t *x, int64_t columns, int64_t group, Limbs to) {
  for (int64_t g = 0; g < columns / group; g++) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
      __m512 value = widen(x + k);
      nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
    }
    float most = _mm512_reduce_max_ps(largest);
    __m512 inverse = _mm512_set1_ps(most > 1e-30f ? LARGEST / most : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
      __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(widen(x + k), inverse));
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
      _mm_storeu_si128((__m128i *)(to.high + k), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128((__m128i *)(to.low + k), _mm512_cvtepi32_epi8(low));
      sum = _mm512_add_epi32(sum, whole);
    }
    to.sum[g] = _mm512_reduce_add_epi32(sum);
    to.step[g] = nan ? __builtin_nanf("") : most / LARGEST;
  }
}

static inline __m512i four_columns(const int8_t *at) {
  int32_t bytes;
  __builtin_memcpy(&bytes, at, 4);
  return _mm512_set1_epi32(bytes);
}

static void multiply_block(const uint8_t *tile, const uint16_t *scales, int64_t stride, int64_t columns,
                           int64_t group, int64_t planes, Limbs x, __m512 total[4]) {
  /* After unpacking, lanes hold columns 0 and 2 of rows 0-7 and 16-23, then columns 1 and 3 of them. */
  uint8_t index[64];
  for (int row = 0; row < 16; row++) {
    int byte = row < 8 ? 2 * row : 16 + 2 * (row - 8);
    index[4 * row] = byte, index[4 * row + 1] = byte + 32, index[4 * row + 2] = byte + 1, index[4 * row + 3] = byte + 33;
  }
  const __m512i order = _mm512_loadu_si512(index);
  const __m512i nibble = _mm512_set1_epi8(15);
  int64_t groups = columns / group;
  for (int64_t g = 0; g < planes * groups; g++, scales += stride) {
    int64_t own = g % groups;
    const int8_t *high = x.high + own * group, *low = x.low + own * group;
    __m512i h[4], l[4];
    for (int i = 0; i < 4; i++) h[i] = l[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < group; k += 4, tile += 4 * BYTES) {
      _mm_prefetch((const char *)tile + AHEAD, _MM_HINT_T0);
      _mm_prefetch((const char *)tile + AHEAD + 64, _MM_HINT_T0);
      __m512i first = _mm512_loadu_si512(tile), second = _mm512_loadu_si512(tile + 64);
      __m512i a = _mm512_permutexvar_epi8(order, _mm512_unpacklo_epi8(first, second));
      __m512i b = _mm512_permutexvar_epi8(order, _mm512_unpackhi_epi8(first, second));
      __m512i codes[4] = {_mm512_and_si512(a, nibble), _mm512_and_si512(b, nibble),
                          _mm512_and_si512(_mm512_srli_epi16(a, 4), nibble),
                          _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble)};
      __m512i xh = four_columns(high + k), xl = four_columns(low + k);
      for (int i = 0; i < 4; i++) {
        h[i] = _mm512_dpbusd_epi32(h[i], codes[i], xh);
        l[i] = _mm512_dpbusd_epi32(l[i], codes[i], xl);
      }
    }
    __m512i middle = _mm512_set1_epi32(8 * x.sum[own]);
    __m512 step = _mm512_set1_ps(x.step[own]), mass = _mm512_set1_ps(x.sum[own] * x.step[own]);
    __m512i sums[4];
    for (int i = 0; i < 4; i++)
      sums[i] = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(h[i], 8), l[i]), middle);
    for (int half = 0; half < 2; half++) {
      __m512i a = sums[2 * half], b = sums[2 * half + 1];
      __m512i rows[2] = {_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee)};
      for (int i = 0; i < 2; i++) {
        __m512 scale, zero, *sum = total + 2 * half + i;
        scale_and_zero(scales, 2 * half + i, &scale, &zero);
        *sum = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(rows[i]), step), scale, *sum);
        *sum = _mm512_fmadd_ps(mass, zero, *sum);
      }
    }
  }
}

/* out [rows_x, out_features] = x [rows_x, columns] times the weight's transpose, plus bias if there is one.
   Returns 0, or 1 where there is no memory. */
int lowbit_matvec(const uint16_t *x, const uint8_t *tiles, const uint16_t *scales, const uint16_t *bias,
                  uint16_t *out, int64_t rows_x, int64_t columns, int64_t rows, int64_t group, int64_t planes,
                  int64_t out_features, int threads) {
  int64_t groups = columns / group;
  int8_t *limbs = malloc(rows_x * (2 * columns + 8 * groups));
  if (!limbs) return 1;
  float *steps = (float *)(limbs + 2 * rows_x * columns);
  for (int64_t m = 0; m < rows_x; m++) {
    Limbs to = {limbs + 2 * m * columns, limbs + (2 * m + 1) * columns, steps + 2 * m * groups,
                (int32_t *)(steps + (2 * m + 1) * groups)};
    split(x + m * columns, columns, group, to);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < rows / BLOCK; block++) {
    for (int64_t m = 0; m < rows_x; m++) {
      Limbs from = {limbs + 2 * m * columns, limbs + (2 * m + 1) * columns, steps + 2 * m * groups,
                    (int32_t *)(steps + (2 * m + 1) * groups)};
      __m512 total[4];
      for (int i = 0; i < 4; i++) total[i] = _mm512_setzero_ps();
      multiply_block(tiles + block * planes * columns * BYTES, scales + block * BLOCK * 2, rows * 2, columns, group,
                     planes, from, total);
      for (int i = 0; i < 4; i++) {
        int64_t row = block * BLOCK + 16 * i, left = out_features - row;
        if (left <= 0) break;
        __mmask16 inside = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
        if (bias) {
          __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, bias + row));
          total[i] = _mm512_add_ps(total[i], _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
        }
        _mm256_mask_storeu_epi16(out + m * out_features + row, inside, narrow(total[i]));
      }
    }
  }
  free(limbs);
  return 0;
}

/* out [columns, blocks * 64] from `blocks` blocks beginning at `tiles`; `rows` is that of the whole weight. */
void lowbit_dequantize(const uint8_t *tiles, const uint16_t *scales, uint16_t *out, int64_t blocks, int64_t columns,
                       int64_t rows, int64_t group, int64_t planes, int threads) {
  const __m512i nibble = _mm512_set1_epi32(15);
  int64_t groups = columns / group;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    const uint8_t *tile = tiles + block * planes * columns * BYTES;
    for (int64_t g = 0; g < groups; g++) {
      __m512 scale[4], zero[4];
      for (int i = 0; i < 4; i++) {
        const uint16_t *pairs = scales + g * rows * 2 + block * BLOCK * 2;
        scale_and_zero(pairs, i, &scale[i], &zero[i]);
        if (planes == 2) {
          __m512 first = zero[i];
          scale_and_zero(pairs + groups * rows * 2, i, &scale[i], &zero[i]);
          zero[i] = _mm512_add_ps(zero[i], first);
        }
        /* A whole number of scales, rounded to bfloat16: divided it is that number again. */
        __mmask16 scaled = _mm512_cmp_ps_mask(scale[i], _mm512_setzero_ps(), _CMP_NEQ_UQ);
        __m512 number = _mm512_roundscale_ps(_mm512_maskz_div_ps(scaled, zero[i], scale[i]), 0);
        zero[i] = _mm512_mul_ps(_mm512_sub_ps(number, _mm512_set1_ps(planes == 2 ? 136.0f : 8.0f)), scale[i]);
      }
      for (int64_t k = g * group; k < (g + 1) * group; k++) {
        uint16_t *to = out + (k * blocks + block) * BLOCK;
        for (int half = 0; half < 2; half++) {
          const __m128i *bytes = (const __m128i *)(tile + k * BYTES) + half;
          __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
          __m512i low = _mm512_and_si512(both, nibble), high = _mm512_srli_epi32(both, 4);
          if (planes == 2) {
            both = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes + 2 * columns));
            low = _mm512_add_epi32(_mm512_slli_epi32(low, 4), _mm512_and_si512(both, nibble));
            high = _mm512_add_epi32(_mm512_slli_epi32(high, 4), _mm512_srli_epi32(both, 4));
          }
          __m512 a = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), scale[half], zero[half]);
          __m512 b = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), scale[2 + half], zero[2 + half]);
          _mm256_storeu_si256((__m256i *)(to + 16 * half), narrow(a));
          _mm256_storeu_si256((__m256i *)(to + 32 + 16 * half), narrow(b));
        }
      }
    }
  }
}

#ifdef __AVX512BF16__
static float dot(const uint16_t *x, const uint16_t *weight, int64_t columns) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64) {
    for (int i = 0; i < 2; i++) {
      _mm_prefetch((const char *)(weight + k + 32 * i) + AHEAD, _MM_HINT_T0);
      __m512i w = _mm512_loadu_si512(weight + k + 32 * i), v = _mm512_loadu_si512(x + k + 32 * i);
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)w, (__m512bh)v);
    }
  }
  for (; k < columns; k += 32) {
    __mmask32 inside = columns - k >= 32 ? 0xffffffff : ((__mmask32)1 << (columns - k)) - 1;
    __m512i w = _mm512_maskz_loadu_epi16(inside, weight + k), v = _mm512_maskz_loadu_epi16(inside, x + k);
    sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)w, (__m512bh)v);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

/* out [rows] = weight [rows, columns] times x [columns], plus bias if there is one. */
void lowbit_dense(const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t rows,
                  int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t first = 0; first < rows; first += 16) {
    float sums[16] = {0};
    int64_t count = rows - first < 16 ? rows - first : 16;
    for (int64_t i = 0; i < count; i++) sums[i] = dot(x, weight + (first + i) * columns, columns);
    __mmask16 inside = (__mmask16)((1 << count) - 1);
    __m512 total = _mm512_loadu_ps(sums);
    if (bias) {
      __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, bias + first));
      total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    }
    _mm256_mask_storeu_epi16(out + first, inside, narrow(total));
  }
}
#endif
