// The sums and the gradient of `formulas.py` as loops over rows, which the compiler vectorises for the machine it runs
// on. Plain C++: neither torch's headers nor intrinsics, so that it compiles in under a second.
//
// A row is read once: block by block, its logits still in the cache when their maximum is known. Sums are fp32 within a
// block and fp64 over blocks; 100k terms one after another would cost fp32 two digits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 512;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {  // as integers: compilers before gcc 13 do not vectorise conversions of _Float16
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(float value) { return value; }

inline float load(bfloat16 value) { return as_float(uint32_t(value.bits) << 16); }

inline float load(float16 value) {
  uint32_t magnitude = as_bits(as_float(uint32_t(value.bits & 0x7fffu) << 13) * 0x1p112f);  // 112: the biases' difference
  magnitude |= (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;                        // infinite, NaN
  return as_float(magnitude | uint32_t(value.bits & 0x8000u) << 16);
}

// Rounded to nearest, ties to even

inline void store(float &place, float value) { place = value; }

inline void store(bfloat16 &place, float value) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  place.bits = uint16_t(value == value ? rounded : 0x7fc0u);
}

inline void store(float16 &place, float value) {
  uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the sum's last bit is worth 2^-24
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;  // 65520 and more is infinite
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;   // NaN
  place.bits = uint16_t(rounded | (bits >> 16 & 0x8000u));
}

// The least argument of `exponential`, whose result there is zero.
constexpr float LEAST = -88.0f;

inline float at_least(float x) { return x < LEAST ? LEAST : x; }  // NaN stays

// e^x for LEAST <= x <= 0, within 1.03 units in the last place; NaN stays. x = n ln 2 + r, and on |r| <= ln 2 / 2 the
// polynomial of Cephes' expf. Near LEAST n is -127, where the bits that make 2^n are those of zero.
inline float exponential(float x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest integer in the low bits
  float shifted = x * 1.44269504f + ROUND;
  float n = shifted - ROUND;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // the first product is exact
  float square = r * r;
  float e = 1.9875691500e-4f * r + 1.3981999507e-3f;
  e = e * square + (8.3334519073e-3f * r + 4.1665795894e-2f);
  e = e * square + (1.6666665459e-1f * r + 5.0000001201e-1f);
  e = e * square + r;
  float power = as_float((as_bits(shifted) << 23) + 0x3f800000u);  // 2^n
  return e * power + power;
}

// A probability of zero makes its products zero, whatever the other factor.
inline float weighted(float p, float value) { return p == 0.0f ? 0.0f : p * value; }

