// The CPU operations, written once for both element types. The includer defines T (element), NAME(x) (symbol suffix), LOAD16/STORE16 (16
// elements <-> 16 floats), ROUND16 (what a store and a load leave), DOT_STEP elements per DOT, DOT_LOAD_INT8 of stored bytes (see kernels.c),
// and with TILES NAME(load8) and NAME(store8), as LOAD16 and STORE16 for eight. Where there are tiles for T: PANEL_BYTES(M, K), what x as
// panels takes, 0 where it is multiplied as it lies, and NAME(pack), NAME(room) and NAME(tiles). FEW_ROWS(M, K): whether few_rows multiplies
// it. PROMPT_ATTENTION: the attention of prompts. Legend: T tokens, H in, O out.

#define W T
#define WNAME NAME
#define W_DOT_LOAD DOT_LOAD
#define W_LOAD16 LOAD16
#define W_LOAD8 NAME(load8)
#define W_TO_FLOAT TO_FLOAT
#define W_ODD 1
#include "products.h"
#define W int8_t
#define WNAME(x) NAME(x##_int8)
#define W_DOT_LOAD DOT_LOAD_INT8
#define W_LOAD16 load_int8
#define W_LOAD8 load8_int8
#define W_TO_FLOAT(v) ((float)(v))
#define W_ODD 0
#include "products.h"

// y[T, O] = x[T, H] . w[O, H]^T + bias, for output columns [lo, hi).
static void NAME(linear_columns)(void *y, int64_t y_stride, int wide, const T *x, int64_t x_stride, const T *w, const T *bias, int64_t M,
                                 int64_t K, int64_t lo, int64_t hi) {
#if defined(FEW_ROWS)
  if (FEW_ROWS(M, K)) return few_rows(y, y_stride, wide, x, x_stride, w, bias, M, K / 2, lo, hi);
#endif
  const T *rows[6];
  float out[6 * 4];
  int64_t blocks = (M + 5) / 6;
  for (int64_t n = lo; n < hi; n += 4) {
    int nb = (int)MIN(hi - n, 4);
    const char *next = (const char *)(w + (n + 4) * K);  // the next four weight rows come while these are used
    int64_t lines = n + 8 <= hi ? 4 * K * (int64_t)sizeof(T) / 64 : 0;
    for (int64_t b = 0; b < blocks; b++) {
      for (int64_t line = lines * b / blocks; line < lines * (b + 1) / blocks; line++) __builtin_prefetch(next + 64 * line, 0, 2);
      int64_t m0 = M * b / blocks, m1 = M * (b + 1) / blocks;
      for (int64_t m = m0; m < m1; m++) rows[m - m0] = x + m * x_stride;
      NAME(dot_tile)((int)(m1 - m0), nb, rows, w + n * K, K, K, out, 4);
      for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < nb; j++) {
          float sum = out[(m - m0) * 4 + j] + (bias ? TO_FLOAT(bias[n + j]) : 0.0f);
          NAME(out_put)(NAME(out_at)(y, m * y_stride + n + j, wide), sum, wide);
        }
    }
  }
}

// One thread's share of the shrink of a whole group: tasks are (segment, member, four ranks).
static void NAME(shrink_share)(const lora_batch *b, const lora_group *g, const T *x, int64_t x_stride, int tid, int nt) {
  int64_t total = 0, task = 0, K = g->in_features;
  for (int64_t s = 0; s < b->num_segments; s++)
    for (int64_t j = 0; j < g->num_members; j++) total += (RANK(b, g, s, j) + 3) / 4;
  int64_t first = total * tid / nt, last = total * (tid + 1) / nt;
  fetched ahead = {b, g, sizeof(T), 0, 0, 0};
  for (int64_t s = 0; s < b->num_segments && task < last; s++)
    for (int64_t j = 0; j < g->num_members; j++) {
      int64_t rank = RANK(b, g, s, j), blocks = (rank + 3) / 4;
      int64_t from = MAX(first - task, 0), to = MIN(last - task, blocks);
      if (ahead.next <= s * g->num_members + j) ahead.next = s * g->num_members + j + 1, ahead.at = 0;
      if (from < to && IS_INT8(b, s)) {
        NAME(shrink_int8)(H_AT(b, g, s, j), H_STRIDE(b, g), x, x_stride, ROWS(b, s), INT8(A_AT(b, g, s, j)), K, from * 4,
                          MIN(to * 4, rank), &ahead);
        scale_ranks(H_AT(b, g, s, j), H_STRIDE(b, g), NUM_ROWS(b, s), RANK_SCALES(A_AT(b, g, s, j), rank), from * 4, MIN(to * 4, rank));
      } else if (from < to)
        NAME(shrink)(H_AT(b, g, s, j), H_STRIDE(b, g), x, x_stride, ROWS(b, s), A_AT(b, g, s, j), K, from * 4,
                     MIN(to * 4, rank), &ahead);
      task += blocks;
    }
}

