// Attention of prompts by AVX512-BF16's dot product of pairs, or by AMX: 32 queries at a time, one in each lane, over their sequence's cached
// keys in blocks of KEYS. A lane's numbers depend on its own sequence alone, however a prompt is cut into steps: blocks begin at multiples of
// KEYS.

#define KEYS 64

// One thread's room for it. D: head size.
typedef struct {
  uint32_t *queries;  // [D / 2][32] pairs
  uint32_t *values;   // [KEYS / 2][D] pairs of two tokens
  uint32_t *shares;   // [KEYS / 2][32] pairs of two tokens
  uint32_t *rows;     // [32][KEYS / 2] the same
  float *scores;      // [KEYS][32]
  float *out;         // [D][32], by AMX [32][D]
} prompt_room;

// A unit is 16 tokens of one head; two units that share a key head are computed at once, in lanes 0 to 15 and 16 to 31.
typedef struct {
  int64_t token, position, count, head;  // the step's row and the position of the first; tokens (0: an empty unit)
} prompt_unit;

static inline v16 lane_positions(const prompt_unit *unit) {
  v16 p;
  for (int i = 0; i < 16; i++) p[i] = (float)(unit->position + MIN(i, unit->count - 1));
  return p;
}

static inline v16 soft_capped(v16 scores, float scale, float cap) {  // cap * tanh(scores * scale / cap) / scale
  v16 x = scores * (scale / cap);
  i32x16 sign = (i32x16)x & (i32x16)((u32x16){0} + 0x80000000u);
  v16 e = vexp(-2.0f * (v16)((i32x16)x & 0x7fffffff));
  return (v16)((i32x16)((1.0f - e) / (1.0f + e)) | sign) * (cap / scale);
}

// The pairs of the values at keys [first, first + KEYS), zero behind `last`: values[j][d] = (v[2j][d], v[2j + 1][d]).
static void pair_values(uint32_t *to, const attention_args *g, const bf16 *v_head, const int32_t *table, int64_t first, int64_t last) {
  int64_t D = g->head_dim, block_stride = g->kv_heads * g->block_size * D;
  for (int64_t j = 0; j < KEYS; j += 2, to += D) {
    const bf16 *row[2];
    for (int i = 0; i < 2; i++) {
      int64_t key = first + j + i;
      row[i] = key < last ? v_head + table[key / g->block_size] * block_stride + key % g->block_size * D : 0;
    }
    for (int64_t d = 0; d < D; d += 16) {
      __m512i half[2];
      for (int i = 0; i < 2; i++)
        half[i] = row[i] ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row[i] + d))) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + d, _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16)));
    }
  }
}

// scores[key][lane] of the keys [first, first + KEYS) that are below `last`.
static void prompt_scores(const prompt_room *room, const attention_args *g, const bf16 *k_head, const int32_t *table, int64_t first,
                          int64_t last) {
  int64_t D2 = g->head_dim / 2, block_stride = g->kv_heads * g->block_size * g->head_dim;
  for (int64_t j = 0; j < MIN(KEYS, last - first);) {
    int64_t key = first + j, in_block = key % g->block_size, run = MIN(g->block_size - in_block, MIN(KEYS, last - first) - j);
    pairs *k = (pairs *)(k_head + table[key / g->block_size] * block_stride + in_block * g->head_dim);
    for (; run >= 8; run -= 8, j += 8, k += 8 * D2) pair_tile(8, 2, k, D2, 1, room->queries, D2, 0, room->scores + 32 * j, 0);
    for (; run > 0; run--, j++, k += D2) pair_tile(1, 2, k, D2, 1, room->queries, D2, 0, room->scores + 32 * j, 0);
  }
}

#if defined(__AMX_BF16__)
// Whether tiles take 16 keys as they lie.
#define BY_AMX(g) (has_amx && (g)->block_size % 16 == 0)

// As prompt_scores; scores of keys from `last` on, up to the next multiple of 16, are of whatever the cache holds there.
static void amx_scores(const prompt_room *room, const attention_args *g, const bf16 *k_head, const int32_t *table, int64_t first, int64_t last) {
  int64_t D = g->head_dim, block_stride = g->kv_heads * g->block_size * D;
  for (int64_t key = first, tiles; key < MIN(first + KEYS, last); key += 16 * tiles) {
    int64_t in_block = key % g->block_size;
    tiles = in_block + 32 <= g->block_size && key + 32 <= first + KEYS ? 2 : 1;
    amx_rows keys = {(const char *)(k_head + table[key / g->block_size] * block_stride + in_block * D), 2 * D, 32 * D, 64};
    AMX_TILES[tiles - 1][1](keys, 16 * tiles, (const char *)room->queries, AMX_ROW_BYTES, D / 2, room->scores + 32 * (key - first), (amx_next){0});
  }
}

