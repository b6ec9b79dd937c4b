// The linear product in tiles, written once for both element types (see ops.h and tiles.h).

// x as panels of floats; tokens beyond M are zero. One thread's share of the columns.
static void NAME(pack)(void *to_panels, const T *x, int64_t x_stride, int64_t M, int64_t K, int tid, int nt) {
  float *panels = (float *)to_panels;
  int64_t k0 = K * tid / nt, k1 = K * (tid + 1) / nt;
  for (int64_t m = 0; m < (M + 7) / 8 * 8; m++) {
    int64_t p = m / 16, W = PANEL_WIDTH(M, p);
    float *to = panels + 16 * p * K + m % 16;
    for (int64_t k = k0; k < k1; k++) to[k * W] = m < M ? TO_FLOAT(x[m * x_stride + k]) : 0.0f;
  }
}

// `count` whole weight rows as floats: as they lie, or in `room`.
static tile_weights NAME(float_rows)(const T *w, int64_t count, int64_t K, float *room) {
  if (sizeof(T) == sizeof(float)) return (tile_weights){(const float *)w, K, 0};
  tile_weights weights = {room, ROOM_STRIDE(K), 0};
  for (int64_t n = 0; n < count; n++, w += K, room += ROOM_STRIDE(K)) {
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) store8_f32(room + k, NAME(load8)(w + k));
    for (; k < K; k++) room[k] = TO_FLOAT(w[k]);
  }
  return weights;
}

// What a thread needs for `tiles`.
static void *NAME(room)(int64_t K) {
  void *room = aligned_alloc(64, (size_t)(12 * ROOM_STRIDE(K)) * sizeof(float));
  if (!room) abort();
  return room;
}

// y[all tokens, lo..hi) = x . w[lo..hi)^T + bias. Panels are taken in groups that the second-level cache holds; twelve weight rows
// are used for all panels of a group while the cache holds them. hi - lo: at most TILE_COLUMNS.
static void NAME(tiles)(void *y, int64_t y_stride, int wide, const void *of_panels, const T *w, const T *bias, int64_t M, int64_t K, int64_t lo,
                        int64_t hi, void *in_room) {
  const float *panels = (const float *)of_panels;
  float *room = (float *)in_room;
  int64_t count = (M + 15) / 16, group = MAX(4, GROUP_BYTES / (64 * K));
  float out[TILE_COLUMNS * 8] __attribute__((aligned(32)));
  if (sizeof(T) == sizeof(bf16) && M <= 8 && K % 2 == 0) {
    pairs_of_rows((const bf16 *)(w + lo * K), hi - lo, K, panels, out);
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = lo; n < hi; n++)
        NAME(out_put)(NAME(out_at)(y, m * y_stride + n, wide), out[(n - lo) * 8 + m] + (bias ? TO_FLOAT(bias[n]) : 0.0f), wide);
    return;
  }
  for (int64_t first = 0; first < count; first += group)
    for (int64_t n = lo; n < hi; n += 12) {
      int64_t rows = MIN(12, hi - n);
      tile_weights weights = NAME(float_rows)(w + n * K, rows, K, room);
      if (sizeof(T) == sizeof(bf16) && n + 24 <= hi) weights.next = (const bf16 *)(w + (n + 12) * K);
      for (int64_t p = first; p < MIN(count, first + group); p++) {
        int W = PANEL_WIDTH(M, p);
        tile_rows(&weights, rows, W, K, panels + 16 * p * K, out);
        weights.next = 0;
        for (int64_t m = 16 * p; m < MIN(M, 16 * p + 16); m++)
          for (int64_t j = 0; j < rows; j++)
            NAME(out_put)(NAME(out_at)(y, m * y_stride + n + j, wide), out[j * W + m % 16] + (bias ? TO_FLOAT(bias[n + j]) : 0.0f), wide);
      }
    }
}