// One thread's share of the expand: tasks are (segment, member, 64 output columns).
static void NAME(expand_share)(const lora_batch *b, const lora_group *g, void *to, int64_t y_stride, int wide, const T *bias, int tid, int nt) {
  int64_t total = 0, task = 0;
  for (int64_t s = 0; s < b->num_segments; s++)
    for (int64_t j = 0; j < g->num_members; j++)
      if (RANK(b, g, s, j)) total += (g->out[j] + 63) / 64;
  int64_t first = total * tid / nt, last = total * (tid + 1) / nt;
  fetched ahead = {b, g, sizeof(T), 1, 0, 0};
  for (int64_t s = 0; s < b->num_segments && task < last; s++)
    for (int64_t j = 0; j < g->num_members; j++) {
      if (!RANK(b, g, s, j)) continue;
      int64_t O = g->out[j], tiles = (O + 63) / 64;
      void *y = NAME(out_at)(to, g->start[j], wide);
      int64_t from = MAX(first - task, 0), to = MIN(last - task, tiles);
      if (ahead.next <= s * g->num_members + j) ahead.next = s * g->num_members + j + 1, ahead.at = 0;
      if (from < to && IS_INT8(b, s))
        NAME(expand_int8)(y, y_stride, wide, ROWS(b, s), H_AT(b, g, s, j), H_STRIDE(b, g), INT8(B_AT(b, g, s, j)), O,
                          RANK(b, g, s, j), SCALE(b, g, s, j), F_AT(b, g, s, j), bias ? bias + g->start[j] : 0, from * 64,
                          MIN(to * 64, O), &ahead);
      else if (from < to)
        NAME(expand)(y, y_stride, wide, ROWS(b, s), H_AT(b, g, s, j), H_STRIDE(b, g), B_AT(b, g, s, j), O,
                     RANK(b, g, s, j), SCALE(b, g, s, j), F_AT(b, g, s, j), bias ? bias + g->start[j] : 0, from * 64, MIN(to * 64, O), &ahead);
      task += tiles;
    }
}

// y += the adapters' deltas on their rows. bias: what y holds of it, or null; factors multiply all but it.
void NAME(ml_lora_delta)(const lora_batch *b, const lora_group *g, void *y, int64_t y_stride, const T *x, int64_t x_stride,
                         const T *bias, int64_t wide) {
#pragma omp parallel
  {
    int tid = omp_get_thread_num(), nt = omp_get_num_threads();
    NAME(shrink_share)(b, g, x, x_stride, tid, nt);
#pragma omp barrier
    NAME(expand_share)(b, g, y, y_stride, (int)wide, bias, tid, nt);
  }
}

