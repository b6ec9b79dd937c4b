// Where linear products are written, for both element types: T, or floats where `wide`, as a model's logits are. An output is addressed
// in elements of its own.

static inline void *NAME(out_at)(void *y, int64_t element, int wide) {
  return (char *)y + element * (int64_t)(wide ? sizeof(float) : sizeof(T));
}
static inline float NAME(out_get)(const void *y, int wide) { return wide ? *(const float *)y : TO_FLOAT(*(const T *)y); }
static inline void NAME(out_put)(void *y, float f, int wide) {
  if (wide) *(float *)y = f;
  else *(T *)y = FROM_FLOAT(f);
}
static inline v16 NAME(out_get16)(const void *y, int wide) { return wide ? load_f32((const float *)y) : LOAD16((const T *)y); }
static inline void NAME(out_put16)(void *y, v16 f, int wide) {
  if (wide) store_f32((float *)y, f);
  else STORE16((T *)y, f);
}
#if defined(TILES)
static inline v8 NAME(out_get8)(const void *y, int wide) { return wide ? load8_f32((const float *)y) : NAME(load8)((const T *)y); }
static inline void NAME(out_put8)(void *y, v8 f, int wide) {
  if (wide) store8_f32((float *)y, f);
  else NAME(store8)((T *)y, f);
}
#endif
