// Products of bfloat16 by AMX: tiles of 16 rows of 64 bytes. One operand lies in rows (16 rows, 16 pairs of each), the other in pairs
// ([16 pairs][16 lanes]). Weights are the rows where they lie as rows, and the tokens then are panels of pairs as in pair_tiles.h;
// repacked weights are the pairs, and the tokens are the rows. Both multiply the same numbers in the same order, 16 pairs at a time:
// the even ones' sum, the odd ones' sum, and both to the total. So a sum does not depend on what else is in the batch.

#include <sys/syscall.h>
#include <unistd.h>

static int has_amx;  // whether the system lets this process use the tiles
__attribute__((constructor)) static void ask_for_amx(void) {
  has_amx = !syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
}

#define AMX_ROW_BYTES 128  // of a row of 32 floats of a result, and of 32 pairs of a rest
#define AMX_COLUMN_BYTES (768 * 1024)  // of repacked weights that all tokens are multiplied with: less than half of a second-level cache

// Tiles 0 to 3 are results, 4 and 5 the rows' operand, 6 and 7 the pairs'. The first of each has `first` rows, the second `second`.
static void amx_shape(int64_t first, int64_t second) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape = {.palette = 1};
  const int64_t rows[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; i++) shape.bytes[i] = rows[i] ? 64 : 0, shape.rows[i] = (uint8_t)rows[i];
  asm volatile("" ::"r"(&shape) : "memory");  // the intrinsic says that it reads eight bytes, and so do those below of what they read
  _tile_loadconfig(&shape);
}

static void amx_release(void) { _tile_release(); }

// Where an operand in rows lies, in bytes: a row from the one before it, 16 rows from the 16 before, and 16 pairs from the 16 before.
typedef struct {
  const char *at;
  int64_t row, tile, pairs;
} amx_rows;
// Lines that are fetched with each 16 pairs; none if count is 0. In bytes: a line from the one before it, and what `pairs` is above.
typedef struct {
  const char *at;
  int64_t count, line, pairs;
} amx_next;

// One product of the loaded operands' next 16 pairs.
#define AMX_STEP(a, a_row, a_tile, b, b_row)           \
  _tile_loadd(6, b, b_row);                            \
  _tile_loadd(4, a, a_row);                            \
  _tile_dpbf16ps(0, 4, 6);                             \
  if (NB > 1) _tile_loadd(7, (b) + 64, b_row);         \
  if (NB > 1) _tile_dpbf16ps(1, 4, 7);                 \
  if (NA > 1) _tile_loadd(5, (a) + (a_tile), a_row);   \
  if (NA > 1) _tile_dpbf16ps(2, 5, 6);                 \
  if (NA > 1 && NB > 1) _tile_dpbf16ps(3, 5, 7);

// to[row][lane] = the sum over K2 pairs of a[row] and b[.][lane], for NA * 16 rows, of which `count` are there, and NB * 16 lanes.
static inline __attribute__((always_inline)) void amx_tile(const int NA, const int NB, amx_rows a, int64_t count, const char *b, int64_t b_row,
                                                           int64_t K2, float *to, amx_next next) {
  _tile_zero(0);
  if (NB > 1) _tile_zero(1);
  if (NA > 1) _tile_zero(2);
  if (NA > 1 && NB > 1) _tile_zero(3);
  for (int64_t step = 0; step < K2 / 16; step++) {
    for (int64_t i = 0; i < next.count; i++) __builtin_prefetch(next.at + i * next.line + step * next.pairs, 0, 2);
    const char *pairs = b + 16 * step * b_row;
    AMX_STEP(a.at + step * a.pairs, a.row, a.tile, pairs, b_row)
  }
  int64_t rest = K2 % 16, done = K2 / 16;
  if (rest) {
    char rest_a[32 * 64] __attribute__((aligned(64))) = {0}, rest_b[16 * AMX_ROW_BYTES] __attribute__((aligned(64))) = {0};
    for (int64_t i = 0; i < count; i++)
      memcpy(rest_a + 64 * i, a.at + i / 16 * a.tile + i % 16 * a.row + done * a.pairs, (size_t)(4 * rest));
    for (int64_t i = 0; i < rest; i++) memcpy(rest_b + AMX_ROW_BYTES * i, b + (16 * done + i) * b_row, 64 * NB);
    asm volatile("" ::"r"(rest_a), "r"(rest_b) : "memory");
    AMX_STEP(rest_a, 64, 16 * 64, rest_b, AMX_ROW_BYTES)
  }
  _tile_stored(0, to, AMX_ROW_BYTES);
  if (NB > 1) _tile_stored(1, to + 16, AMX_ROW_BYTES);
  if (NA > 1) _tile_stored(2, to + 16 * 32, AMX_ROW_BYTES);
  if (NA > 1 && NB > 1) _tile_stored(3, to + 16 * 32 + 16, AMX_ROW_BYTES);
  asm volatile("" ::: "memory");
}
#undef AMX_STEP