// The base product of a whole group and its adapters' deltas in one parallel region; b is null in a base-only batch. Threads
// take a few columns at a time as they are free: one that lost its core to another program delays little. The barrier between shrink and
// expand is the product's as well.
void NAME(ml_linear)(const lora_batch *b, const lora_group *g, void *y, int64_t y_stride, const T *x, int64_t x_stride,
                     const T *w, const T *bias, int64_t M, int64_t N, int64_t wide) {
  int64_t K = g->in_features;
  void *panels = 0;
#if defined(PANEL_BYTES)
  if (PANEL_BYTES(M, K)) panels = aligned_alloc(64, (size_t)PANEL_BYTES(M, K));
#endif
#pragma omp parallel
  {
    int tid = omp_get_thread_num(), nt = omp_get_num_threads();
    if (panels) {
#if defined(PANEL_BYTES)
      NAME(pack)(panels, x, x_stride, M, K, tid, nt);
      void *room = NAME(room)(K);
#pragma omp barrier
#pragma omp for schedule(dynamic) nowait
      for (int64_t n = 0; n < N; n += TILE_COLUMNS) NAME(tiles)(y, y_stride, (int)wide, panels, w, bias, M, K, n, MIN(N, n + TILE_COLUMNS), room);
      free(room);
#endif
    } else {
      int64_t part = (N + 64 * nt - 1) / (64 * nt) * 16;  // four a thread: the first rows of a part were not fetched ahead
#pragma omp for schedule(dynamic) nowait
      for (int64_t n = 0; n < N; n += part) NAME(linear_columns)(y, y_stride, (int)wide, x, x_stride, w, bias, M, K, n, MIN(N, n + part));
    }
    if (b) {
      NAME(shrink_share)(b, g, x, x_stride, tid, nt);
#pragma omp barrier
      NAME(expand_share)(b, g, y, y_stride, (int)wide, bias, tid, nt);
    }
  }
  free(panels);
}

#if defined(REPACKED)
// The same for repacked weights; N: a multiple of 16.
void NAME(ml_repacked_linear)(const lora_batch *b, const lora_group *g, void *y, int64_t y_stride, const T *x, int64_t x_stride,
                            const T *w, const T *bias, int64_t M, int64_t N, int64_t wide) {
  int64_t K = g->in_features;
  void *panels = REPACKED_PANEL_BYTES(M, K) ? aligned_alloc(64, (size_t)REPACKED_PANEL_BYTES(M, K)) : 0;
  if (REPACKED_PANEL_BYTES(M, K) && !panels) abort();
#pragma omp parallel
  {
    int tid = omp_get_thread_num(), nt = omp_get_num_threads();
    if (panels) {
      amx_pack(panels, x, x_stride, M, K, tid, nt);
#pragma omp barrier
    }
    int64_t part = (N + 128 * nt - 1) / (128 * nt) * 32;  // four a thread
#pragma omp for schedule(dynamic) nowait
    for (int64_t n = 0; n < N; n += part) repacked_part(y, y_stride, (int)wide, x, x_stride, panels, w, bias, M, K / 2, n, MIN(N, n + part));
    if (b) {
      NAME(shrink_share)(b, g, x, x_stride, tid, nt);
#pragma omp barrier
      NAME(expand_share)(b, g, y, y_stride, (int)wide, bias, tid, nt);
    }
  }
  free(panels);
}
#else
void NAME(ml_repacked_linear)(const lora_batch *b, const lora_group *g, void *y, int64_t y_stride, const T *x, int64_t x_stride,
                            const T *w, const T *bias, int64_t M, int64_t N, int64_t wide) { abort(); }
#endif

