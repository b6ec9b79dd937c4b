// Products with an adapter's matrices, written once for each type that they are stored in. The includer defines W (the stored type),
// WNAME(x) (symbol suffix), what a load of W gives: W_DOT_LOAD as DOT takes it, W_LOAD16 and W_LOAD8 as 16 and 8 floats, W_TO_FLOAT as one; and W_ODD,
// whether two and three rows of W have code of their own (it takes the compiler seconds). All are undefined at the end.

#if defined(TILES)
// sum over k of x[m][k] * w[n][k] for a register block of MB rows of x and NB rows of w, in two halves of eight lanes each: the compiler
// keeps blocks of sixteen lanes in memory where registers have eight.
static inline __attribute__((always_inline)) void WNAME(dot_halves)(const int MB, const int NB, const T *const *x, const W *w,
                                                                    int64_t w_stride, int64_t K, float *out, int64_t out_stride) {
  v8 acc[2][4][2];
#pragma GCC unroll 2
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NB; n++) acc[m][n][0] = acc[m][n][1] = (v8){0};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      v8 a[2];
#pragma GCC unroll 2
      for (int m = 0; m < MB; m++) a[m] = NAME(load8)(x[m] + k + 8 * half);
#pragma GCC unroll 4
      for (int n = 0; n < NB; n++) {
        v8 b = W_LOAD8(w + n * w_stride + k + 8 * half);
#pragma GCC unroll 2
        for (int m = 0; m < MB; m++) acc[m][n][half] = fma8(a[m], b, acc[m][n][half]);
      }
    }
#pragma GCC unroll 2
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NB; n++) {
      v4 quarter[2];
      v8 half = acc[m][n][0] + acc[m][n][1];
      memcpy(quarter, &half, sizeof quarter);
      v4 q = quarter[0] + quarter[1];
      float sum = (q[0] + q[1]) + (q[2] + q[3]);
      for (int64_t j = k; j < K; j++) sum = fma1(TO_FLOAT(x[m][j]), W_TO_FLOAT(w[n * w_stride + j]), sum);
      out[m * out_stride + n] = sum;
    }
}

#define HALVES(MB, NB)                                                                                                           \
  static __attribute__((noinline)) void WNAME(dot_##MB##_##NB)(const T *const *x, const W *w, int64_t w_stride, int64_t K,         \
                                                               float *out, int64_t out_stride) {                                  \
    WNAME(dot_halves)(MB, NB, x, w, w_stride, K, out, out_stride);                                                                \
  }
HALVES(1, 4) HALVES(1, 1) HALVES(2, 2) HALVES(2, 1)
#undef HALVES

