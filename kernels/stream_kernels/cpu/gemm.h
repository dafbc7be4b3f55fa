// C = A B (+ C) on small row-major matrices: oneDNN's brgemm where this machine has it, a plain loop elsewhere.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>

#include "simd.h"

namespace stream_lens {

// B of a bfloat16 product stands in row pairs, [k / 2][n][2] ("VNNI"), which the instructions want.
template <typename T>
constexpr bool is_paired = !std::is_same_v<T, float>;

// Tried, not looked up: the switch torch.backends.mkldnn and ONEDNN_MAX_CPU_ISA count as well.
template <typename T>
inline bool has_brgemm() {
  alignas(64) T a[4 * 4] = {}, b[4 * 4] = {};
  alignas(64) float c[4 * 4];
  try {
    at::native::cpublas::brgemm(4, 4, 4, 4, 4, 4, false, a, b, c, is_paired<T>);
    at::native::cpublas::brgemm_release(is_paired<T>);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// The product without brgemm: four rows of C by two vectors at a time, kept in registers over k.
inline void plain_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                       int64_t b_stride, float* c, int64_t c_stride, bool add) {
  constexpr int64_t kRows = 4;
  for (int64_t col = 0; col < n; col += 2 * kLanes) {
    const int64_t left = std::min(kLanes, n - col), right = std::clamp<int64_t>(n - col - kLanes, 0, kLanes);
    for (int64_t row = 0; row < m; row += kRows) {
      const int64_t rows = std::min(kRows, m - row);
      Lanes total[kRows][2] = {};
      for (int64_t p = 0; p < k; ++p) {
        const float* from = b + p * b_stride + col;
        const Lanes b_left = load_first(from, left), b_right = right ? load_first(from + kLanes, right) : Lanes{};
        for (int64_t i = 0; i < kRows; ++i) {
          const float factor = a[(row + std::min(i, rows - 1)) * a_stride + p];
          total[i][0] += factor * b_left;
          total[i][1] += factor * b_right;
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* to = c + (row + i) * c_stride + col;
        store_first(to, add ? total[i][0] + load_first(to, left) : total[i][0], left);
        if (right) store_first(to + kLanes, add ? total[i][1] + load_first(to + kLanes, right) : total[i][1], right);
      }
    }
  }
}

template <typename T>
struct Gemm {
  bool brgemm;

  void operator()(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b, int64_t b_stride, float* c,
                  int64_t c_stride, bool add) const {
    if (brgemm) {
      at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, a, b, c, is_paired<T>);
    } else if constexpr (!is_paired<T>) {
      plain_gemm(m, n, k, a, a_stride, b, b_stride, c, c_stride, add);
    }
  }

  // Hands back the matrix unit (AMX tiles) that brgemm holds on this thread.
  void release() const {
    if (brgemm) at::native::cpublas::brgemm_release(is_paired<T>);
  }
};

}  // namespace stream_lens