// y[row] = x[row] . w[e]^T and the adapters' deltas, for the rows starts[e]..starts[e + 1] of each expert e, in the order of ml_linear. w:
// [experts, N, K], or repacked, N then a multiple of 32; b: null, or of a group of one module. A thread takes half of an expert's columns
// at a time.
void NAME(ml_experts)(const lora_batch *b, const lora_group *g, T *y, const T *x, const T *w, const int64_t *starts, int64_t experts,
                      int64_t N, int64_t is_repacked) {
  int64_t K = g->in_features, part = (N + 2 * TILE_COLUMNS - 1) / (2 * TILE_COLUMNS) * TILE_COLUMNS, parts = (N + part - 1) / part;
  char *panels = 0;
#if defined(PANEL_BYTES)
  int64_t panel_at[experts + 1];
  panel_at[0] = 0;
  for (int64_t e = 0; e < experts; e++) {
    int64_t M = starts[e + 1] - starts[e], bytes = PANEL_BYTES(M, K);
#if defined(REPACKED)
    if (is_repacked) bytes = REPACKED_PANEL_BYTES(M, K);
#endif
    panel_at[e + 1] = panel_at[e] + bytes;
  }
  if (panel_at[experts] && !(panels = (char *)aligned_alloc(64, (size_t)panel_at[experts]))) abort();
#endif
#pragma omp parallel
  {
    int tid = omp_get_thread_num(), nt = omp_get_num_threads();
#if defined(PANEL_BYTES)
    void *room = panels ? NAME(room)(K) : 0;
    for (int64_t e = 0; e < experts; e++)
      if (panel_at[e + 1] > panel_at[e]) {
        int64_t M = starts[e + 1] - starts[e];
#if defined(REPACKED)
        if (is_repacked) {
          amx_pack(panels + panel_at[e], x + starts[e] * K, K, M, K, tid, nt);
          continue;
        }
#endif
        NAME(pack)(panels + panel_at[e], x + starts[e] * K, K, M, K, tid, nt);
      }
#pragma omp barrier
#endif
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < experts * parts; task++) {
      int64_t e = task / parts, lo = task % parts * part, hi = MIN(N, lo + part), M = starts[e + 1] - starts[e];
      const T *rows = x + starts[e] * K, *own = w + e * N * K;
      T *to = y + starts[e] * N;
#if defined(REPACKED)
      if (is_repacked) {
        repacked_part(to, N, 0, rows, K, panel_at[e + 1] > panel_at[e] ? panels + panel_at[e] : 0, own, 0, M, K / 2, lo, hi);
        continue;
      }
#endif
#if defined(PANEL_BYTES)
      if (panel_at[e + 1] > panel_at[e]) {
        for (int64_t n = lo; n < hi; n += TILE_COLUMNS)
          NAME(tiles)(to, N, 0, panels + panel_at[e], own, 0, M, K, n, MIN(hi, n + TILE_COLUMNS), room);
        continue;
      }
#endif
      if (M) NAME(linear_columns)(to, N, 0, rows, K, own, 0, M, K, lo, hi);
    }
#if defined(PANEL_BYTES)
    free(room);
#endif
    if (b) {
      NAME(shrink_share)(b, g, x, K, tid, nt);
#pragma omp barrier
      NAME(expand_share)(b, g, y, N, 0, 0, tid, nt);
    }
  }
  free(panels);
}

// `count` weight rows from row n on, whole, as T. scales: room for the absmaxes of one row.
static void NAME(nf4_rows)(T *to, float *scales, const nf4_weight *w, int64_t n, int count) {
  int64_t K = w->in_features, blocks = K / 64;
  for (int i = 0; i < count; i++, n++) {
    const uint8_t *packed = w->packed + n * K / 2;
    nf4_scales(scales, w, n * blocks, blocks);
    for (int64_t b = 0; b < blocks; b++, to += 64, packed += 32) NAME(nf4_values)(to, packed, w->code, scales[b]);
  }
}

