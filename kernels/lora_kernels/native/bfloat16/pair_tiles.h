// Products of small tiles by AVX512-BF16's dot product of pairs. Lanes are tokens: x lies in panels, [K/2][lanes] pairs, and each pair of
// a weight row is multiplied with a panel's vector. So sums run over k in one order, whatever else is in the batch.

typedef const uint32_t __attribute__((may_alias)) pairs;  // two bf16 each

// to[n][lane] = from[n][lane] + sum over k of the pairs w[n * row + k * step] and panel[k][lane], for NB rows and NV vectors of 16
// lanes; from: null for zeros. next: null, or where NB rows lie that are needed soon.
static inline __attribute__((always_inline)) void pair_tile(const int NB, const int NV, pairs *w, int64_t row, int64_t step,
                                                            pairs *panel, int64_t K2, const float *from, float *to, pairs *next) {
  __m512 acc[16][2];
#pragma GCC unroll 16
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[n][v] = from ? _mm512_loadu_ps(from + 16 * (NV * n + v)) : _mm512_setzero_ps();
  for (int64_t k0 = 0; k0 < K2; k0 += 16) {  // 16 pairs: a cache line
    if (next)
#pragma GCC unroll 16
      for (int n = 0; n < NB; n++) __builtin_prefetch(next + n * row + k0, 0, 2);
    for (int64_t k = k0; k < MIN(K2, k0 + 16); k++) {
      __m512bh x[2];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) x[v] = (__m512bh)_mm512_loadu_si512(panel + 16 * (NV * k + v));
#pragma GCC unroll 16
      for (int n = 0; n < NB; n++) {
        __m512bh weight = (__m512bh)_mm512_set1_epi32((int32_t)w[n * row + k * step]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[n][v] = _mm512_dpbf16_ps(acc[n][v], x[v], weight);
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(to + 16 * (NV * n + v), acc[n][v]);
}

// Up to 16 elements, those of `kept`.
static inline v16 load_kept(const bf16 *p, __mmask16 kept) {
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, p)), 16);
}
static inline void store_kept(void *p, v16 f, __mmask16 kept, int wide) {
  if (wide) _mm512_mask_storeu_ps(p, kept, (__m512)f);
  else _mm256_mask_storeu_epi16(p, kept, (__m256i)__builtin_convertvector(bf16_bits(f), u16x16));
}

static inline void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      t[i + 8 * j] = _mm512_shuffle_i32x4(r[i + 8 * j], r[i + 4 + 8 * j], 0x88);
      t[i + 4 + 8 * j] = _mm512_shuffle_i32x4(r[i + 8 * j], r[i + 4 + 8 * j], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// to[k][lane] = pair k of rows[lane], for pairs [k0, k1); a row is null (zeros) or has that many. width: lanes of a row of `to`.
static void pack_pairs(uint32_t *to, int64_t width, const bf16 *const rows[16], int64_t k0, int64_t k1) {
  for (int64_t k = k0; k < k1; k += 16) {
    __mmask16 kept = k1 - k < 16 ? (__mmask16)((1 << (k1 - k)) - 1) : 0xffff;
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      r[i] = rows[i] ? _mm512_maskz_loadu_epi32(kept, (const uint32_t *)rows[i] + k) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < MIN(16, k1 - k); i++) _mm512_storeu_si512(to + (k + i) * width, r[i]);
  }
}

// y[lane][n] for COUNT rows of [n][width] floats, at most 16, and `lanes` of the 16 that start there: transposed, times factor[lane].
static inline __attribute__((always_inline)) void unpack_rows(const int COUNT, void *const *y, int wide, const float *from,
                                                              int64_t width, int lanes, const v16 factor, const bf16 *bias) {
  const __mmask16 kept = (__mmask16)((1 << COUNT) - 1);
  __m512i r[16];
#pragma GCC unroll 16
  for (int n = 0; n < 16; n++)
    r[n] = n < COUNT ? (__m512i)((v16)_mm512_loadu_ps(from + n * width) * factor) : _mm512_setzero_si512();
  transpose16(r);
  v16 own = bias ? load_kept(bias, kept) : splat(0.0f);
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++)
    if (m < lanes) store_kept(y[m], (v16)r[m] + own, kept, wide);
}

// Linear layers. Panels have 32 tokens, the last 16 if that is enough. Weight rows are multiplied as they lie.
#define PAIR_LANES(M, p) ((M) - 32 * (p) > 16 ? 32 : 16)
#define PAIR_PANEL_BYTES (512 * 1024)  // half of a second-level cache
#define REPACKED_AHEAD 64  // lines of 64 bytes of repacked weights that are fetched ahead