// out[lane][D] += the values at KEYS keys by their shares.
static void amx_weigh(const prompt_room *room, int64_t D) {
  float sums[32 * 32] __attribute__((aligned(64)));
  for (int64_t v = 0; v < 32; v += 16)
    for (int64_t j = 0; j < KEYS / 2; j += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(room->shares + 32 * (j + i) + v);
      transpose16(r);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(room->rows + (v + i) * (KEYS / 2) + j, r[i]);
    }
  for (int64_t d = 0; d < D; d += 32) {
    int64_t vectors = D - d > 16 ? 2 : 1;
    amx_rows shares = {(const char *)room->rows, 2 * KEYS, 16 * 2 * KEYS, 64};
    AMX_TILES[1][vectors - 1](shares, 32, (const char *)(room->values + d), 4 * D, KEYS / 2, sums, (amx_next){0});
    for (int64_t i = 0; i < 32; i++)
      for (int64_t v = 0; v < 16 * vectors; v += 16) {
        float *out = room->out + i * D + d + v;
        store_f32(out, load_f32(out) + load_f32(sums + 32 * i + v));
      }
  }
}
#else
#define BY_AMX(g) 0
#define amx_scores(...) abort()
#define amx_weigh(...) abort()
#endif

// to[pair of keys][lane] = exp((score - peak) * scale), of all KEYS; returns their sum. has_unseen: some scores are -infinity.
static inline __attribute__((always_inline)) v16 share_keys(uint32_t *to, const float *scores, v16 peak, float scale, const int has_unseen) {
  static const uint16_t IN_TURN[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i in_turn = _mm512_loadu_si512(IN_TURN);
  v16 sum = splat(0.0f);
  for (int64_t j = 0; j < KEYS; j += 2) {
    v16 p[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      v16 s = load_f32(scores + 32 * (j + i));
      p[i] = vexp((s - peak) * scale);
      if (has_unseen) p[i] = (v16)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)s, (__m512)splat(-INFINITY), _CMP_NEQ_UQ), (__m512)p[i]);
    }
    sum += p[0] + p[1];
    _mm512_storeu_si512(to + 16 * j, _mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0])));
  }
  return sum;
}