static void WNAME(dot_tile)(int mb, int nb, const T *const *x, const W *w, int64_t w_stride, int64_t K, float *out, int64_t out_stride) {
#define DOTS(MB, NB) \
  for (; n + NB <= nb; n += NB) WNAME(dot_##MB##_##NB)(x + m, w + n * w_stride, w_stride, K, out + m * out_stride + n, out_stride);
  for (int m = 0; m < mb; m += 2) {
    int n = 0;
    if (mb - m > 1) {
      DOTS(2, 2) DOTS(2, 1)
    } else {
      DOTS(1, 4) DOTS(1, 1)
    }
  }
#undef DOTS
}
#else
// sum over k of x[m][k] * w[n][k] for a register block of MB rows of x and NB rows of w.
static inline __attribute__((always_inline)) void WNAME(dot_block)(
    const int MB, const int NB, const T *const *x, const W *w, int64_t w_stride, int64_t K, float *out, int64_t out_stride) {
  v16 acc[6][4];
#pragma GCC unroll 6
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NB; n++) acc[m][n] = (v16){0};
  int64_t k = 0;
  for (; k + DOT_STEP <= K; k += DOT_STEP) {
    DOT_VEC b[4];
#pragma GCC unroll 4
    for (int n = 0; n < NB; n++) b[n] = W_DOT_LOAD(w + n * w_stride + k);
#pragma GCC unroll 6
    for (int m = 0; m < MB; m++) {
      DOT_VEC a = DOT_LOAD(x[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < NB; n++) acc[m][n] = DOT(acc[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MB; m++) {
    v4 sums = hsum4(acc[m][0], acc[m][NB > 1 ? 1 : 0], acc[m][NB > 2 ? 2 : 0], acc[m][NB > 3 ? 3 : 0]);
    for (int64_t j = k; j < K; j++)
#pragma GCC unroll 4
      for (int n = 0; n < NB; n++) sums[n] = fma1(TO_FLOAT(x[m][j]), W_TO_FLOAT(w[n * w_stride + j]), sums[n]);
    memcpy(out + m * out_stride, &sums, NB * sizeof(float));
  }
}

#define DOT_CASE(MB)                                                                             \
  case MB:                                                                                       \
    if (nb == 4) WNAME(dot_block)(MB, 4, x, w, w_stride, K, out, out_stride);                    \
    else if (nb == 3 && W_ODD) WNAME(dot_block)(MB, 3, x, w, w_stride, K, out, out_stride);      \
    else if (nb == 2 && W_ODD) WNAME(dot_block)(MB, 2, x, w, w_stride, K, out, out_stride);      \
    else WNAME(dot_block)(MB, 1, x, w, w_stride, K, out, out_stride);                            \
    break;

// Any mb in 1..6; nb is 4, 1 or, with W_ODD, between.
static __attribute__((noinline)) void WNAME(dot_tile)(int mb, int nb, const T *const *x, const W *w, int64_t w_stride, int64_t K, float *out,
                           int64_t out_stride) {
  switch (mb) { DOT_CASE(1) DOT_CASE(2) DOT_CASE(3) DOT_CASE(4) DOT_CASE(5) DOT_CASE(6) }
}
#undef DOT_CASE
#endif

// h[row, rank] = A . x for ranks [r0, r1) of one adapter and `count` gathered rows.
static void WNAME(shrink)(float *h, int64_t h_stride, const T *x, int64_t x_stride, const int32_t *rows, int64_t count,
                         const W *a, int64_t K, int64_t r0, int64_t r1, fetched *ahead) {
  const T *block[6];
  for (int64_t m0 = 0; m0 < count; m0 += 6) {
    int mb = (int)MIN(count - m0, 6);
    for (int m = 0; m < mb; m++) block[m] = x + (int64_t)rows[m0 + m] * x_stride;
    for (int64_t r = r0, nb; r < r1; r += nb) {
      nb = r1 - r >= 4 ? 4 : W_ODD ? r1 - r : 1;
      if (m0 == 0) fetch_more(ahead, nb * K * (int64_t)sizeof(W));
      WNAME(dot_tile)(mb, (int)nb, block, a + r * K, K, K, h + m0 * h_stride + r, h_stride);
    }
  }
}

// As expand, one column at a time: those that fill no block.
static void WNAME(expand_rest)(void *y, int64_t y_stride, int wide, const int32_t *rows, int64_t count, const float *h, int64_t h_stride, const W *b,
                               int64_t O, int64_t rank, float scale, const float *factors, const T *bias, int64_t lo, int64_t hi) {
  for (int64_t m = 0; m < count; m++)
    for (int64_t c = lo; c < hi; c++) {
      float sum = 0.0f;
      for (int64_t r = 0; r < rank; r++) sum = fma1(h[m * h_stride + r], W_TO_FLOAT(b[r * O + c]), sum);
      void *p = NAME(out_at)(y, (int64_t)rows[m] * y_stride + c, wide);
      sum = fma1(scale, sum, NAME(out_get)(p, wide));
      if (factors) {
        float own = bias ? TO_FLOAT(bias[c]) : 0.0f;
        sum = fma1(factors[c], sum - own, own);
      }
      NAME(out_put)(p, sum, wide);
    }
}

// y += scale * (h . B) for MB rows and 8 * NV columns of one adapter; B: as it lies, or `ready`, [rank][64] floats. With factors (else
// null), y holds the bias already: y = factor * (y - bias + scale * (h . B)) + bias.
#if defined(TILES)
static inline __attribute__((always_inline)) void WNAME(expand_lanes)(
    const int MB, const int NV, const int READY, void *const *y, int wide, const float *h, int64_t h_stride, const W *b, const float *ready, int64_t O,
    int64_t rank, float scale, const float *factors, const T *bias) {
  v8 acc[4][8];
#pragma GCC unroll 4
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = (v8){0};
  for (int64_t r = 0; r < rank; r++) {
    v8 weight[4];
#pragma GCC unroll 4
    for (int m = 0; m < MB; m++) weight[m] = (v8)_mm256_broadcast_ss(h + m * h_stride + r);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      v8 col;
      if (READY) memcpy(&col, ready + 64 * r + 8 * v, sizeof col);
      else col = W_LOAD8(b + r * O + 8 * v);
#pragma GCC unroll 4
      for (int m = 0; m < MB; m++) acc[m][v] = fma8(weight[m], col, acc[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      void *p = NAME(out_at)(y[m], 8 * v, wide);
      v8 sum = fma8((v8)_mm256_set1_ps(scale), acc[m][v], NAME(out_get8)(p, wide));
      if (factors) {
        v8 own = bias ? NAME(load8)(bias + 8 * v) : (v8){0}, factor;
        memcpy(&factor, factors + 8 * v, sizeof factor);
        sum = fma8(factor, sum - own, own);
      }
      NAME(out_put8)(p, sum, wide);
    }
}

#define LANES(MB, NV, READY)                                                                                                    \
  static __attribute__((noinline)) void WNAME(expand_##MB##_##NV##_##READY)(                                                    \
      void *const *y, int wide, const float *h, int64_t h_stride, const W *b, const float *ready, int64_t O, int64_t rank,      \
      float scale, const float *factors, const T *bias) {                                                                                    \
    WNAME(expand_lanes)(MB, NV, READY, y, wide, h, h_stride, b, ready, O, rank, scale, factors, bias);                                \
  }
LANES(1, 8, 0) LANES(1, 2, 0) LANES(2, 2, 0) LANES(4, 2, 1) LANES(1, 2, 1)
#undef LANES

// y[rows, lo..hi) += scale * (h . B) for one adapter; B is [rank, O]. factors, bias: null, or [O]. From eight rows on, up to
// rank 256, B's columns are converted to floats once for all of them.
static void WNAME(expand)(void *y, int64_t y_stride, int wide, const int32_t *rows, int64_t count, const float *h, int64_t h_stride,
                         const W *b, int64_t O, int64_t rank, float scale, const float *factors, const T *bias, int64_t lo,
                         int64_t hi, fetched *ahead) {
#define AT(p) ((p) ? (p) + c : 0)
#define EXPAND(MB, NV, READY)                                                                                       \
  do {                                                                                                              \
    for (int m = 0; m < MB; m++) out[m] = NAME(out_at)(y, (int64_t)rows[m0 + m] * y_stride + c, wide);               \
    WNAME(expand_##MB##_##NV##_##READY)(out, wide, h + m0 * h_stride, h_stride, b + c, columns + (c - first), O, rank,    \
                                        scale, AT(factors), AT(bias));                                              \
  } while (0)
  float columns[64 * 256] __attribute__((aligned(32)));
  void *out[4];
  int64_t end = lo + (hi - lo) / 16 * 16;
  int is_ready = count >= 8 && rank <= 256;
  for (int64_t first = lo; first < end; first += 64) {
    int64_t last = MIN(end, first + 64), m0 = 0, c;
    fetch_more(ahead, rank * 64 * (int64_t)sizeof(W));
    if (is_ready)
      for (int64_t r = 0; r < rank; r++)
        for (c = first; c < last; c += 8) {
          v8 col = W_LOAD8(b + r * O + c);
          memcpy(columns + 64 * r + (c - first), &col, sizeof col);
        }
    if (is_ready)
      for (; m0 + 4 <= count; m0 += 4)
        for (c = first; c < last; c += 16) EXPAND(4, 2, 1);
    else
      for (; m0 + 2 <= count; m0 += 2)
        for (c = first; c < last; c += 16) EXPAND(2, 2, 0);
    for (; m0 < count; m0++) {
      c = first;
      if (last - first == 64 && !is_ready) {
        EXPAND(1, 8, 0);
        continue;
      }
      for (; c < last; c += 16)
        if (is_ready) EXPAND(1, 2, 1);
        else EXPAND(1, 2, 0);
    }
  }
#undef EXPAND
#undef AT
  WNAME(expand_rest)(y, y_stride, wide, rows, count, h, h_stride, b, O, rank, scale, factors, bias, end, hi);
}
#else
// acc[m][v] = sum over r of h[m][r] * B[r, column + 16 v]; then y += scale * acc. With factors (else null), y holds the
// bias already: y = factor * (y - bias + scale * acc) + bias.
static inline __attribute__((always_inline)) void WNAME(expand_block)(
    const int MB, const int NV, void *const *y, int wide, const float *h, int64_t h_stride, const W *b, int64_t O, int64_t rank,
    float scale, const float *factors, const T *bias) {
  v16 acc[4][8];
#pragma GCC unroll 4
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = (v16){0};
  for (int64_t r = 0; r < rank; r++) {
    v16 col[8];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) col[v] = W_LOAD16(b + r * O + 16 * v);
#pragma GCC unroll 4
    for (int m = 0; m < MB; m++) {
      v16 weight = splat(h[m * h_stride + r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] = fma16(weight, col[v], acc[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      void *p = NAME(out_at)(y[m], 16 * v, wide);
      v16 sum = fma16(splat(scale), acc[m][v], NAME(out_get16)(p, wide));
      if (factors) {
        v16 own = bias ? LOAD16(bias + 16 * v) : splat(0.0f);
        sum = fma16(load_f32(factors + 16 * v), sum - own, own);
      }
      NAME(out_put16)(p, sum, wide);
    }
}

// y[rows, lo..hi) += scale * (h . B) for one adapter; B is [rank, O]. factors, bias: null, or [O] (see expand_block).
static void WNAME(expand)(void *y, int64_t y_stride, int wide, const int32_t *rows, int64_t count, const float *h, int64_t h_stride,
                         const W *b, int64_t O, int64_t rank, float scale, const float *factors, const T *bias, int64_t lo,
                         int64_t hi, fetched *ahead) {
#define AT(p) ((p) ? (p) + c : 0)
  void *out[4];
  int64_t end = lo + (hi - lo) / 64 * 64;
  for (int64_t m0 = 0; m0 < count; m0 += 4) {
    int mb = (int)MIN(count - m0, 4);
    const float *hm = h + m0 * h_stride;
    int64_t c = lo;
    if (mb == 1) {
      for (; c + 128 <= hi; c += 128) {
        out[0] = NAME(out_at)(y, (int64_t)rows[m0] * y_stride + c, wide);
        if (m0 == 0) fetch_more(ahead, rank * 128 * (int64_t)sizeof(W));
        WNAME(expand_block)(1, 8, out, wide, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias));
      }
    }
    for (; c + 64 <= hi; c += 64) {
      for (int m = 0; m < mb; m++) out[m] = NAME(out_at)(y, (int64_t)rows[m0 + m] * y_stride + c, wide);
      if (m0 == 0) fetch_more(ahead, rank * 64 * (int64_t)sizeof(W));
      switch (mb) {
        case 1: WNAME(expand_block)(1, 4, out, wide, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
        case 2: WNAME(expand_block)(2, 4, out, wide, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
        case 3: WNAME(expand_block)(3, 4, out, wide, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
        default: WNAME(expand_block)(4, 4, out, wide, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
      }
    }
  }
#undef AT
  WNAME(expand_rest)(y, y_stride, wide, rows, count, h, h_stride, b, O, rank, scale, factors, bias, end, hi);
}
#endif

#undef W
#undef WNAME
#undef W_DOT_LOAD
#undef W_LOAD16
#undef W_LOAD8
#undef W_TO_FLOAT
#undef W_ODD