#if defined(__AMX_BF16__)
#include "amx_tiles.h"
#else
#define has_amx 0
#define AMX_TOKENS 0
#define AMX_PACKED_BYTES(M, K) 0
#define amx_tiles(...) abort()
#define amx_pack(...) abort()
#define amx_repacked_part(...) abort()
#define amx_shape(...) abort()
#define amx_release() abort()
#endif

// One thread's share of the panels, by pairs; tokens beyond M are zero.
static void pack_bf16(void *panels, const bf16 *x, int64_t x_stride, int64_t M, int64_t K, int tid, int nt) {
  int64_t K2 = K / 2, lines = (K2 + 15) / 16, k0 = lines * tid / nt * 16, k1 = MIN(K2, lines * (tid + 1) / nt * 16);
  for (int64_t m = 0; m < M; m += 16) {
    const bf16 *rows[16];
    for (int i = 0; i < 16; i++) rows[i] = m + i < M ? x + (m + i) * x_stride : 0;
    pack_pairs((uint32_t *)panels + m / 32 * 32 * K2 + m % 32, PAIR_LANES(M, m / 32), rows, k0, k1);
  }
}
static void *room_bf16(int64_t K) { return 0; }  // its tiles need none

#define PAIR_TILE(NB, NV, AHEAD)                                                                                            \
  static __attribute__((noinline)) void pair_tile_##NB##_##NV##_##AHEAD(pairs *w, pairs *panel, int64_t K2, float *to) {     \
    pair_tile(NB, NV, w, K2, 1, panel, K2, 0, to, AHEAD ? w + NB * K2 : 0);                                                 \
  }
PAIR_TILE(12, 2, 1) PAIR_TILE(12, 2, 0) PAIR_TILE(4, 2, 0) PAIR_TILE(1, 2, 0) PAIR_TILE(12, 1, 1) PAIR_TILE(12, 1, 0) PAIR_TILE(4, 1, 0) PAIR_TILE(1, 1, 0)
#undef PAIR_TILE

// y[all tokens, lo..hi) = x . w[lo..hi)^T + bias. Panels are taken in groups that the second-level cache holds.
static void tiles_bf16(void *y, int64_t y_stride, int wide, const void *panels, const bf16 *w, const bf16 *bias, int64_t M, int64_t K, int64_t lo,
                       int64_t hi, void *room) {
#define TILES_OF(NB, NV, AHEAD) \
  for (; j + NB <= rows; j += NB) pair_tile_##NB##_##NV##_##AHEAD(from + j * K2, panel, K2, out + j * 16 * NV);
  if (has_amx) return amx_tiles(y, y_stride, wide, panels, w, bias, M, K, lo, hi);
  int64_t K2 = K / 2, count = (M + 31) / 32, group = MAX(2, PAIR_PANEL_BYTES / (128 * K2));
  float out[12 * 32] __attribute__((aligned(64)));
  for (int64_t first = 0; first < count; first += group)
    for (int64_t n = lo; n < hi; n += 12) {
      int64_t rows = MIN(12, hi - n);
      for (int64_t p = first; p < MIN(count, first + group); p++) {
        pairs *from = (pairs *)(w + n * 2 * K2), *panel = (pairs *)panels + 32 * p * K2;
        int64_t lanes = PAIR_LANES(M, p), j = 0;
        int is_first = p == first && n + 24 <= hi;
        if (lanes == 32) {
          if (is_first) TILES_OF(12, 2, 1)
          TILES_OF(12, 2, 0) TILES_OF(4, 2, 0) TILES_OF(1, 2, 0)
        } else {
          if (is_first) TILES_OF(12, 1, 1)
          TILES_OF(12, 1, 0) TILES_OF(4, 1, 0) TILES_OF(1, 1, 0)
        }
        for (int64_t v = 0; v < lanes && 32 * p + v < M; v += 16) {
          void *to[16];
          int here = (int)MIN(16, M - 32 * p - v);
          for (int m = 0; m < here; m++) to[m] = out_at_bf16(y, (32 * p + v + m) * y_stride + n, wide);
          if (rows == 12) {
            unpack_rows(12, to, wide, out + v, lanes, here, splat(1.0f), bias ? bias + n : 0);
            continue;
          }
          for (int m = 0; m < here; m++)
            for (int64_t i = 0; i < rows; i++)
              out_put_bf16(out_at_bf16(to[m], i, wide), out[i * lanes + v + m] + (bias ? bf16_to_float(bias[n + i]) : 0.0f), wide);
        }
      }
    }
#undef TILES_OF
}

