// Products of small tiles in float, for processors without a bf16 dot product. Lanes are tokens: x lies in panels, [K][lanes], and
// each weight is multiplied with a panel's column. So sums run over k in one order, whatever else is in the batch.

// Rows of converted weights lie one cache line off a multiple of their length: twelve rows of 1,024 floats would share one set of
// the first-level cache, which has eight places.
#define ROOM_STRIDE(K) (((K) + 15) / 16 * 16 + 16)

// Weight rows of one product. next: as many bf16 rows of K that come after them, fetched while these are used; or null.
typedef struct {
  const float *rows;
  int64_t stride;
  const bf16 *next;
} tile_weights;

// Adds w[n][k] * panel[k][lane] for the k of [k0, k1).
static inline __attribute__((always_inline)) void tile_steps(const int NB, const int NV, v8 acc[12][2], const float *w,
                                                             int64_t stride, const float *panel, int64_t k0, int64_t k1) {
  panel += 8 * NV * k0;
  for (int64_t k = k0; k < k1; k++, panel += 8 * NV) {
    v8 x[2];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) memcpy(&x[v], panel + 8 * v, sizeof x[v]);
#pragma GCC unroll 12
    for (int n = 0; n < NB; n++) {
      v8 weight = (v8)_mm256_broadcast_ss(w + n * stride + k);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[n][v] = fma8(weight, x[v], acc[n][v]);
    }
  }
}

// out[n][lane] = sum over k of w[n][k] * panel[k][lane], for NB weight rows from `first` on and NV vectors of eight lanes.
static inline __attribute__((always_inline)) void tile(const int NB, const int NV, const int AHEAD, const tile_weights *weights,
                                                       int64_t first, int64_t K, const float *panel, float *out) {
  const float *w = weights->rows + first * weights->stride;
  v8 acc[12][2];
#pragma GCC unroll 12
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[n][v] = (v8){0};
  if (AHEAD) {
    for (int64_t k = 0; k < K; k += 32) {  // 32: a cache line of bf16
#pragma GCC unroll 12
      for (int n = 0; n < NB; n++) __builtin_prefetch(weights->next + (first + n) * K + k, 0, 3);
      tile_steps(NB, NV, acc, w, weights->stride, panel, k, MIN(K, k + 32));
    }
  } else {
    tile_steps(NB, NV, acc, w, weights->stride, panel, 0, K);
  }
#pragma GCC unroll 12
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) memcpy(out + ((first + n) * NV + v) * 8, &acc[n][v], sizeof acc[n][v]);
}

#define TILE(NB, NV, AHEAD)                                                                                              \
  static __attribute__((noinline)) void tile_##NB##_##NV##_##AHEAD(const tile_weights *w, int64_t first, int64_t K,     \
                                                                   const float *panel, float *out) {                     \
    tile(NB, NV, AHEAD, w, first, K, panel, out);                                                                        \
  }
TILE(12, 1, 0) TILE(6, 1, 0) TILE(4, 1, 0) TILE(1, 1, 0) TILE(6, 2, 0) TILE(2, 2, 0) TILE(1, 2, 0) TILE(12, 1, 1) TILE(6, 2, 1)
#undef TILE

// The same sums for one panel of 8 lanes, from bf16 rows as they lie, two k at a time: writing floats out pays from two panels on.
static inline __attribute__((always_inline)) void tile_of_pairs(const int NB, const bf16 *w, const bf16 *next, int64_t K,
                                                                const float *panel, float *out) {
  const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
  v8 acc[8];
#pragma GCC unroll 8
  for (int n = 0; n < NB; n++) acc[n] = (v8){0};
  for (int64_t line = 0; line < K; line += 32) {  // 32: a cache line of bf16
    if (next)
#pragma GCC unroll 8
      for (int n = 0; n < NB; n++) __builtin_prefetch(next + n * K + line, 0, 3);
    for (int64_t k = line; k < MIN(K, line + 32); k += 2, panel += 16) {
      v8 x[2];
      memcpy(&x[0], panel, sizeof x[0]), memcpy(&x[1], panel + 8, sizeof x[1]);
#pragma GCC unroll 8
      for (int n = 0; n < NB; n++) {
        __m256i pair = _mm256_castps_si256(_mm256_broadcast_ss((const float *)(w + n * K + k)));
        acc[n] = fma8((v8)_mm256_slli_epi32(pair, 16), x[0], acc[n]);
        acc[n] = fma8((v8)_mm256_and_si256(pair, upper), x[1], acc[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < NB; n++) memcpy(out + 8 * n, &acc[n], sizeof acc[n]);
}

#define PAIRS(NB)                                                                                                             \
  static __attribute__((noinline)) void pairs_##NB(const bf16 *w, const bf16 *next, int64_t K, const float *panel, float *out) { \
    tile_of_pairs(NB, w, next, K, panel, out);                                                                                \
  }
PAIRS(8) PAIRS(4) PAIRS(1)
#undef PAIRS

// out[n][lane] for `count` bf16 weight rows; K even. Rows behind those of a tile are fetched while it is computed.
static void pairs_of_rows(const bf16 *w, int64_t count, int64_t K, const float *panel, float *out) {
#define PAIRS_OF(NB)                       \
  for (; n + NB <= count; n += NB) pairs_##NB(w + n * K, n + 2 * NB <= count ? w + (n + NB) * K : 0, K, panel, out + 8 * n);
  int64_t n = 0;
  if (K % 2048) PAIRS_OF(8)  // else eight rows would share one set of the first-level cache
  PAIRS_OF(4) PAIRS_OF(1)
#undef PAIRS_OF
}

// out[n][lane] for `count` (at most 12) weight rows and a panel of W (8 or 16) lanes.
static void tile_rows(const tile_weights *w, int64_t count, int W, int64_t K, const float *panel, float *out) {
#define TILES_OF(NB, NV, AHEAD) \
  for (; n + NB <= count; n += NB) tile_##NB##_##NV##_##AHEAD(w, n, K, panel, out);
  int64_t n = 0;
  if (W == 8) {
    if (w->next) TILES_OF(12, 1, 1)
    if (w->stride % 1024 == 0) TILES_OF(6, 1, 0)  // as they lie in a float32 base: twelve would share one set, see above
    TILES_OF(12, 1, 0) TILES_OF(4, 1, 0) TILES_OF(1, 1, 0)
  } else {
    if (w->next) TILES_OF(6, 2, 1)
    TILES_OF(6, 2, 0) TILES_OF(2, 2, 0) TILES_OF(1, 2, 0)
  }
#undef TILES_OF
}

// Panels have 16 tokens, the last 8 if that is enough.
#define PANEL_WIDTH(M, p) ((M) - 16 * (p) > 8 ? 16 : 8)
