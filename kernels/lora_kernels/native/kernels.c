// CPU kernels of multilora: skinny linear layers with many adapters' deltas, paged attention, RMSNorm.
// Plain C with the compiler's vector extensions; the bf16 dot product uses AVX512-BF16 if the machine has it.
// Bounded by memory bandwidth at decode: every weight and adapter byte is read once per step.

#define _GNU_SOURCE  // pread, O_CLOEXEC
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint16_t bf16;

// A group of linear layers that read the same input and write neighbouring columns of one output.
typedef struct {
  int64_t num_members, in_features;
  const int64_t *module;  // [members] row of the table
  const int64_t *start;   // [members] first output column in y
  const int64_t *out;     // [members] output columns
} lora_group;

// Which adapters act on which rows in this step; the same for every group of the model.
typedef struct {
  int64_t num_segments, num_slots, h_rank;  // h_rank: columns of scratch a member gets, at least the largest rank
  const int32_t *slot;     // [segments]
  const int32_t *start;    // [segments + 1], into rows
  const int32_t *rows;     // token rows, grouped by segment
  const int64_t *offsets;  // [modules, slots, 2] A and B, in elements of the arena
  const int32_t *ranks;    // [modules, slots]; 0: the slot does not touch the module
  const float *scales;     // [modules, slots]
  const uint8_t *int8;     // [segments] whether A and B are bytes, with the scales of the ranks before each A
  const void *arena;
  float *h;  // scratch, [listed rows, members * h_rank] of any group
  const int64_t *factors;  // [modules, slots] DoRA's factors, float [outputs], in elements of the arena; 0: the slot has
                           // none. Null: no adapter of the step has any
} lora_batch;

// The step's tokens and where their sequences' keys and values lie.
typedef struct {
  int64_t num_tokens, num_listed, q_heads, kv_heads, head_dim, block_size, table_stride, window, max_context;
  const int32_t *block_tables;  // [sequences, table_stride]
  const int32_t *sequence;      // [tokens] row of block_tables
  const int32_t *position;      // [tokens]
  const int32_t *listed;        // [listed] which tokens to attend from
  const int32_t *prompts;       // [prompts, 2] first token and number of tokens of each prompt: not listed
  int64_t num_prompts;
  float scale, softcap;
} attention_args;

// A weight as bitsandbytes packs it (see nf4/weight.py): two codes a byte, the first in the high half.
typedef struct {
  int64_t out_features, in_features;  // in_features: a multiple of 64
  const uint8_t *packed;
  const float *code;                                     // [16]
  const float *absmax;                                   // [blocks] of 64 values, or null, and then
  const uint8_t *nested;                                 // [blocks] which of
  const float *nested_code, *nested_absmax;              // [256], times one of 256 blocks', plus the offset
  float nested_offset;
} nf4_weight;

// A call of a kernel: which one (as in ml_replay), its arguments in their order, and apart from them the one that is a float.
typedef struct {
  int64_t kernel, arguments[11];
  float number;
} kernel_call;

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#include "background.h"

// One (segment s, member j) of a batch b and a group g.
#define CELL(b, g, s, j) ((g)->module[j] * (b)->num_slots + (b)->slot[s])
#define RANK(b, g, s, j) ((b)->ranks[CELL(b, g, s, j)])
#define SCALE(b, g, s, j) ((b)->scales[CELL(b, g, s, j)])
#define A_AT(b, g, s, j) ((const T *)(b)->arena + (b)->offsets[2 * CELL(b, g, s, j)])
#define B_AT(b, g, s, j) ((const T *)(b)->arena + (b)->offsets[2 * CELL(b, g, s, j) + 1])
#define F_OFFSET(b, g, s, j) ((b)->factors ? (b)->factors[CELL(b, g, s, j)] : 0)
#define F_AT(b, g, s, j) (F_OFFSET(b, g, s, j) ? (const float *)((const T *)(b)->arena + F_OFFSET(b, g, s, j)) : 0)
#define H_STRIDE(b, g) ((g)->num_members * (b)->h_rank)
#define H_AT(b, g, s, j) ((b)->h + (b)->start[s] * H_STRIDE(b, g) + (j) * (b)->h_rank)
#define NUM_ROWS(b, s) ((b)->start[(s) + 1] - (b)->start[s])
#define ROWS(b, s) ((b)->rows + (b)->start[s]), NUM_ROWS(b, s)
#define IS_INT8(b, s) ((b)->int8[s])
#define INT8(at) ((const int8_t *)(at))
#define RANK_SCALES(a, rank) ((const float *)(a) - (rank))

typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

static inline v4 fold(v16 v) {  // four partial sums
  v8 half[2];
  v4 quarter[2];
  memcpy(half, &v, sizeof half);
  half[0] += half[1];
  memcpy(quarter, half, sizeof quarter);
  return quarter[0] + quarter[1];
}
static inline float hsum(v16 v) {
  v4 q = fold(v);
  return (q[0] + q[1]) + (q[2] + q[3]);
}
static inline v4 hsum4(v16 a, v16 b, v16 c, v16 d) {  // the four sums
#if defined(__AVX512F__)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  __m512d lo = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), hi = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  return fold((v16)_mm512_add_ps((__m512)lo, (__m512)hi));
#else
  return (v4){hsum(a), hsum(b), hsum(c), hsum(d)};
#endif
}

static inline v16 splat(float f) { return (v16){f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}; }

// a * b + c, rounded once on an x86 CPU with FMA. Written out, and -ffp-contract=off: a compiler fuses the same line in one function and not in
// another, and a row's bits would depend on how many rows are beside it.
#if defined(__FMA__)
static inline float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline v8 fma8(v8 a, v8 b, v8 c) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  v8 half[3][2];
  memcpy(half[0], &a, sizeof a), memcpy(half[1], &b, sizeof b), memcpy(half[2], &c, sizeof c);
  for (int i = 0; i < 2; i++) half[2][i] = fma8(half[0][i], half[1][i], half[2][i]);
  memcpy(&c, half[2], sizeof c);
  return c;
