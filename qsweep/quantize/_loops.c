/* Fake quantization in one pass forward and one back: see _loops.py. Compiled for float values, or bf16 with -DBF16.

   Every step is rounded to the type of the values, as tensor ops would leave it: no fused multiply-adds. Sums are those
   of blocks, each in 16 lanes, whatever the width of the machine's vectors: the same bits on any number of threads.
   Flags are constants in the loops: what one of them leaves out costs nothing. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048
#define LANES 16
#define INLINE static inline __attribute__((always_inline))

#ifdef BF16
typedef uint16_t value;
INLINE float get(value x) {
  uint32_t bits = (uint32_t)x << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}
INLINE uint32_t nearest(float x) { /* bits whose upper half is x, half to even; NaN stays NaN: its lower half is 0 here */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits + 0x7FFF + ((bits >> 16) & 1);
}
INLINE float narrow(float x) {
  uint32_t bits = nearest(x) & 0xFFFF0000;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}
INLINE value put(float x) { return (value)(nearest(x) >> 16); }
#else
typedef float value;
INLINE float get(value x) { return x; }
INLINE value put(float x) { return x; }
INLINE float narrow(float x) { return x; }
#endif

INLINE float between(float x, float low, float high) { /* NaN stays NaN */
  x = low > x ? low : x;
  return high < x ? high : x;
}

INLINE float sum(const float *lanes) {
  float total = 0;
  for (int k = 0; k < LANES; k++) total += lanes[k];
  return total;
}

/* How a tensor is gone over: `rows` of `columns` elements with a scale each, and where `bottoms` is given a lowest level
   (one for all where `apart` is 0), in blocks. */
typedef struct {
  int64_t rows, columns;
  int threads;
  const float *scales, *bottoms;
  int apart;
} layout;

/* `body` for each block: its number, its row, where it starts and how many elements it has. */
#define FOR_BLOCKS(body)                                                             \
  do {                                                                               \
    int64_t blocks = (at.columns + BLOCK - 1) / BLOCK;                               \
    _Pragma("omp parallel for num_threads(at.threads) schedule(static)")             \
    for (int64_t block = 0; block < at.rows * blocks; block++) {                     \
      int64_t row = block / blocks, before = block % blocks * BLOCK;                 \
      int64_t start = row * at.columns + before;                                     \
      int length = (int)(at.columns - before < BLOCK ? at.columns - before : BLOCK); \
      body;                                                                          \
    }                                                                                \
  } while (0)

/* Of bf16 the machine fetches too little by itself: what lies two blocks ahead is asked for, which halves the time of
   tensors that are in no cache. Of float, and where no sums are taken, it made it longer. */
#ifdef BF16
#define AHEAD(of)                                                                    \
  for (int i = 0; i < BLOCK; i += 64 / (int)sizeof(value)) __builtin_prefetch((of) + start + 2 * BLOCK + i)
#else
#define AHEAD(of) (void)0
#endif

#define SCALE at.scales[row]
#define BOTTOM (at.bottoms ? at.bottoms[row * at.apart] : bottom)

/* Calls lanes(gradient, values, passed) for LANES elements at a time; zeros stand behind the last ones. */
#define FOR_LANES(lanes)                                                             \
  do {                                                                               \
    int i = 0;                                                                       \
    for (; i + LANES <= length; i += LANES) lanes((gradient + i), (values + i), (passed + i)); \
    if (i < length) {                                                                \
      value given[LANES] = {0}, of[LANES] = {0}, found[LANES];                       \
      memcpy(given, gradient + i, (length - i) * sizeof(value));                     \
      memcpy(of, values + i, (length - i) * sizeof(value));                          \
      lanes(given, of, found);                                                       \
      memcpy(passed + i, found, (length - i) * sizeof(value));                       \
    }                                                                                \
  } while (0)

INLINE void ends_block(const value *restrict values, int length, float *ends) {
  float least = get(values[0]), most = least;
  int unknown = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(| : unknown)
  for (int i = 0; i < length; i++) {
    float x = get(values[i]);
    least = x < least ? x : least;
    most = x > most ? x : most;
    unknown |= x != x;
  }
  ends[0] = unknown ? NAN : least;
  ends[1] = unknown ? NAN : most;
}

/* The levels that bf16 numbers round to are bf16 numbers, too: only where `moving` need they be narrowed. */
INLINE void round_block(const value *restrict values, value *restrict outputs, int length, float scale, float bottom,
                        float steps, const int moving) {
  float inverse = 1 / scale, low = moving ? 0 : narrow(bottom), high = moving ? steps : narrow(bottom + steps);
  for (int i = 0; i < length; i++) {
    float level = rintf(narrow(get(values[i]) * inverse));
    if (moving) level = narrow(level - bottom);
    level = between(level, low, high);
    if (moving) level = narrow(level + bottom);
    outputs[i] = put(level * scale);
  }
}