// Up to 8 tokens: lanes are weight rows, 16 at a time, transposed in registers; a sum has the order that it has in a tile. y[token][n].
static inline __attribute__((always_inline)) void pair_columns(const int MB, void *y, int64_t y_stride, int wide, const bf16 *x,
                                                               int64_t x_stride, pairs *w, int64_t K2, int64_t count, const bf16 *bias, int has_next) {
  __mmask16 kept = count < 16 ? (__mmask16)((1 << count) - 1) : 0xffff;
  __m512 acc[8];
#pragma GCC unroll 8
  for (int m = 0; m < MB; m++) acc[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K2; k += 16) {
    __mmask16 here = K2 - k < 16 ? (__mmask16)((1 << (K2 - k)) - 1) : 0xffff;
    __m512i r[16];
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++) {
      r[n] = _mm512_maskz_loadu_epi32(n < count ? here : 0, w + n * K2 + k);
      if (has_next) __builtin_prefetch(w + (n + 16) * K2 + k, 0, 2);
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
#pragma GCC unroll 8
      for (int m = 0; m < MB; m++) {
        uint32_t pair = 0;
        if (k + i < K2) memcpy(&pair, x + m * x_stride + 2 * (k + i), sizeof pair);
        acc[m] = _mm512_dpbf16_ps(acc[m], (__m512bh)_mm512_set1_epi32((int32_t)pair), (__m512bh)r[i]);
      }
  }
  v16 own = bias ? load_kept(bias, kept) : splat(0.0f);
#pragma GCC unroll 8
  for (int m = 0; m < MB; m++)
    store_kept(out_at_bf16(y, m * y_stride, wide), (v16)acc[m] + own, kept, wide);
}

#define PAIR_COLUMNS(MB)                                                                                                         \
  static __attribute__((noinline)) void pair_columns_##MB(void *y, int64_t y_stride, int wide, const bf16 *x, int64_t x_stride,    \
                                                          pairs *w, int64_t K2, int64_t count, const bf16 *bias, int has_next) {            \
    pair_columns(MB, y, y_stride, wide, x, x_stride, w, K2, count, bias, has_next);                                                     \
  }
PAIR_COLUMNS(1) PAIR_COLUMNS(2) PAIR_COLUMNS(3) PAIR_COLUMNS(4) PAIR_COLUMNS(5) PAIR_COLUMNS(6) PAIR_COLUMNS(7) PAIR_COLUMNS(8)
#undef PAIR_COLUMNS

// As tiles_bf16, for up to 8 tokens as they lie.
static void few_rows(void *y, int64_t y_stride, int wide, const bf16 *x, int64_t x_stride, const bf16 *w, const bf16 *bias, int64_t M, int64_t K2,
                     int64_t lo, int64_t hi) {
  for (int64_t n = lo; n < hi; n += 16) {
    int64_t count = MIN(16, hi - n);
    int has_next = n + 32 <= hi;
#define COLUMNS_OF(MB)                                                                                                      \
  case MB:                                                                                                                  \
    pair_columns_##MB(out_at_bf16(y, n, wide), y_stride, wide, x, x_stride, (pairs *)(w + n * 2 * K2), K2, count, bias ? bias + n : 0, has_next);   \
    break;
    switch (M) {
      COLUMNS_OF(1) COLUMNS_OF(2) COLUMNS_OF(3) COLUMNS_OF(4) COLUMNS_OF(5) COLUMNS_OF(6) COLUMNS_OF(7) COLUMNS_OF(8)
    }
#undef COLUMNS_OF
  }
}

// Repacked weights: 32 rows are a block, [K/2][32] pairs, and 16 that are left over another. So memory is read in the order of its
// addresses, which is up to twice as fast as 16 rows at once, and a vector has 16 rows in its lanes. Sums have the order that they have
// for weights as they lie.


#define REPACKED_TOKENS 12  // of one kernel
#define REPACKED_PARAMETERS                                                                                                        \
  void *y, int64_t y_stride, int wide, const bf16 *x, int64_t x_stride, pairs *w, int64_t K2, const bf16 *bias, pairs *next, int64_t lines

