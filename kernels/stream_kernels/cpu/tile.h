// What forward and backward share: the score rule, a tile's visibility, block packing, scratch memory, the work queue.
//
// A tile holds the scores of one query block against one key block, transposed: [keys of the block][query rows],
// rows padded to a multiple of kLanes. So maxima, sums and logsumexp run down the tile, a vector of query rows at a
// time, and never across a vector.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "gemm.h"
#include "simd.h"

namespace stream_lens {

struct Sizes {
  int64_t batch, heads, kv_heads, query_len, key_len, head_dim, q_block, k_block, q_blocks, k_blocks, slots;

  int64_t groups() const { return heads / kv_heads; }
  int64_t rows(int64_t i) const { return std::min(q_block, query_len - i * q_block); }
  int64_t keys(int64_t block) const { return std::min(k_block, key_len - block * k_block); }
};

struct Rule {
  float scale;
  int64_t offset;
  int64_t window;        // key_len + query_len + offset when there is none: never hides anything
  float softcap;         // 0 when there is none
  const bool* key_mask;  // [batch, key] contiguous, or null
};

template <typename T>
struct Rows {  // one [batch, head, row, d] tensor whose last dimension is contiguous
  T* data;
  int64_t batch_stride, head_stride, stride;

  explicit Rows(const at::Tensor& x)
      : data(static_cast<T*>(x.data_ptr())), batch_stride(x.stride(0)), head_stride(x.stride(1)), stride(x.stride(2)) {}
  T* at(int64_t b, int64_t h, int64_t row) const { return data + b * batch_stride + h * head_stride + row * stride; }
};

// Asks for 2 MiB pages: fresh memory costs a fault per page, and kept blocks lie all over it.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
  const uintptr_t page = uintptr_t{2} << 20, begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

struct Scratch {  // 64-byte aligned, uninitialised
  std::unique_ptr<void, decltype(&std::free)> memory;

  explicit Scratch(size_t bytes) : memory(std::aligned_alloc(64, round_up(bytes + 1, 64)), &std::free) {
    TORCH_CHECK(memory, "block attention could not allocate ", bytes, " bytes of scratch memory");
    prefer_huge_pages(memory.get(), bytes);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory.get());
  }
};

template <typename T>
inline Scratch scratch(int64_t count) {
  return Scratch(count * sizeof(T));
}

inline at::Tensor rows_contiguous(const at::Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

enum class Visibility { none, some, all };

// `first_row` and `first_key` are absolute positions.
inline Visibility tile_visibility(const Rule& rule, const bool* key_mask, int64_t first_row, int64_t rows,
                                  int64_t first_key, int64_t keys) {
  const int64_t last_row = first_row + rows - 1, last_key = first_key + keys - 1;
  if (first_key > last_row || last_key <= first_row - rule.window) return Visibility::none;
  bool whole = last_key <= first_row && first_key > last_row - rule.window;
  if (key_mask) {
    const int64_t unmasked = std::count(key_mask + first_key, key_mask + last_key + 1, true);
    if (unmasked == 0) return Visibility::none;
    whole = whole && unmasked == keys;
  }
  return whole ? Visibility::all : Visibility::some;
}

// Sets the scores of key-query pairs that are not visible to -inf.
inline void mask_tile(const Rule& rule, const bool* key_mask, float* tile, int64_t width, int64_t first_row,
                      int64_t first_key, int64_t keys) {
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t key = first_key + j;
    const bool padding = key_mask && !key_mask[key];
    const float from = padding ? width : std::clamp<int64_t>(key - first_row, 0, width);
    const float until = std::clamp<int64_t>(key + rule.window - first_row, 0, width);
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      const Lanes row = iota() + static_cast<float>(lane);
      Lanes score = load(tile + j * width + lane);
      score = row >= from ? score : splat(-kInf);
      store(tile + j * width + lane, row < until ? score : splat(-kInf));
    }
  }
}

// score = softcap · tanh(scale · s / softcap), or scale · s where there is no cap.
inline void scale_and_cap(const Rule& rule, float* tile, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes score = load(tile + i) * rule.scale;
    store(tile + i, rule.softcap > 0 ? rule.softcap * tanh(score / rule.softcap) : score);
  }
}

