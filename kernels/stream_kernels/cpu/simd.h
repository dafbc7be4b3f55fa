// One hardware vector of floats at a time, in the compiler's portable vector types: exp, tanh, bfloat16, transposes.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace stream_lens {

// The hardware's width: wider vectors compile, but comparisons and shuffles then go through memory.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t BitLanes __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <typename Out, typename In>
inline Out bits_as(const In& x) {
  static_assert(sizeof(Out) == sizeof(In));
  Out out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

inline Lanes splat(float x) {
  return Lanes{} + x;
}

inline Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Lanes x) {
  std::memcpy(p, &x, sizeof(x));
}

inline Lanes larger(Lanes a, Lanes b) {
  return a > b ? a : b;
}

inline float sum(Lanes x) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

inline Lanes iota() {
  Lanes x{};
  for (int64_t i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
  return x;
}

// e^x for x <= 88 to about one unit in the last place; 0 below -87.3, so exp(-inf) = 0.
// x = n ln 2 + r with |r| <= ln 2 / 2, then a degree-7 polynomial in r and n added to the exponent.
inline Lanes exp(Lanes x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Lanes shifted = x * 1.44269504088896341f + shift;
  const Lanes n = shifted - shift;
  Lanes r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Lanes scaled = bits_as<Lanes>(bits_as<BitLanes>(p) + (bits_as<BitLanes>(shifted) << 23));
  return x < -87.3f ? Lanes{} : scaled;
}

// ln x for normal x > 0 to about one unit in the last place; -inf for 0.
// x = 2^n m with m in [sqrt ½, sqrt 2), then a degree-9 polynomial in m - 1.
inline Lanes log(Lanes x) {
  const BitLanes bits = bits_as<BitLanes>(x);
  const IntLanes half = bits_as<IntLanes>((bits & 0x007fffffu) | 0x3f000000u);  // m / 2 or m, in [½, 1)
  const Lanes low = bits_as<Lanes>(half);
  const Lanes exponent = __builtin_convertvector(bits_as<IntLanes>(bits >> 23) - 126, Lanes);
  const auto small = low < 0.707106781186547524f;
  const Lanes n = small ? exponent - 1.0f : exponent;
  const Lanes r = small ? low + low - 1.0f : low - 1.0f;
  Lanes p = r * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r + -1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r + -1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r + -2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const Lanes square = r * r;
  Lanes y = p * r * square + n * -2.12194440e-4f;
  y = y - 0.5f * square + r + n * 0.693359375f;
  return x > 0.0f ? y : splat(-kInf);
}

// Odd polynomial near zero (no cancellation), 1 - 2 / (e^2|x| + 1) elsewhere.
inline Lanes tanh(Lanes x) {
  const Lanes magnitude = x < 0 ? -x : x;
  const Lanes z = x * x;
  Lanes p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const Lanes near = p * z * x + x;
  const Lanes clamped = magnitude > 20.0f ? splat(20.0f) : magnitude;
  const Lanes far = 1.0f - 2.0f / (exp(clamped + clamped) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0 ? -far : far);
}

// The upper 16 bits of each float, rounded to nearest even: bfloat16.
inline BitLanes bfloat16_bits(Lanes x) {
  const BitLanes bits = bits_as<BitLanes>(x);
  const BitLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bits_as<BitLanes>(x == x) != 0u ? rounded : BitLanes{} + 0x7fc0u;
}

inline Lanes load(const at::BFloat16* p) {
  HalfBits half;
  std::memcpy(&half, p, sizeof(half));
  return bits_as<Lanes>(__builtin_convertvector(half, BitLanes) << 16);
}

inline void store(at::BFloat16* p, Lanes x) {
  const HalfBits half = __builtin_convertvector(bfloat16_bits(x), HalfBits);
  std::memcpy(p, &half, sizeof(half));
}

template <typename T>
inline Lanes load_first(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  alignas(64) T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store_first(T* p, Lanes x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  alignas(64) T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

// Lane by lane from a (index below kLanes) or b (index above).
template <int32_t... index>
inline Lanes shuffle(Lanes a, Lanes b, std::integer_sequence<int32_t, index...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, IntLanes{index...});  // GCC below 12
#endif
}

template <int32_t stage, int32_t... lane>
inline void swap_squares(Lanes& a, Lanes& b, std::integer_sequence<int32_t, lane...>) {
  using Low = std::integer_sequence<int32_t, (lane & stage ? int32_t{kLanes} + lane - stage : lane)...>;
  using High = std::integer_sequence<int32_t, (lane & stage ? int32_t{kLanes} + lane : lane + stage)...>;
  const Lanes first = a, second = b;
  a = shuffle(first, second, Low{});
  b = shuffle(first, second, High{});
}

// Transposes kLanes × kLanes in place, by swapping ever larger squares off the diagonal.
template <int32_t stage = 1>
inline void transpose_tile(Lanes* rows) {
  for (int32_t i = 0; i < kLanes; ++i) {
    if (!(i & stage)) swap_squares<stage>(rows[i], rows[i | stage], std::make_integer_sequence<int32_t, kLanes>{});
  }
  if constexpr (stage * 2 < kLanes) transpose_tile<stage * 2>(rows);
}

// Lane i of the result: all lanes of rows[i] joined by `join`. Overwrites the rows.
template <int32_t stage = 1, typename Join>
inline Lanes fold_rows(Lanes* rows, const Join& join) {
  for (int32_t i = 0; i < kLanes; i += 2 * stage) {
    swap_squares<stage>(rows[i], rows[i + stage], std::make_integer_sequence<int32_t, kLanes>{});
    rows[i] = join(rows[i], rows[i + stage]);
  }
  if constexpr (stage * 2 < kLanes) return fold_rows<stage * 2>(rows, join);
  return rows[0];
}

// target[col][row] = source[row][col]; target rows are written up to a multiple of kLanes, zeros past `rows`.
template <typename In, typename Out>
inline void transpose_into_padded(const In* source, int64_t source_stride, int64_t rows, int64_t cols, Out* target,
                                  int64_t target_stride) {
  Lanes tile[kLanes];
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t col = 0; col < cols; col += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        tile[i] = row + i < rows ? load_first(source + (row + i) * source_stride + col, cols - col) : Lanes{};
      }
      transpose_tile(tile);
      for (int64_t i = 0; i < kLanes && col + i < cols; ++i) store(target + (col + i) * target_stride + row, tile[i]);
    }
  }
}

// target[row][col] = source[col][row] for a source padded to kLanes per row; writes exactly rows × cols.
template <typename Out>
inline void transpose_from_padded(const float* source, int64_t source_stride, int64_t rows, int64_t cols, Out* target,
                                  int64_t target_stride) {
  Lanes tile[kLanes];
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t col = 0; col < cols; col += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        tile[i] = col + i < cols ? load(source + (col + i) * source_stride + row) : Lanes{};
      }
      transpose_tile(tile);
      for (int64_t i = 0; i < kLanes && row + i < rows; ++i) {
        store_first(target + (row + i) * target_stride + col, tile[i], cols - col);
      }
    }
  }
}

}  // namespace stream_lens