#define AMX_PARAMETERS amx_rows a, int64_t count, const char *b, int64_t b_row, int64_t K2, float *to, amx_next next
#define AMX_TILE(NA, NB) \
  static __attribute__((noinline)) void amx_tile_##NA##_##NB(AMX_PARAMETERS) { amx_tile(NA, NB, a, count, b, b_row, K2, to, next); }
AMX_TILE(1, 1) AMX_TILE(1, 2) AMX_TILE(2, 1) AMX_TILE(2, 2)
#undef AMX_TILE
static void (*const AMX_TILES[2][2])(AMX_PARAMETERS) = {{amx_tile_1_1, amx_tile_1_2}, {amx_tile_2_1, amx_tile_2_2}};
#undef AMX_PARAMETERS

// y[lane][j..j + count) = the sums of `from` + bias, [count][32] floats, for `lanes` of the 16 that start there.
static inline void amx_columns(int64_t count, void *const *y, int64_t j, int wide, const float *from, int lanes, const bf16 *bias) {
  void *to[16];
  for (int m = 0; m < lanes; m++) to[m] = out_at_bf16(y[m], j, wide);
  if (count == 16) return unpack_rows(16, to, wide, from, 32, lanes, splat(1.0f), bias);
  for (int m = 0; m < lanes; m++)
    for (int64_t i = 0; i < count; i++) out_put_bf16(out_at_bf16(to[m], i, wide), from[32 * i + m] + (bias ? bf16_to_float(bias[i]) : 0.0f), wide);
}

// As tiles_bf16: y[all tokens, lo..hi) = x . w[lo..hi)^T + bias. All of these columns are multiplied with one panel before the next.
static void amx_tiles(void *y, int64_t y_stride, int wide, const void *panels, const bf16 *w, const bf16 *bias, int64_t M, int64_t K, int64_t lo,
                      int64_t hi) {
  int64_t K2 = K / 2, shape = 0;
  float out[32 * 32] __attribute__((aligned(64)));
  for (int64_t m = 0; m < M; m += 32)
    for (int64_t n = lo; n < hi; n += 32) {
      int64_t rows = MIN(32, hi - n), lanes = PAIR_LANES(M, m / 32);
      void *to[32];
      for (int64_t i = 0; i < MIN(lanes, M - m); i++) __builtin_prefetch(to[i] = out_at_bf16(y, (m + i) * y_stride + n, wide), 1, 3);
      if (rows != shape) amx_shape(MIN(16, rows), MAX(0, rows - 16)), shape = rows;
      amx_rows of = {(const char *)(w + n * K), 2 * K, 16 * 2 * K, 64};
      amx_next next = {(const char *)(w + (n + 32) * K), m ? 0 : MAX(0, MIN(32, hi - n - 32)), 2 * K, 64};
      AMX_TILES[rows > 16][lanes > 16](of, rows, (const char *)panels + 4 * m * K2, 4 * lanes, K2, out, next);
      for (int64_t v = 0; v < MIN(lanes, M - m); v += 16)
        for (int64_t j = 0; j < rows; j += 16)
          amx_columns(MIN(16, rows - j), to + v, j, wide, out + 32 * j + v, (int)MIN(16, M - m - v), bias ? bias + n + j : 0);
    }
  amx_release();
}