// y[T, sum of O] = x[T, H] . w[O, H]^T + bias of weights that read the same x, side by side. A few rows of a weight are
// unpacked at a time, where the cache holds them.
void NAME(ml_nf4_linear)(T *y, int64_t y_stride, const T *x, int64_t x_stride, const nf4_weight *const *weights,
                         const T *const *biases, int64_t num_weights, int64_t M) {
  int64_t K = weights[0]->in_features, total = 0, step = 4;
  void *panels = 0;
#if defined(FEW_ROWS)
  step = has_amx ? 32 : FEW_ROWS(M, K) ? 16 : 24;
  if (PANEL_BYTES(M, K)) panels = aligned_alloc(64, (size_t)PANEL_BYTES(M, K));
#endif
  for (int64_t j = 0; j < num_weights; j++) total += (weights[j]->out_features + step - 1) / step;
#pragma omp parallel
  {
    int tid = omp_get_thread_num(), nt = omp_get_num_threads();
    T *rows = (T *)aligned_alloc(64, (size_t)(step * K) * sizeof(T));
    float *scales = (float *)malloc((size_t)(K / 64) * sizeof(float));
    if (!rows || !scales) abort();
#if defined(FEW_ROWS)
    if (panels) {
      NAME(pack)(panels, x, x_stride, M, K, tid, nt);
#pragma omp barrier
    }
#endif
    int64_t first = total * tid / nt, last = total * (tid + 1) / nt, task = 0;
    T *column = y;
    for (int64_t j = 0; j < num_weights && task < last; j++) {
      const nf4_weight *w = weights[j];
      int64_t O = w->out_features, parts = (O + step - 1) / step;
      for (int64_t part = MAX(first - task, 0); part < MIN(last - task, parts); part++) {
        int64_t n = step * part, count = MIN(O - n, step);
        const T *bias = biases[j] ? biases[j] + n : 0;
        NAME(nf4_rows)(rows, scales, w, n, (int)count);
#if defined(FEW_ROWS)
        if (panels) {
          NAME(tiles)(column + n, y_stride, 0, panels, rows, bias, M, K, 0, count, 0);
          continue;
        }
#endif
        NAME(linear_columns)(column + n, y_stride, 0, x, x_stride, rows, bias, M, K, 0, count);
      }
      task += parts;
      column += O;
    }
    free(scales);
    free(rows);
  }
  free(panels);
}

// y = weight * round(x / rms(x)), one row at a time, as transformers' Llama-type RMSNorm rounds. With a residual (else null), x is the
// rounded x + residual, which total receives; both as long as y.
void NAME(ml_rms_norm)(T *y, int64_t y_stride, const T *x, int64_t x_stride, const T *weight, float eps, int64_t rows, int64_t H,
                       const T *residual, T *total) {
#pragma omp parallel for if (rows > 16)
  for (int64_t i = 0; i < rows; i++) {
    const T *xi = x + i * x_stride;
    T *yi = y + i * y_stride;
    v16 squares = {0};
    int64_t k = 0;
    if (residual) {
      const T *added = residual + i * H;
      T *to = total + i * H;
      for (; k + 16 <= H; k += 16) STORE16(to + k, LOAD16(xi + k) + LOAD16(added + k));
      for (; k < H; k++) to[k] = FROM_FLOAT(TO_FLOAT(xi[k]) + TO_FLOAT(added[k]));
      xi = to;
    }
    for (k = 0; k + 16 <= H; k += 16) {
      v16 v = LOAD16(xi + k);
      squares = fma16(v, v, squares);
    }
    float sum = hsum(squares);
    for (; k < H; k++) sum = fma1(TO_FLOAT(xi[k]), TO_FLOAT(xi[k]), sum);
    float inverse = 1.0f / sqrtf(sum / (float)H + eps);
    for (k = 0; k + 16 <= H; k += 16)  // transformers rounds before the weight
      STORE16(yi + k, ROUND16(LOAD16(xi + k) * inverse) * LOAD16(weight + k));
    for (; k < H; k++) yi[k] = FROM_FLOAT(TO_FLOAT(FROM_FLOAT(TO_FLOAT(xi[k]) * inverse)) * TO_FLOAT(weight[k]));
  }
}

// y = round(silu(gate)) * up for rows [gate | up] of 2 I elements, rounding where two separate operations would.
void NAME(ml_silu_mul)(T *y, const T *gate_up, int64_t rows, int64_t I) {
#pragma omp parallel for if (rows * I > 8192)
  for (int64_t i = 0; i < rows; i++) {
    const T *gate = gate_up + 2 * i * I, *up = gate + I;
    T *yi = y + i * I;
    int64_t k = 0;
    for (; k + 16 <= I; k += 16) STORE16(yi + k, ROUND16(silu(LOAD16(gate + k))) * LOAD16(up + k));
    for (; k < I; k++) {
      T rounded = FROM_FLOAT(silu(splat(TO_FLOAT(gate[k])))[0]);
      yi[k] = FROM_FLOAT(TO_FLOAT(rounded) * TO_FLOAT(up[k]));
    }
  }
}