/* `ends`: nothing, or the least and the greatest value of each block, as `extremes` gives them. */
void round_to_grid(const value *values, value *outputs, float *ends, layout at, float bottom, float steps) {
#define ROUND(moving)                                                                \
  FOR_BLOCKS(AHEAD(values); round_block(values + start, outputs + start, length, SCALE, BOTTOM, steps, moving);   \
             if (ends) ends_block(values + start, length, ends + 2 * block))
  if (at.bottoms)
    ROUND(1);
  else
    ROUND(0);
}

INLINE void step_block(const value *restrict gradient, const value *restrict values, value *restrict passed, int length,
                       float *step, float *beyond, float scale, float bottom, float steps, float under, float over,
                       const int moving, const int sums, const int offset) {
  float inverse = 1 / scale, low = moving ? 0 : bottom, high = low + steps, first = low - under, last = high + over;
  float back = moving && !offset ? bottom : 0; /* with a learned offset, its own gradient holds what the ends add */
  float steep[LANES] = {0}, stopped[LANES] = {0};
#define STEP(gradient, values, passed)                                               \
  _Pragma("omp simd")                                                                \
  for (int k = 0; k < LANES; k++) {                                                  \
    float arrived = get(gradient[k]), ratio = narrow(get(values[k]) * inverse);      \
    float place = moving ? narrow(ratio - bottom) : ratio;                           \
    int stops = (place <= first) | (place >= last);                                  \
    passed[k] = stops ? 0 : gradient[k];                                             \
    if (sums) {                                                                      \
      float through = stops ? 0 : arrived;                                           \
      float level = moving ? narrow(rintf(ratio) - bottom) : rintf(ratio);           \
      steep[k] += arrived * (between(level, low, high) + back) - through * (place + back); \
      if (offset) stopped[k] += arrived - through;                                   \
    }                                                                                \
  }
  FOR_LANES(STEP);
  if (sums) *step = sum(steep);
  if (offset) *beyond = sum(stopped);
}

/* `step` and `beyond`: as many numbers as there are blocks, or nothing; `beyond` not without `step`. */
void step_backward(const value *gradient, const value *values, value *passed, float *step, float *beyond, layout at,
                   float bottom, float steps, float under, float over) {
#define RUN(moving, sums, offset)                                                    \
  FOR_BLOCKS(if (sums) { AHEAD(values); AHEAD(gradient); }                           \
             step_block(gradient + start, values + start, passed + start, length, step ? step + block : 0,        \
                        beyond ? beyond + block : 0, SCALE, BOTTOM, steps, under, over, moving, sums, offset))
  if (at.bottoms && beyond)
    RUN(1, 1, 1);
  else if (at.bottoms && step)
    RUN(1, 1, 0);
  else if (at.bottoms)
    RUN(1, 0, 0);
  else if (step)
    RUN(0, 1, 0);
  else
    RUN(0, 0, 0);
}

INLINE void clip_block(const value *restrict gradient, const value *restrict values, value *restrict passed, int length,
                       float *lowered, float *raised, float low, float inverse, const int sums) {
  float down[LANES] = {0}, up[LANES] = {0};
#define CLIP(gradient, values, passed)                                               \
  _Pragma("omp simd")                                                                \
  for (int k = 0; k < LANES; k++) {                                                  \
    float arrived = get(gradient[k]), place = narrow(narrow(get(values[k]) - low) * inverse); \
    int stops = (place <= 0) | (place >= 1);                                         \
    passed[k] = stops ? 0 : gradient[k];                                             \
    if (sums) {                                                                      \
      float through = stops ? 0 : arrived;                                           \
      float raising = arrived * between(place, 0, 1) - through * place;              \
      up[k] += raising;                                                              \
      down[k] += arrived - through - raising;                                        \
    }                                                                                \
  }
  FOR_LANES(CLIP);
  if (sums) *lowered = sum(down), *raised = sum(up);
}

/* Of `at` only the size counts; `low` is subtracted in the type of the values. */
void clip_backward(const value *gradient, const value *values, value *passed, float *lowered, float *raised, layout at,
                   const float *low, const float *high) {
  float from = narrow(*low), inverse = 1 / (*high - *low);
  if (lowered)
    FOR_BLOCKS(AHEAD(values); AHEAD(gradient);
               clip_block(gradient + start, values + start, passed + start, length, lowered + block, raised + block, from,
                          inverse, 1));
  else
    FOR_BLOCKS(clip_block(gradient + start, values + start, passed + start, length, 0, 0, from, inverse, 0));
}

/* Least and greatest value of each block, one beside the other; NaN where there is one. */
void extremes(const value *values, float *ends, layout at) {
  FOR_BLOCKS(AHEAD(values); ends_block(values + start, length, ends + 2 * block));
}