// Tokens of a product of repacked weights, where there are more than one tile's: [tile of 16 tokens][16 pairs][token], zeros beside them.
#define AMX_TOKENS 32
#define AMX_PACKED_BYTES(M, K) (((M) + 15) / 16 * (((K) + 31) / 32) * 1024)
static void amx_pack(char *to, const bf16 *x, int64_t x_stride, int64_t M, int64_t K, int tid, int nt) {
  int64_t steps = (K + 31) / 32;
  for (int64_t m = (M + 15) / 16 * 16 * tid / nt; m < (M + 15) / 16 * 16 * (tid + 1) / nt; m++) {
    char *row = to + m / 16 * steps * 1024 + m % 16 * 64;
    for (int64_t k = 0; k < K; k += 32) {
      int64_t bytes = m < M ? 2 * MIN(32, K - k) : 0;
      memcpy(row + k * 32, x + m * x_stride + k, (size_t)bytes);
      memset(row + k * 32 + bytes, 0, (size_t)(64 - bytes));
    }
  }
}

// y[token][32 or 16 columns] = the sums of `from` + bias, [token][32] floats.
static inline void amx_put(void *y, int wide, const float *from, int64_t vectors, const v16 bias[2]) {
  v16 sums[2] = {load_f32(from) + bias[0], load_f32(from + 16 * (vectors - 1)) + bias[vectors - 1]};
  if (wide || vectors == 1) {
    for (int64_t v = 0; v < vectors; v++) out_put16_bf16(out_at_bf16(y, 16 * v, wide), sums[v], wide);
    return;
  }
  __m256i low = (__m256i)__builtin_convertvector(bf16_bits(sums[0]), u16x16), high = (__m256i)__builtin_convertvector(bf16_bits(sums[1]), u16x16);
  _mm512_storeu_si512(y, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));  // a whole line: half of one costs as much
}

// As repacked_part. packed: null for up to AMX_TOKENS tokens.
static void amx_repacked_part(void *y, int64_t y_stride, int wide, const bf16 *x, int64_t x_stride, const char *packed, const bf16 *w,
                              const bf16 *bias, int64_t M, int64_t K2, int64_t lo, int64_t hi) {
  int64_t steps = (K2 + 15) / 16, columns = MAX(32, AMX_COLUMN_BYTES / (4 * K2) / 32 * 32);
  float out[32 * 32] __attribute__((aligned(64)));
  amx_shape(packed ? 16 : MIN(16, M), packed ? 16 : MAX(0, M - 16));
  for (int64_t first = lo; first < hi; first += columns)
    for (int64_t m = 0; m < M; m += 32) {
      int64_t tokens = MIN(32, M - m), last = MIN(hi, first + columns);
      amx_rows of = {(const char *)x, 2 * x_stride, 16 * 2 * x_stride, 64};
      if (packed) of = (amx_rows){packed + m / 16 * steps * 1024, 64, steps * 1024, 1024};
      for (int64_t n = first, vectors; n < last; n += 16 * vectors) {
        vectors = last - n >= 32 ? 2 : 1;
        for (int64_t i = 0; i < tokens; i++) __builtin_prefetch(out_at_bf16(y, (m + i) * y_stride + n, wide), 1, 3);
        const char *block = (const char *)(w + n * 2 * K2);
        amx_next next = {block + 64 * REPACKED_AHEAD, m ? 0 : 16 * vectors, 64, 1024 * vectors};
        AMX_TILES[tokens > 16][vectors > 1](of, tokens, block, 64 * vectors, K2, out, next);
        v16 own[2];
        for (int v = 0; v < vectors; v++) own[v] = bias ? load_bf16(bias + n + 16 * v) : splat(0.0f);
        for (int64_t i = 0; i < tokens; i++) amx_put(out_at_bf16(y, (m + i) * y_stride + n, wide), wide, out + 32 * i, vectors, own);
      }
    }
  amx_release();
}