// Rotates x[head, token] in place by its position: x cos + rotate_half(x) sin over the first R of D elements, rounding
// where three separate operations would. cos and sin are [tokens, R]; R / 2 is a multiple of 8 or done by the tail.
void NAME(ml_rope)(T *x, int64_t token_stride, int64_t head_stride, const T *cosines, const T *sines, int64_t tokens,
                   int64_t heads, int64_t R) {
  int64_t half = R / 2;
#pragma omp parallel for if (tokens > 16)
  for (int64_t t = 0; t < tokens; t++) {
    const T *c = cosines + t * R, *s = sines + t * R;
    for (int64_t h = 0; h < heads; h++) {
      T *low = x + t * token_stride + h * head_stride, *high = low + half;
      int64_t d = 0;
      for (; d + 16 <= half; d += 16) {
        v16 a = LOAD16(low + d), b = LOAD16(high + d);
        STORE16(low + d, ROUND16(a * LOAD16(c + d)) - ROUND16(b * LOAD16(s + d)));
        STORE16(high + d, ROUND16(b * LOAD16(c + half + d)) + ROUND16(a * LOAD16(s + half + d)));
      }
      for (; d < half; d++) {
        float a = TO_FLOAT(low[d]), b = TO_FLOAT(high[d]);
        float ac = TO_FLOAT(FROM_FLOAT(a * TO_FLOAT(c[d]))), bs = TO_FLOAT(FROM_FLOAT(b * TO_FLOAT(s[d])));
        float bc = TO_FLOAT(FROM_FLOAT(b * TO_FLOAT(c[half + d]))), as = TO_FLOAT(FROM_FLOAT(a * TO_FLOAT(s[half + d])));
        low[d] = FROM_FLOAT(ac - bs);
        high[d] = FROM_FLOAT(bc + as);
      }
    }
  }
}

