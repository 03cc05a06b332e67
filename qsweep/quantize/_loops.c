/* Fake quantization in one pass forward and one back: see _loops.py. Compiled for float values, or bf16 with -DBF16.

   Every step is rounded to the type of the values, as tensor ops would leave it: no fused multiply-adds. Sums are those
   of blocks, each in 16 lanes, whatever the width of the machine's vectors: the same bits on any number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048
#define LANES 16

#ifdef BF16
typedef uint16_t value;
static inline float get(value x) {
  uint32_t bits = (uint32_t)x << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}
static inline float narrow(float x) { /* to the nearest, half to even */
  uint32_t bits;
  float found;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  memcpy(&found, &bits, 4);
  return x == x ? found : x;
}
static inline value put(float x) { /* what `narrow` has given */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (value)(bits >> 16);
}
#else
typedef float value;
static inline float get(value x) { return x; }
static inline value put(float x) { return x; }
static inline float narrow(float x) { return x; }
#endif

static inline float between(float x, float low, float high) { /* NaN stays NaN */
  x = low > x ? low : x;
  return high < x ? high : x;
}

static inline float sum(const float *lanes) {
  float total = 0;
  for (int k = 0; k < LANES; k++) total += lanes[k];
  return total;
}

/* Calls lanes(gradient, values, passed) for LANES elements at a time from `start`; zeros stand behind the last ones. */
#define FOR_LANES(start, count, lanes)                                     \
  do {                                                                     \
    int i = 0;                                                             \
    for (; i + LANES <= (count); i += LANES)                               \
      lanes((gradient + (start) + i), (values + (start) + i), (passed + (start) + i)); \
    if (i < (count)) {                                                     \
      value given[LANES] = {0}, of[LANES] = {0}, found[LANES];             \
      memcpy(given, gradient + (start) + i, ((count) - i) * sizeof(value)); \
      memcpy(of, values + (start) + i, ((count) - i) * sizeof(value));     \
      lanes(given, of, found);                                             \
      memcpy(passed + (start) + i, found, ((count) - i) * sizeof(value));  \
    }                                                                      \
  } while (0)

/* All take the elements from `first`, a multiple of BLOCK, to the one before `last`. */

void round_to_grid(const value *restrict values, value *restrict outputs, int64_t first, int64_t last, float inverse,
                   float scale, float bottom, float steps, int moving) {
  float low = moving ? 0 : bottom, shift = moving ? bottom : 0;
  for (int64_t i = first; i < last; i++) {
    float level = narrow(rintf(narrow(get(values[i]) * inverse)) - shift);
    outputs[i] = put(narrow(narrow(between(level, low, low + steps) + shift) * scale));
  }
}

void step_backward(const value *restrict gradient, const value *restrict values, value *restrict passed,
                   float *restrict step, float *restrict beyond, int64_t first, int64_t last, float inverse,
                   float bottom, float steps, float under, float over, int moving, int offset) {
  float low = moving ? 0 : bottom, high = low + steps, shift = moving ? bottom : 0;
  float back = offset ? 0 : shift; /* with a learned offset, its own gradient holds what the ends add */
  for (int64_t start = first; start < last; start += BLOCK) {
    int count = (int)(last - start < BLOCK ? last - start : BLOCK);
    float steep[LANES] = {0}, stopped[LANES] = {0};
#define STEP(gradient, values, passed)                                                       \
  for (int k = 0; k < LANES; k++) {                                                          \
    float arrived = get(gradient[k]), ratio = narrow(get(values[k]) * inverse);              \
    float place = narrow(ratio - shift), level = narrow(rintf(ratio) - shift);               \
    float through = (place <= low - under) | (place >= high + over) ? 0 : arrived;           \
    passed[k] = put(through);                                                                \
    steep[k] += arrived * (between(level, low, high) + back) - through * (place + back);     \
    stopped[k] += arrived - through;                                                         \
  }
    FOR_LANES(start, count, STEP);
    if (step) step[start / BLOCK] = sum(steep);
    if (beyond) beyond[start / BLOCK] = sum(stopped);
  }
}

void clip_backward(const value *restrict gradient, const value *restrict values, value *restrict passed,
                   float *restrict lowered, float *restrict raised, int64_t first, int64_t last, float low,
                   float inverse) {
  for (int64_t start = first; start < last; start += BLOCK) {
    int count = (int)(last - start < BLOCK ? last - start : BLOCK);
    float down[LANES] = {0}, up[LANES] = {0};
#define CLIP(gradient, values, passed)                                                       \
  for (int k = 0; k < LANES; k++) {                                                          \
    float arrived = get(gradient[k]), place = narrow(narrow(get(values[k]) - low) * inverse); \
    float through = (place <= 0) | (place >= 1) ? 0 : arrived;                               \
    float raising = arrived * between(place, 0, 1) - through * place;                        \
    passed[k] = put(through);                                                                \
    up[k] += raising;                                                                        \
    down[k] += arrived - through - raising;                                                  \
  }
    FOR_LANES(start, count, CLIP);
    if (raised) raised[start / BLOCK] = sum(up);
    if (lowered) lowered[start / BLOCK] = sum(down);
  }
}