// MB tokens as they lie, for one block of VECTORS * 16 rows. lines: how many to fetch from `next`; 0: what comes soon.
static inline __attribute__((always_inline)) void repacked_columns(const int MB, const int VECTORS, REPACKED_PARAMETERS) {
  __m512 acc[REPACKED_TOKENS][2];
#pragma GCC unroll 12
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) acc[m][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K2; k++) {
    __m512bh rows[2];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      rows[v] = (__m512bh)_mm512_loadu_si512(w + 16 * (VECTORS * k + v));
      if (!lines) __builtin_prefetch(w + 16 * (VECTORS * k + v + REPACKED_AHEAD), 0, 0);
    }
    if (k < lines) __builtin_prefetch(next + 16 * k, 0, 2);
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) {
      uint32_t pair;
      memcpy(&pair, x + m * x_stride + 2 * k, sizeof pair);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], (__m512bh)_mm512_set1_epi32((int32_t)pair), rows[v]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++)
      out_put16_bf16(out_at_bf16(y, m * y_stride + 16 * v, wide), (v16)acc[m][v] + (bias ? load_bf16(bias + 16 * v) : splat(0.0f)), wide);
}

#define REPACKED_COLUMNS(MB, VECTORS)                                                                        \
  static __attribute__((noinline)) void repacked_columns_##MB##_##VECTORS(REPACKED_PARAMETERS) {             \
    repacked_columns(MB, VECTORS, y, y_stride, wide, x, x_stride, w, K2, bias, next, lines);                 \
  }
#define REPACKED_COLUMNS_OF(MB) REPACKED_COLUMNS(MB, 1) REPACKED_COLUMNS(MB, 2)
REPACKED_COLUMNS_OF(1) REPACKED_COLUMNS_OF(2) REPACKED_COLUMNS_OF(3) REPACKED_COLUMNS_OF(4) REPACKED_COLUMNS_OF(5) REPACKED_COLUMNS_OF(6)
REPACKED_COLUMNS_OF(7) REPACKED_COLUMNS_OF(8) REPACKED_COLUMNS_OF(9) REPACKED_COLUMNS_OF(10) REPACKED_COLUMNS_OF(11) REPACKED_COLUMNS_OF(12)
#define BY_VECTORS(MB) {repacked_columns_##MB##_1, repacked_columns_##MB##_2}
static void (*const REPACKED_KERNELS[REPACKED_TOKENS][2])(REPACKED_PARAMETERS) = {
    BY_VECTORS(1), BY_VECTORS(2), BY_VECTORS(3), BY_VECTORS(4),  BY_VECTORS(5),  BY_VECTORS(6),
    BY_VECTORS(7), BY_VECTORS(8), BY_VECTORS(9), BY_VECTORS(10), BY_VECTORS(11), BY_VECTORS(12)};
#undef REPACKED_COLUMNS
#undef REPACKED_COLUMNS_OF
#undef BY_VECTORS

// What x takes where repacked weights are multiplied with a copy of it, made by amx_pack.
#define REPACKED_PANEL_BYTES(M, K) (has_amx && (M) > AMX_TOKENS ? AMX_PACKED_BYTES(M, K) : 0)

// y[all tokens, lo..hi) = x . w[lo..hi)^T + bias, for repacked weights. panels: null, or x as above. lo: a multiple of 32, hi: another, or all rows. If there are more
// tokens than one kernel takes, each fetches its share of the next block.
static void repacked_part(void *y, int64_t y_stride, int wide, const bf16 *x, int64_t x_stride, const void *panels, const bf16 *w, const bf16 *bias,
                          int64_t M, int64_t K2, int64_t lo, int64_t hi) {
  if (!M) return;
  if (has_amx) return amx_repacked_part(y, y_stride, wide, x, x_stride, panels, w, bias, M, K2, lo, hi);
  int64_t groups = (M + REPACKED_TOKENS - 1) / REPACKED_TOKENS;
  for (int64_t n = lo, vectors; n < hi; n += 16 * vectors) {
    vectors = hi - n >= 32 ? 2 : 1;
    pairs *block = (pairs *)(w + n * 2 * K2);
    int64_t lines = groups == 1 || n + 64 > hi ? 0 : 2 * K2 / groups;
    for (int64_t g = 0; g < groups; g++) {
      int64_t m = M * g / groups, tokens = M * (g + 1) / groups - m;
      REPACKED_KERNELS[tokens - 1][vectors - 1](out_at_bf16(y, m * y_stride + n, wide), y_stride, wide, x + m * x_stride, x_stride, block, K2, bias ? bias + n : 0,
                                             block + 16 * (2 * K2 + g * lines), lines);
    }
  }
}