// out[q] = share[q] * sum of scores[q][j] * value[j] for MB query heads and NV * 16 columns, in registers.
static inline __attribute__((always_inline)) void NAME(weigh_columns)(
    const int MB, const int NV, const attention_args *g, T *out, const T *v_head, const int32_t *table, int64_t first,
    int64_t last, const float *scores, int64_t stride, const float *share) {
  int64_t D = g->head_dim, block_stride = g->kv_heads * g->block_size * D;
  v16 acc[2][4];
#pragma GCC unroll 2
  for (int q = 0; q < MB; q++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[q][v] = (v16){0};
  for (int64_t j = first; j < last;) {
    int64_t in_block = j % g->block_size, run = MIN(g->block_size - in_block, last - j);
    const T *value = v_head + table[j / g->block_size] * block_stride + in_block * D;
    const float *p = scores + (j - first);
    for (int64_t i = 0; i < run; i++, value += D, p++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        v16 column = LOAD16(value + 16 * v);
#pragma GCC unroll 2
        for (int q = 0; q < MB; q++) acc[q][v] = fma16(splat(p[q * stride]), column, acc[q][v]);
      }
    j += run;
  }
#pragma GCC unroll 2
  for (int q = 0; q < MB; q++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) STORE16(out + q * D + 16 * v, acc[q][v] * share[q]);
}

static void NAME(weigh_values)(const attention_args *g, int mb, T *out, const T *v_head, const int32_t *table,
                               int64_t first, int64_t last, const float *scores, int64_t stride, const float *share) {
  for (int q = 0; q < mb; q += 2, out += 2 * g->head_dim, scores += 2 * stride, share += 2) {
    int64_t d = 0;
    if (mb - q > 1)
      for (; d + 64 <= g->head_dim; d += 64)
        NAME(weigh_columns)(2, 4, g, out + d, v_head + d, table, first, last, scores, stride, share);
    for (int lone = 0; lone < MIN(mb - q, 2); lone++)
      for (int64_t c = d; c < g->head_dim; c += 16)
        NAME(weigh_columns)(1, 1, g, out + lone * g->head_dim + c, v_head + c, table, first, last, scores + lone * stride,
                            stride, share + lone);
  }
}

// scores become exp((score - peak) * scale), zero behind the context; returns one over their sum.
static float NAME(soften)(const attention_args *g, float *scores, int64_t count, int64_t padded) {
  for (int64_t j = count; j < padded; j++) scores[j] = -INFINITY;
  if (g->softcap > 0.0f)
    for (int64_t j = 0; j < count; j++) scores[j] = g->softcap * tanhf(scores[j] * g->scale / g->softcap) / g->scale;
  v16 top = splat(-INFINITY), total = splat(0.0f);
  for (int64_t j = 0; j < padded; j += 16) top = vmax(load_f32(scores + j), top);
  float peak = top[0];
  for (int i = 1; i < 16; i++) peak = top[i] > peak ? top[i] : peak;
  for (int64_t j = 0; j < padded; j += 16) {
    v16 p = vexp((load_f32(scores + j) - peak) * g->scale);
    store_f32(scores + j, p);
    total += p;
  }
  return 1.0f / hsum(total);
}

// Attention of mb (at most 6) query heads that share one key head, over the cached keys [first, last) of one sequence.
static void NAME(attend)(const attention_args *g, int mb, T *out, const T *const *queries, const T *k_cache,
                         const T *v_cache, const int32_t *table, int64_t kv_head, int64_t first, int64_t last, float *scores) {
  int64_t D = g->head_dim, block_stride = g->kv_heads * g->block_size * D, head = kv_head * g->block_size * D;
  int64_t count = last - first, padded = (count + 15) / 16 * 16;
  float share[6];
  for (int64_t j = first; j < last;) {
    int64_t in_block = j % g->block_size, run = MIN(g->block_size - in_block, last - j);
    const T *k = k_cache + table[j / g->block_size] * block_stride + head + in_block * D;
    int64_t ahead = MIN(g->block_size, last - j - run) * D * (int64_t)sizeof(T);
    fetch_lines(v_cache + (k - k_cache), run * D * (int64_t)sizeof(T));  // blocks lie anywhere: no processor foresees the next
    if (ahead > 0) fetch_lines(k_cache + table[(j + run) / g->block_size] * block_stride + head, ahead);
    for (int64_t i = 0; i < run; i += 4)
      NAME(dot_tile)(mb, (int)MIN(run - i, 4), queries, k + i * D, D, D, scores + (j - first) + i, padded);
    j += run;
  }
  for (int q = 0; q < mb; q++) share[q] = NAME(soften)(g, scores + q * padded, count, padded);
  NAME(weigh_values)(g, mb, out, v_cache + head, table, first, last, scores, padded, share);
}

// Writes this step's keys and values into the paged cache [blocks, kv_heads, block_size, head_dim].
void NAME(ml_store_kv)(const attention_args *g, T *k_cache, T *v_cache, const T *k, const T *v, int64_t k_token_stride,
                       int64_t k_head_stride, int64_t v_token_stride, int64_t v_head_stride, const int64_t *slots) {
  int64_t D = g->head_dim;
#pragma omp parallel for if (g->num_tokens > 32)
  for (int64_t t = 0; t < g->num_tokens; t++)
    for (int64_t h = 0; h < g->kv_heads; h++) {
      int64_t to = ((slots[t] / g->block_size * g->kv_heads + h) * g->block_size + slots[t] % g->block_size) * D;
      memcpy(k_cache + to, k + t * k_token_stride + h * k_head_stride, D * sizeof(T));
      memcpy(v_cache + to, v + t * v_token_stride + h * v_head_stride, D * sizeof(T));
    }
}

// out[token, head, D]: causal attention of each listed token over its own sequence's cache.
void NAME(ml_paged_attention)(const attention_args *g, T *out, const T *q, int64_t q_token_stride, int64_t q_head_stride,
                              const T *k_cache, const T *v_cache) {
  int64_t group = g->q_heads / g->kv_heads;
#if defined(PROMPT_ATTENTION)
  if (g->num_prompts) PROMPT_ATTENTION(g, out, q, q_token_stride, q_head_stride, k_cache, v_cache);
  if (!g->num_listed) return;
#endif
#pragma omp parallel
  {
    float *scores = (float *)malloc(sizeof(float) * 6 * (size_t)(g->max_context + 16));
    if (!scores) abort();
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t i = 0; i < g->num_listed; i++)
      for (int64_t kv = 0; kv < g->kv_heads; kv++) {
        int64_t t = g->listed[i], last = g->position[t] + 1;
        int64_t first = g->window > 0 && last > g->window ? last - g->window : 0;
        const int32_t *table = g->block_tables + g->sequence[t] * g->table_stride;
        for (int64_t h = kv * group; h < (kv + 1) * group; h += 6) {
          const T *queries[6];
          int mb = (int)MIN((kv + 1) * group - h, 6);
          for (int m = 0; m < mb; m++) queries[m] = q + t * q_token_stride + (h + m) * q_head_stride;
          NAME(attend)(g, mb, out + (t * g->q_heads + h) * g->head_dim, queries, k_cache, v_cache, table, kv, first, last,
                       scores);
        }
      }
    free(scores);
  }
}

