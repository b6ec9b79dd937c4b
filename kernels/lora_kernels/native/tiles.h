// Products of small tiles in float, for processors without a bf16 dot product. Lanes are tokens: x lies in panels, [K][lanes], and
// each weight is multiplied with a panel's column. So sums run over k in one order, whatever else is in the batch.

// out[n][lane] = sum over k of w[n][k] * panel[k][lane], for NB weight rows and NV vectors of eight lanes.
static inline __attribute__((always_inline)) void tile(const int NB, const int NV, const float *w, int64_t K, const float *panel,
                                                       float *out) {
  v8 acc[12][2];
#pragma GCC unroll 12
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[n][v] = (v8){0};
  for (int64_t k = 0; k < K; k++, panel += 8 * NV) {
    v8 x[2];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) memcpy(&x[v], panel + 8 * v, sizeof x[v]);
#pragma GCC unroll 12
    for (int n = 0; n < NB; n++) {
      v8 weight = (v8)_mm256_broadcast_ss(w + n * K + k);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[n][v] += weight * x[v];
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) memcpy(out + (n * NV + v) * 8, &acc[n][v], sizeof acc[n][v]);
}

#define TILE(NB, NV)                                                                                                      \
  static __attribute__((noinline)) void tile_##NB##_##NV(const float *w, int64_t K, const float *panel, float *out) {    \
    tile(NB, NV, w, K, panel, out);                                                                                       \
  }
TILE(12, 1) TILE(4, 1) TILE(1, 1) TILE(6, 2) TILE(2, 2) TILE(1, 2)
#undef TILE

// out[n][lane] for `count` (at most 12) weight rows and a panel of W (8 or 16) lanes.
static void tile_rows(const float *w, int64_t count, int W, int64_t K, const float *panel, float *out) {
#define TILES_OF(NB, NV) \
  for (; n + NB <= count; n += NB) tile_##NB##_##NV(w + n * K, K, panel, out + n * W);
  int64_t n = 0;
  if (W == 8) {
    TILES_OF(12, 1) TILES_OF(4, 1) TILES_OF(1, 1)
  } else {
    TILES_OF(6, 2) TILES_OF(2, 2) TILES_OF(1, 2)
  }
#undef TILES_OF
}

// Panels have 16 tokens, the last 8 if that is enough.
#define PANEL_WIDTH(M, p) ((M) - 16 * (p) > 8 ? 16 : 8)