// A row that is -inf all over has no probability, and -inf - -inf would be NaN.
inline float center(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Integers in the order of the numbers, since not every compiler vectorises a maximum of numbers that may be NaN.
inline int32_t as_sortable(float value) {
  int32_t bits = int32_t(as_bits(value));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

inline float from_sortable(int32_t sortable) { return as_float(uint32_t(sortable ^ (sortable >> 31 & 0x7fffffff))); }

template <typename T>
float block_maximum(const T *row, int64_t first, int64_t end, float maximum) {
  int32_t most = as_sortable(maximum);
#pragma omp simd reduction(max : most)
  for (int64_t i = first; i < end; i++) {
    int32_t here = as_sortable(load(row[i]));
    most = most < here ? here : most;
  }
  return from_sortable(most);
}

template <typename T>
int64_t column_of(float maximum, const T *row, int64_t column) {
  while (load(row[column]) != maximum) column++;
  return column;
}

// How far a maximum moved, and what that multiplies the sums relative to it by.
struct Move {
  double by, scale;
  Move(float from, float to) : by(from == to ? 0.0 : double(from) - to), scale(by == 0.0 ? 1.0 : std::exp(by)) {}
};

// A sum of probability times logits, whose logits moved `by`; without probability (and so, -inf all over) it is zero.
inline void move(double &sum, double by, double probability, double scale) {
  double moved = probability == 0.0 ? sum : sum + by * probability;
  sum = scale == 0.0 && sum == sum ? 0.0 : moved * scale;
}

template <typename T>
void pair_row(const T *student, const T *teacher, int64_t columns, float *maxima, float *sums, int64_t *places) {
  float z = -INFINITY, w = -INFINITY;
  double A = 0, B = 0, C = 0, D = 0, E = 0, F = 0;
  for (int64_t first = 0; first < columns; first += BLOCK) {
    int64_t end = std::min(columns, first + BLOCK);
    float z_now = block_maximum(student, first, end, z), w_now = block_maximum(teacher, first, end, w);
    if (places && z_now > z) places[0] = column_of(z_now, student, first);
    if (places && w_now > w) places[1] = column_of(w_now, teacher, first);
    if (z_now != z || w_now != w) {
      Move x(z, z_now), y(w, w_now);
      move(C, x.by, A, x.scale), move(E, y.by - x.by, A, x.scale), A *= x.scale;
      move(D, y.by, B, y.scale), move(F, y.by - x.by, B, y.scale), B *= y.scale;
      z = z_now, w = w_now;
    }
    float x_zero = center(z), y_zero = center(w), a = 0, b = 0, c = 0, d = 0, e = 0, f = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f)
    for (int64_t i = first; i < end; i++) {
      float x = load(student[i]) - x_zero, y = load(teacher[i]) - y_zero, x_least = at_least(x), y_least = at_least(y);
      float p = exponential(x_least), q = exponential(y_least);
      a += p, b += q, c += p * x_least, d += q * y_least, e += weighted(p, y - x), f += weighted(q, y - x);
    }
    A += a, B += b, C += c, D += d, E += e, F += f;
  }
  maxima[0] = z, maxima[1] = w;
  const double all[] = {A, B, C, D, E, F};
  std::copy_n(all, 6, sums);
}

template <typename T>
void single_row(const T *logits, int64_t columns, float *maximum, float *sums) {
  float z = -INFINITY;
  double A = 0, C = 0;
  for (int64_t first = 0; first < columns; first += BLOCK) {
    int64_t end = std::min(columns, first + BLOCK);
    float z_now = block_maximum(logits, first, end, z);
    Move x(z, z_now);
    move(C, x.by, A, x.scale), A *= x.scale;
    z = z_now;
    float zero = center(z), a = 0, c = 0;
#pragma omp simd reduction(+ : a, c)
    for (int64_t i = first; i < end; i++) {
      float x = at_least(load(logits[i]) - zero), p = exponential(x);
      a += p, c += p * x;
    }
    A += a, C += c;
  }
  *maximum = z, sums[0] = float(A), sums[1] = float(C);
}

// `coefficients`: α, -β, -γ, and both maxima
template <typename T>
void gradient_row(T *out, const T *student, const T *teacher, int64_t columns, const float *coefficients) {
  float alpha = coefficients[0], minus_beta = coefficients[1], minus_gamma = coefficients[2];
  float z = coefficients[3], w = coefficients[4];
  if (alpha == 0 && minus_beta == 0 && minus_gamma == 0) {
    std::memset(static_cast<void *>(out), 0, columns * sizeof(T));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < columns; i++) {
    float x = load(student[i]) - z, y = load(teacher[i]) - w;
    float from_student = minus_beta == 0 ? alpha : alpha + minus_beta * (y - x);  // β of zero beats an infinite y - x
    store(out[i], weighted(exponential(at_least(x)), from_student) + minus_gamma * exponential(at_least(y)));
  }
}

// Rows are shared out to threads; a row's result does not depend on who computes it.
template <typename Row>
void each_row(int64_t count, int64_t threads, Row row) {
#pragma omp parallel for schedule(dynamic) num_threads(int(threads))
  for (int64_t r = 0; r < count; r++) row(r);
}

// `type`: the place in TYPES of `compiled.py`
template <typename Function>
void with_type(int64_t type, Function function) {
  if (type == 0) function(float());
  if (type == 1) function(bfloat16());
  if (type == 2) function(float16());
}

}  // namespace

// Called from `compiled.py`. A row is so many `columns`, and rows begin a stride apart, in elements.

extern "C" void pair_sums(int64_t type, const void *student, int64_t student_stride, const void *teacher,
                          int64_t teacher_stride, const int64_t *rows, int64_t count, int64_t columns, float *maxima,
                          float *sums, int64_t *places, int64_t threads) {
  with_type(type, [=](auto element) {
    auto *z = static_cast<const decltype(element) *>(student), *w = static_cast<const decltype(element) *>(teacher);
    each_row(count, threads, [=](int64_t r) {
      pair_row(z + rows[r] * student_stride, w + rows[r] * teacher_stride, columns, maxima + 2 * r, sums + 6 * r,
               places ? places + 2 * r : nullptr);
    });
  });
}

extern "C" void single_sums(int64_t type, const void *logits, int64_t stride, int64_t count, int64_t columns,
                            float *maxima, float *sums, int64_t threads) {
  with_type(type, [=](auto element) {
    auto *z = static_cast<const decltype(element) *>(logits);
    each_row(count, threads, [=](int64_t r) { single_row(z + r * stride, columns, maxima + r, sums + 2 * r); });
  });
}

extern "C" void write_gradient(int64_t type, void *out, int64_t out_stride, const void *student, int64_t student_stride,
                               const void *teacher, int64_t teacher_stride, const float *coefficients, int64_t count,
                               int64_t columns, int64_t threads) {
  with_type(type, [=](auto element) {
    auto *gradient = static_cast<decltype(element) *>(out);
    auto *z = static_cast<const decltype(element) *>(student), *w = static_cast<const decltype(element) *>(teacher);
    each_row(count, threads, [=](int64_t r) {
      gradient_row(gradient + r * out_stride, z + r * student_stride, w + r * teacher_stride, columns,
                   coefficients + 5 * r);
    });
  });
}