// scores[rows[i]][v] = -inf where bit v of bits[i], lowest bit first, is 0; in place. Strides: of scores in elements, of bits in bytes.
void NAME(ml_forbid)(T *scores, int64_t stride, const int64_t *rows, int64_t num_rows, const uint8_t *bits, int64_t bits_stride,
                     int64_t vocab) {
  const T lowest = FROM_FLOAT(-INFINITY);
#pragma omp parallel for if (num_rows * vocab > 1 << 20)
  for (int64_t i = 0; i < num_rows; i++)
    for (int64_t first = 0; first < vocab; first += 64) {
      T *s = scores + rows[i] * stride + first;
      int64_t width = MIN(64, vocab - first);
      uint64_t allowed = 0;
      memcpy(&allowed, bits + i * bits_stride + first / 8, (size_t)(width + 7) / 8);
      uint64_t forbidden = ~allowed;
      if (width < 64) forbidden &= ((uint64_t)1 << width) - 1;
      if (forbidden == ~(uint64_t)0)
        for (int b = 0; b < 64; b++) s[b] = lowest;
      else
        for (; forbidden; forbidden &= forbidden - 1) s[__builtin_ctzll(forbidden)] = lowest;
    }
}

// Calls that were recorded, one after the other. Kernels have the numbers of bindings.py's signatures.
void NAME(ml_replay)(const kernel_call *calls, int64_t count) {
#define P(i) ((void *)c->arguments[i])
#define I(i) (c->arguments[i])
  for (const kernel_call *c = calls; c < calls + count; c++) switch (c->kernel) {
      case 0: NAME(ml_linear)(P(0), P(1), P(2), I(3), P(4), I(5), P(6), P(7), I(8), I(9), I(10)); break;
      case 1: NAME(ml_nf4_linear)(P(0), I(1), P(2), I(3), P(4), P(5), I(6), I(7)); break;
      case 2: NAME(ml_lora_delta)(P(0), P(1), P(2), I(3), P(4), I(5), P(6), I(7)); break;
      case 3: NAME(ml_rms_norm)(P(0), I(1), P(2), I(3), P(4), c->number, I(5), I(6), P(7), P(8)); break;
      case 4: NAME(ml_silu_mul)(P(0), P(1), I(2), I(3)); break;
      case 5: NAME(ml_rope)(P(0), I(1), I(2), P(3), P(4), I(5), I(6), I(7)); break;
      case 6: NAME(ml_store_kv)(P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7), I(8), P(9)); break;
      case 7: NAME(ml_paged_attention)(P(0), P(1), P(2), I(3), I(4), P(5), P(6)); break;
      case 8: NAME(ml_repacked_linear)(P(0), P(1), P(2), I(3), P(4), I(5), P(6), P(7), I(8), I(9), I(10)); break;
      default: abort();
    }
#undef P
#undef I
}