#endif
}
#else
static inline float fma1(float a, float b, float c) { return a * b + c; }
static inline v16 fma16(v16 a, v16 b, v16 c) { return a * b + c; }
#endif
static inline v16 vmax(v16 a, v16 b) {  // b if one is not a number
#if defined(__AVX512F__)
  return (v16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (v16)(((i32x16)(a > b) & (i32x16)a) | (~(i32x16)(a > b) & (i32x16)b));
#endif
}

// exp to 2 ulp for x <= 0 (below -87: 1e-38); NaN stays NaN. Cephes' polynomial on [-ln2/2, ln2/2].
static inline v16 vexp(v16 x) {
  x = vmax(splat(-87.0f), x);
  v16 shifted = fma16(x, splat(1.44269504f), splat(12582912.0f));  // adding 1.5 * 2^23 rounds to the nearest integer
  v16 n = shifted - 12582912.0f;
  v16 r = fma16(n, splat(2.12194440e-4f), fma16(n, splat(-0.693359375f), x));
  v16 p = fma16(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fma16(p, r, splat(8.3334519073e-3f));
  p = fma16(p, r, splat(4.1665795894e-2f));
  p = fma16(p, r, splat(1.6666665459e-1f));
  p = fma16(p, r, splat(5.0000001201e-1f));
  p = fma16(p * r, r, r) + 1.0f;
  return (v16)((i32x16)p + (__builtin_convertvector(n, i32x16) << 23));
}

static inline v16 silu(v16 x) {  // x / (1 + exp(-x)), without overflow
  i32x16 negative = (i32x16)(x < 0.0f);
  v16 e = vexp((v16)((i32x16)x | ((i32x16){0} + (int32_t)0x80000000)));
  v16 top = (v16)((negative & (i32x16)e) | (~negative & (i32x16)splat(1.0f)));
  return x * top / (1.0f + e);
}

static inline void fetch_lines(const void *p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch((const char *)p + i, 0, 2);
}

// Which of a group's A's, or B's, are fetched: all before `next`, in the order of segments and members, and `at` of that one.
typedef struct {
  const lora_batch *b;
  const lora_group *g;
  int64_t element, side, next, at;  // element: bytes of the arena's. side: 0: A, 1: B
} fetched;

// Fetches that many bytes more: while an adapter's product computes, the next one's come. They lie anywhere, and are too few for the
// processor to foresee where they end.
static inline void fetch_more(fetched *f, int64_t num_bytes) {
  while (num_bytes > 0 && f->next < f->b->num_segments * f->g->num_members) {
    int64_t s = f->next / f->g->num_members, j = f->next % f->g->num_members, cell = CELL(f->b, f->g, s, j);
    int64_t size = f->b->ranks[cell] * (f->side ? f->g->out[j] : f->g->in_features) * (IS_INT8(f->b, s) ? 1 : f->element);
    int64_t count = MIN(num_bytes, size - f->at);
    if (count > 0) fetch_lines((const char *)f->b->arena + f->element * f->b->offsets[2 * cell + f->side] + f->at, count);
    f->at += count, num_bytes -= count;
    if (f->at >= size) f->next++, f->at = 0;
  }
}

static inline v16 load_f32(const float *p) {
  v16 v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store_f32(float *p, v16 v) { memcpy(p, &v, sizeof v); }

static inline float bf16_to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline bf16 float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return 0x7FC0;
  return (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
static inline v16 load_bf16(const bf16 *p) {
  u16x16 v;
  memcpy(&v, p, sizeof v);
  return (v16)(__builtin_convertvector(v, u32x16) << 16);
}
static inline u32x16 bf16_bits(v16 f) {  // as float_to_bf16, sixteen at a time
  u32x16 bits = (u32x16)f, nan = (u32x16)(f != f);
  u32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return (rounded & ~nan) | (nan & 0x7FC0);
}
static inline void store_bf16(bf16 *p, v16 f) {
  u16x16 v = __builtin_convertvector(bf16_bits(f), u16x16);
  memcpy(p, &v, sizeof v);
}
static inline v16 round_bf16(v16 f) { return (v16)(bf16_bits(f) << 16); }

static inline v16 load_int8(const int8_t *p) {
#if defined(__AVX512F__)
  return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  __m256 half[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
  v16 v;
  memcpy(&v, half, sizeof v);
  return v;
#else
  i8x16 v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, v16);
#endif
}

// h[row][r] *= scales[r] for ranks [r0, r1): what makes an int8 adapter's A and B whole again, both at once.
static void scale_ranks(float *h, int64_t h_stride, int64_t count, const float *scales, int64_t r0, int64_t r1) {
  for (int64_t m = 0; m < count; m++)
    for (int64_t r = r0; r < r1; r++) h[m * h_stride + r] *= scales[r];
}

// The absmaxes of blocks [first, first + count), rounded as bitsandbytes rounds them.
static void nf4_scales(float *scales, const nf4_weight *w, int64_t first, int64_t count) {
  if (w->absmax) {
    memcpy(scales, w->absmax + first, (size_t)count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i++)
    scales[i] = w->nested_code[w->nested[first + i]] * w->nested_absmax[(first + i) / 256] + w->nested_offset;
}

// 64 values from 32 bytes.
static inline void nf4_values_f32(float *to, const uint8_t *packed, const float *code, float scale) {
  v16 table = load_f32(code) * scale;
#if defined(__AVX512F__)
  for (int i = 0; i < 4; i++) {
    __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + 8 * i)));
    __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));  // its low 4 bits count
    store_f32(to + 16 * i, (v16)_mm512_permutexvar_ps(index, (__m512)table));
  }
#else
  for (int i = 0; i < 32; i++) to[2 * i] = table[packed[i] >> 4], to[2 * i + 1] = table[packed[i] & 15];
#endif
}
static inline void nf4_values_bf16(bf16 *to, const uint8_t *packed, const float *code, float scale) {
  bf16 table[16];
  store_bf16(table, load_f32(code) * scale);
#if defined(__AVX512BW__)
  __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));  // bit 4 of an index is not ours
  for (int i = 0; i < 2; i++) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + 16 * i)));
    __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    _mm512_storeu_si512(to + 32 * i, _mm512_permutexvar_epi16(index, twice));
  }
#else
  for (int i = 0; i < 32; i++) to[2 * i] = table[packed[i] >> 4], to[2 * i + 1] = table[packed[i] & 15];
#endif
}

#define TILE_COLUMNS 96
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)  // elsewhere the dot product or the library is faster
#define TILES
#define PANEL_BYTES(M, K) (((M) + 15) / 16 * 16 * (K) * (int64_t)sizeof(float))
#define GROUP_BYTES (320 * 1024)
#include "tiles.h"