// Checks `indices` and numbers the key blocks that some query block keeps: packed_of[(b, kv_head), block], or -1.
inline std::vector<int32_t> number_kept_blocks(const at::Tensor& indices, const Sizes& n, int64_t* count) {
  std::vector<int32_t> packed_of(n.batch * n.kv_heads * n.k_blocks, -1);
  const int32_t* index = indices.const_data_ptr<int32_t>();
  const int64_t per_head = n.q_blocks * n.slots;
  *count = 0;
  for (int64_t bh = 0; bh < n.batch * n.heads; ++bh) {
    int32_t* packed = packed_of.data() + bh / n.groups() * n.k_blocks;
    for (int64_t s = 0; s < per_head; ++s) {
      const int32_t block = index[bh * per_head + s];
      if (block < 0) continue;
      TORCH_CHECK_VALUE(block < n.k_blocks, "indices names key block ", block, ", but ", n.key_len,
                        " keys in blocks of ", n.k_block, " make ", n.k_blocks, " blocks; indices must lie below that");
      if (packed[block] < 0) packed[block] = (*count)++;
    }
  }
  return packed_of;
}

// Every kept block of x [batch, kv_head, key, d] transposed to [d][key_stride], zeros past its last key.
template <typename T>
inline Scratch pack_transposed(const at::Tensor& x, const Sizes& n, const std::vector<int32_t>& packed_of,
                               int64_t count) {
  const int64_t key_stride = round_up(n.k_block, kLanes), size = n.head_dim * key_stride;
  Scratch packed = scratch<T>(count * size);
  const Rows<const T> rows(x);
  at::parallel_for(0, packed_of.size(), std::max<int64_t>(1, 65536 / size), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      if (packed_of[item] < 0) continue;
      const int64_t block = item % n.k_blocks, bh = item / n.k_blocks;
      T* target = packed.template as<T>() + packed_of[item] * size;
      const int64_t keys = n.keys(block);
      if (keys <= key_stride - kLanes) std::fill(target, target + size, T(0));
      transpose_into_padded(rows.at(bh / n.kv_heads, bh % n.kv_heads, block * n.k_block), rows.stride, keys, n.head_dim,
                            target, key_stride);
    }
  });
  return packed;
}

// Rows [rows][d] as the B operand of a product over d: [d][width], or bfloat16 pairs [d / 2][width][2].
inline void pack_columns(const float* rows, int64_t stride, int64_t count, int64_t head_dim, float* target,
                         int64_t width) {
  transpose_into_padded(rows, stride, count, head_dim, target, width);
}

inline void pack_columns(const at::BFloat16* rows, int64_t stride, int64_t count, int64_t head_dim,
                         at::BFloat16* target, int64_t width) {
  // One pair of bfloat16 is one 32-bit cell; memcpy-based loads carry its bits unchanged.
  Lanes tile[kLanes];
  for (int64_t row = 0; row < count; row += kLanes) {
    for (int64_t col = 0; col < head_dim; col += 2 * kLanes) {
      const int64_t cells = std::min(kLanes, (head_dim - col) / 2);
      for (int64_t i = 0; i < kLanes; ++i) {
        tile[i] = Lanes{};
        if (row + i < count) std::memcpy(&tile[i], rows + (row + i) * stride + col, cells * sizeof(float));
      }
      transpose_tile(tile);
      for (int64_t i = 0; i < cells; ++i)
        std::memcpy(target + ((col / 2 + i) * width + row) * 2, &tile[i], sizeof(Lanes));
    }
  }
}

// Stores two neighbouring tile rows as the B operand of a product over keys.
inline void store_rows(float* target, int64_t width, int64_t j, int64_t lane, Lanes first, Lanes second) {
  store(target + j * width + lane, first);
  store(target + (j + 1) * width + lane, second);
}

inline void store_rows(at::BFloat16* target, int64_t width, int64_t j, int64_t lane, Lanes first, Lanes second) {
  const BitLanes pairs = bfloat16_bits(first) | (bfloat16_bits(second) << 16);
  std::memcpy(target + j * width + lane * 2, &pairs, sizeof(pairs));
}

// Runs worker(next) on each thread; next() hands out 0 … items - 1 once each, then -1. Uneven items balance.
template <typename Worker>
inline void share_out(int64_t items, const Worker& worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < items ? item : -1;
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(next); });
}

}  // namespace stream_lens