// Attention of two units. Running maximum and sum of each lane, as flash attention does.
static void prompt_attend(const prompt_room *room, const attention_args *g, const prompt_unit unit[2], bf16 *out, const bf16 *q,
                          int64_t q_token_stride, int64_t q_head_stride, const bf16 *k_head, const bf16 *v_head, const int32_t *table) {
  int64_t D = g->head_dim, last = 0, first = INT64_MAX, by_amx = BY_AMX(g);
  v16 position[2], peak[2], sum[2], window = splat(g->window > 0 ? (float)g->window : INFINITY);
  for (int v = 0; v < 2; v++) {
    const bf16 *rows[16];
    for (int i = 0; i < 16; i++)
      rows[i] = i < unit[v].count ? q + (unit[v].token + i) * q_token_stride + unit[v].head * q_head_stride : 0;
    pack_pairs(room->queries + 16 * v, 32, rows, 0, D / 2);
    position[v] = lane_positions(&unit[v]);
    peak[v] = splat(-FLT_MAX), sum[v] = splat(0.0f);
    if (!unit[v].count) continue;
    last = MAX(last, unit[v].position + unit[v].count);
    first = MIN(first, g->window > 0 ? MAX(0, unit[v].position + 1 - g->window) : 0);
  }
  memset(room->out, 0, (size_t)D * 32 * sizeof(float));
  for (int64_t block = first / KEYS * KEYS; block < last; block += KEYS) {
    int64_t count = MIN(KEYS, last - block);
    if (by_amx) amx_scores(room, g, k_head, table, block, last);
    else prompt_scores(room, g, k_head, table, block, last);
    pair_values(room->values, g, v_head, table, block, last);
    for (int64_t j = count; j < KEYS; j++)
      for (int v = 0; v < 2; v++) store_f32(room->scores + 32 * j + 16 * v, splat(-INFINITY));
    for (int v = 0; v < 2; v++) {
      float *scores = room->scores + 16 * v;
      int is_whole = block + KEYS <= unit[v].position + 1 && (g->window <= 0 || block > unit[v].position + 15 - g->window);
      if (!is_whole || g->softcap > 0.0f)
        for (int64_t j = 0; j < count; j++) {
          v16 s = load_f32(scores + 32 * j), key = splat((float)(block + j));
          if (g->softcap > 0.0f) s = soft_capped(s, g->scale, g->softcap);
          i32x16 seen = (key <= position[v]) & (key > position[v] - window);
          store_f32(scores + 32 * j, (v16)((seen & (i32x16)s) | (~seen & (i32x16)splat(-INFINITY))));
        }
      v16 before = peak[v], top[4] = {before, before, before, before};
      for (int64_t j = 0; j < KEYS; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) top[i] = vmax(load_f32(scores + 32 * (j + i)), top[i]);
      peak[v] = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
      if (_mm512_cmp_ps_mask((__m512)before, (__m512)peak[v], _CMP_NEQ_UQ)) {
        v16 faded = vexp((before - peak[v]) * g->scale);
        sum[v] *= faded;
        if (by_amx)
          for (int64_t i = 0; i < 16; i++)
            for (float *out = room->out + (16 * v + i) * D, *end = out + D; out < end; out += 16) store_f32(out, load_f32(out) * faded[i]);
        else
          for (int64_t d = 0; d < D; d++) store_f32(room->out + 32 * d + 16 * v, load_f32(room->out + 32 * d + 16 * v) * faded);
      }
      sum[v] += is_whole ? share_keys(room->shares + 16 * v, scores, peak[v], g->scale, 0)
                         : share_keys(room->shares + 16 * v, scores, peak[v], g->scale, 1);
    }
    if (by_amx) amx_weigh(room, D);
    else
      for (int64_t d = 0; d < D; d += 8)
        pair_tile(8, 2, room->values + d, 1, D, room->shares, (count + 1) / 2, room->out + 32 * d, room->out + 32 * d, 0);
  }
  for (int v = 0; v < 2; v++) {  // a lane that saw scores of -infinity alone has no number
    __mmask16 is_lost = _mm512_cmp_ps_mask((__m512)peak[v], (__m512)splat(-FLT_MAX), _CMP_EQ_OQ);
    sum[v] = (v16)_mm512_mask_mov_ps((__m512)sum[v], is_lost, (__m512)splat(NAN));
    for (int64_t d = 0; d < D && unit[v].count; d += 16) {
      void *to[16];
      v16 factor = 1.0f / sum[v];
      for (int64_t i = 0; i < unit[v].count; i++) to[i] = out + ((unit[v].token + i) * g->q_heads + unit[v].head) * D + d;
      if (by_amx)
        for (int64_t i = 0; i < unit[v].count; i++) store_bf16(to[i], load_f32(room->out + (16 * v + i) * D + d) * factor[i]);
      else unpack_rows(16, to, 0, room->out + 32 * d + 16 * v, 32, (int)unit[v].count, factor, 0);
    }
  }
}

// The attention of g's prompts, each a row of [first token, tokens] (see ml_paged_attention).
static void prompt_attention(const attention_args *g, bf16 *out, const bf16 *q, int64_t q_token_stride, int64_t q_head_stride,
                             const bf16 *k_cache, const bf16 *v_cache) {
  int64_t D = g->head_dim, group = g->q_heads / g->kv_heads;
#pragma omp parallel
  {
    int64_t words[6] = {D / 2 * 32, KEYS / 2 * D, KEYS / 2 * 32, KEYS / 2 * 32, KEYS * 32, D * 32}, total = 0;
    for (int i = 0; i < 6; i++) total += words[i];
    uint32_t *at = (uint32_t *)aligned_alloc(64, (size_t)(total + 15) / 16 * 64);
    if (!at) abort();
    prompt_room room = {at, at + words[0], at + words[0] + words[1], at + words[0] + words[1] + words[2], 0, 0};
    room.scores = (float *)(room.rows + words[3]), room.out = room.scores + words[4];
    if (BY_AMX(g)) amx_shape(16, 16);
    for (int64_t p = 0; p < g->num_prompts; p++) {
      int64_t token = g->prompts[2 * p], count = g->prompts[2 * p + 1], units = (count + 15) / 16 * group, twos = (units + 1) / 2;
      const int32_t *table = g->block_tables + g->sequence[token] * g->table_stride;
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = twos * g->kv_heads - 1; task >= 0; task--) {  // the last tokens, which see most, first
        int64_t kv = task % g->kv_heads, head = kv * g->block_size * D;
        prompt_unit unit[2];
        for (int64_t i = 0; i < 2; i++) {
          int64_t u = task / g->kv_heads * 2 + i, t = u / group * 16;
          unit[i] = (prompt_unit){token + t, g->position[token] + t, u < units ? MIN(16, count - t) : 0, kv * group + u % group};
        }
        prompt_attend(&room, g, unit, out, q, q_token_stride, q_head_stride, k_cache + head, v_cache + head, table);
      }
    }
    if (BY_AMX(g)) amx_release();
    free(at);
  }
}