// Eight elements <-> eight floats, with the same rounding as sixteen.
static inline v8 load8_f32(const float *p) {
  v8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline v8 load8_bf16(const bf16 *p) {
  return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
static inline v8 load8_int8(const int8_t *p) {
  return (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline void store8_f32(float *p, v8 v) { memcpy(p, &v, sizeof v); }
static inline void store8_bf16(bf16 *p, v8 f) {
  __m256i bits = (__m256i)f, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)f, (__m256)f, _CMP_UNORD_Q));
  __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
  _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
}
#endif

#define T float
#define NAME(x) x##_f32
#define LOAD16 load_f32
#define STORE16 store_f32
#define ROUND16(v) (v)
#define TO_FLOAT(v) (v)
#define FROM_FLOAT(v) (v)
#define DOT_STEP 16
#define DOT_VEC v16
#define DOT_LOAD load_f32
#define DOT_LOAD_INT8 load_int8
#define DOT(acc, a, b) fma16(a, b, acc)
#include "outputs.h"
#if defined(TILES)
#include "tiled_linear.h"
#endif
#include "ops.h"
#undef T
#undef NAME
#undef LOAD16
#undef STORE16
#undef ROUND16
#undef TO_FLOAT
#undef FROM_FLOAT
#undef DOT_STEP
#undef DOT_VEC
#undef DOT_LOAD
#undef DOT_LOAD_INT8
#undef DOT

#define T bf16
#define ROUND16 round_bf16
#define NAME(x) x##_bf16
#define LOAD16 load_bf16
#define STORE16 store_bf16
#define TO_FLOAT bf16_to_float
#define FROM_FLOAT float_to_bf16
#include "outputs.h"
#if defined(__AVX512BF16__)
#include "bfloat16/pair_tiles.h"
#define FEW_ROWS(M, K) (!has_amx && (M) <= 8 && (K) % 2 == 0)
#define REPACKED
#include "bfloat16/prompt_attention.h"
#define PROMPT_ATTENTION prompt_attention
#define PANEL_BYTES(M, K) ((M) > (has_amx ? 0 : 8) && (K) % 2 == 0 ? ((M) + 31) / 32 * 32 * (K) * (int64_t)sizeof(bf16) : 0)
#define DOT_STEP 32
#define DOT_VEC __m512bh
#define DOT_LOAD(p) ((__m512bh)_mm512_loadu_si512(p))
#define DOT_LOAD_INT8(p) _mm512_cvtne2ps_pbh((__m512)load_int8((p) + 16), (__m512)load_int8(p))  // exact
#define DOT(acc, a, b) ((v16)_mm512_dpbf16_ps((__m512)(acc), a, b))
#else
#define DOT_STEP 16
#define DOT_VEC v16
#define DOT_LOAD load_bf16
#define DOT_LOAD_INT8 load_int8
#define DOT(acc, a, b) fma16(a, b, acc)
#endif
#if defined(TILES)
#include "tiled_linear.h"
#endif
#include "ops.h"

// From and up to how many rows ml_linear is faster than a library's product (0: never; benchmarks/op_linear.py), and ml_nf4_linear
// than unpacking the whole weight for one (benchmarks/op_nf4.py).
#if defined(__AVX512F__)  // any number: then a row's bits do not depend on how many are beside it
int64_t ml_linear_max_rows_f32(void) { return INT64_MAX; }
int64_t ml_nf4_max_rows_f32(void) { return INT64_MAX; }
#elif defined(TILES)
int64_t ml_linear_max_rows_f32(void) { return INT64_MAX; }
int64_t ml_nf4_max_rows_f32(void) { return 8; }
#else
int64_t ml_linear_max_rows_f32(void) { return 0; }
int64_t ml_nf4_max_rows_f32(void) { return 8; }
#endif
#if defined(__AVX512BF16__)
int64_t ml_linear_max_rows_bf16(void) { return INT64_MAX; }
int64_t ml_nf4_max_rows_bf16(void) { return INT64_MAX; }
#elif defined(TILES)  // the library multiplies bf16 one value at a time there
int64_t ml_linear_max_rows_bf16(void) { return INT64_MAX; }
int64_t ml_nf4_max_rows_bf16(void) { return 8; }
#else
int64_t ml_linear_max_rows_bf16(void) { return 0; }
int64_t ml_nf4_max_rows_bf16(void) { return 8; }
#endif

// Whether ml_paged_attention takes prompts; else all their tokens are listed, or the library's.
#if defined(__AVX512BF16__)
int64_t ml_takes_prompts_bf16(void) { return 1; }
#else
int64_t ml_takes_prompts_bf16(void) { return 0; }
#endif
int64_t ml_takes_prompts_f32(void) { return 0; }

// Whether weights are read faster repacked, see ml_repacked_linear.
#if defined(__AVX512BF16__)
int64_t ml_repacks_bf16(void) { return 1; }
#else
int64_t ml_repacks_bf16(void) { return 0; }
#endif
int64_t ml_repacks_f32(void) { return 0; }

#if defined(TILES)
int64_t ml_linear_min_rows(void) { return 2; }
#else
int64_t ml_linear_min_rows(void) { return 1; }
#endif

// Ends the calling thread's pool of compute threads.
void ml_release_threads(void) { omp_pause_resource_all(omp_pause_hard); }
