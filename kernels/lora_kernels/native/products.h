// Products with an adapter's matrices, written once for each type that they are stored in. The includer defines W (the stored type),
// WNAME(x) (symbol suffix), what a load of W gives: W_DOT_LOAD as DOT takes it, W_LOAD16 as 16 floats, W_TO_FLOAT as one; and W_ODD,
// whether two and three rows of W have code of their own (it takes the compiler seconds). All are undefined at the end.

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
      for (int n = 0; n < NB; n++) sums[n] += TO_FLOAT(x[m][j]) * W_TO_FLOAT(w[n * w_stride + j]);
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

// h[row, rank] = A . x for ranks [r0, r1) of one adapter and `count` gathered rows.
static void WNAME(shrink)(float *h, int64_t h_stride, const T *x, int64_t x_stride, const int32_t *rows, int64_t count,
                         const W *a, int64_t K, int64_t r0, int64_t r1) {
  const T *block[6];
  for (int64_t m0 = 0; m0 < count; m0 += 6) {
    int mb = (int)MIN(count - m0, 6);
    for (int m = 0; m < mb; m++) block[m] = x + (int64_t)rows[m0 + m] * x_stride;
    for (int64_t r = r0, nb; r < r1; r += nb) {
      nb = r1 - r >= 4 ? 4 : W_ODD ? r1 - r : 1;
      WNAME(dot_tile)(mb, (int)nb, block, a + r * K, K, K, h + m0 * h_stride + r, h_stride);
    }
  }
}

// acc[m][v] = sum over r of h[m][r] * B[r, column + 16 v]; then y += scale * acc. With factors (else null), y holds the
// bias already: y = factor * (y - bias + scale * acc) + bias.
static inline __attribute__((always_inline)) void WNAME(expand_block)(
    const int MB, const int NV, T *const *y, const float *h, int64_t h_stride, const W *b, int64_t O, int64_t rank, float scale,
    const float *factors, const T *bias) {
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
      float weight = h[m * h_stride + r];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] += weight * col[v];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      v16 sum = LOAD16(y[m] + 16 * v) + scale * acc[m][v];
      if (factors) {
        v16 own = bias ? LOAD16(bias + 16 * v) : splat(0.0f);
        sum = load_f32(factors + 16 * v) * (sum - own) + own;
      }
      STORE16(y[m] + 16 * v, sum);
    }
}

// y[rows, lo..hi) += scale * (h . B) for one adapter; B is [rank, O]. factors, bias: null, or [O] (see expand_block).
static void WNAME(expand)(T *y, int64_t y_stride, const int32_t *rows, int64_t count, const float *h, int64_t h_stride,
                         const W *b, int64_t O, int64_t rank, float scale, const float *factors, const T *bias, int64_t lo,
                         int64_t hi) {
#define AT(p) ((p) ? (p) + c : 0)
  T *out[4];
  for (int64_t m0 = 0; m0 < count; m0 += 4) {
    int mb = (int)MIN(count - m0, 4);
    const float *hm = h + m0 * h_stride;
    int64_t c = lo;
    if (mb == 1) {
      T *row = y + (int64_t)rows[m0] * y_stride;
      for (; c + 128 <= hi; c += 128) {
        out[0] = row + c;
        WNAME(expand_block)(1, 8, out, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias));
      }
    }
    for (; c + 64 <= hi; c += 64) {
      for (int m = 0; m < mb; m++) out[m] = y + (int64_t)rows[m0 + m] * y_stride + c;
      switch (mb) {
        case 1: WNAME(expand_block)(1, 4, out, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
        case 2: WNAME(expand_block)(2, 4, out, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
        case 3: WNAME(expand_block)(3, 4, out, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
        default: WNAME(expand_block)(4, 4, out, hm, h_stride, b + c, O, rank, scale, AT(factors), AT(bias)); break;
      }
    }
    for (; c < hi; c++)
      for (int m = 0; m < mb; m++) {
        float sum = 0.0f;
        for (int64_t r = 0; r < rank; r++) sum += hm[m * h_stride + r] * W_TO_FLOAT(b[r * O + c]);
        T *p = y + (int64_t)rows[m0 + m] * y_stride + c;
        sum = TO_FLOAT(*p) + scale * sum;
        if (factors) {
          float own = bias ? TO_FLOAT(bias[c]) : 0.0f;
          sum = factors[c] * (sum - own) + own;
        }
        *p = FROM_FLOAT(sum);
      }
  }
#undef AT
}

#undef W
#undef WNAME
#undef W_DOT_LOAD
#undef W_LOAD16
#undef W_TO_FLOAT
#undef W_ODD
