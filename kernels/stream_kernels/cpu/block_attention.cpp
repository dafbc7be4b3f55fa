// Block-sparse attention, forward: out, logsumexp and block mass in one pass. Formulas: README.md.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "operator.h"
#include "tile.h"

namespace stream_lens {
namespace {

constexpr int64_t kChunkScores = 65536;  // scores held at once: 256 KiB, to stay in the second-level cache

template <typename T>
struct Forward {
  const Sizes& n;
  const Rule& rule;
  Gemm<T> gemm;
  Rows<const T> query, key;
  const T* value_columns;  // kept value blocks as [d][value_stride]
  int64_t value_stride;
  const std::vector<int32_t>& packed_of;
  const int32_t* indices;
  const float* gate;   // null: all ones
  const float* sinks;  // null: none
  T* out;
  float *logsumexp, *mass;
};

// One thread's scratch. `width` is the query block's rows rounded up to whole vectors (fewer in a ragged last block);
// `tile_rows` is k_block rounded up to pairs.
template <typename T>
struct ForwardScratch {
  int64_t width, tile_rows, chunk, tile_size;
  Scratch query_columns, scores, weights, out_columns, row_sums, row_max, chunk_max, normaliser;
  std::vector<int64_t> kept;

  void fit(int64_t rows) {
    width = round_up(rows, kLanes);
    tile_size = width * tile_rows;
  }

  explicit ForwardScratch(const Sizes& n)
      : width(round_up(n.q_block, kLanes)),
        tile_rows(round_up(n.k_block, 2)),
        chunk(std::clamp<int64_t>(kChunkScores / (width * tile_rows), 1, std::max<int64_t>(n.slots, 1))),
        tile_size(width * tile_rows),
        query_columns(scratch<T>(n.head_dim * width)),
        scores(scratch<float>(chunk * tile_size)),
        weights(scratch<T>(tile_size)),
        out_columns(scratch<float>(n.head_dim * width)),
        row_sums(scratch<float>(n.slots * width)),
        row_max(scratch<float>(width)),
        chunk_max(scratch<float>((n.slots + chunk - 1) / chunk * width)),
        normaliser(scratch<float>(width)) {}
};

// Scores of one chunk's tiles into s.scores, and their running maximum per query row into s.row_max.
template <typename T>
void score_chunk(const Forward<T>& f, ForwardScratch<T>& s, int64_t b, int64_t h, int64_t i, int64_t first,
                 int64_t last, bool capped, float scale) {
  const Sizes& n = f.n;
  const int64_t first_row = f.rule.offset + i * n.q_block, rows = n.rows(i);
  const int64_t kv = h / n.groups();
  const bool* key_mask = f.rule.key_mask ? f.rule.key_mask + b * n.key_len : nullptr;
  const int32_t* index = f.indices + ((b * n.heads + h) * n.q_blocks + i) * n.slots;
  float* row_max = s.row_max.template as<float>();
  for (int64_t c = first; c < last; ++c) {
    const int64_t block = index[s.kept[c]], first_key = block * n.k_block, keys = n.keys(block);
    float* tile = s.scores.template as<float>() + (c - first) * s.tile_size;
    f.gemm(keys, s.width, n.head_dim, f.key.at(b, kv, first_key), f.key.stride, s.query_columns.template as<T>(),
           s.width, tile, s.width, false);
    if (capped) scale_and_cap(f.rule, tile, keys * s.width);
    if (tile_visibility(f.rule, key_mask, first_row, rows, first_key, keys) == Visibility::some) {
      mask_tile(f.rule, key_mask, tile, s.width, first_row, first_key, keys);
    }
    for (int64_t lane = 0; lane < s.width; lane += kLanes) {
      Lanes most = splat(-kInf), also = most;
      int64_t j = 0;
      for (; j + 1 < keys; j += 2) {
        most = larger(load(tile + j * s.width + lane), most);
        also = larger(load(tile + (j + 1) * s.width + lane), also);
      }
      if (j < keys) most = larger(load(tile + j * s.width + lane), most);
      store(row_max + lane, larger(larger(most, also) * scale, load(row_max + lane)));
    }
  }
}

// exp(score - max) of one tile: its sums per row into `row_sums`, gated into `weights` as a B operand.
template <typename T>
inline void weigh_tile(const float* tile, int64_t width, int64_t keys, int64_t tile_rows, const float* row_max,
                       float scale, float gate, float* row_sums, T* weights) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const Lanes most = load(row_max + lane);
    const Lanes shift = most == -kInf ? Lanes{} : most;
    Lanes total{}, also{};
    int64_t j = 0;
    for (; j + 1 < keys; j += 2) {
      const Lanes first = exp(load(tile + j * width + lane) * scale - shift);
      const Lanes second = exp(load(tile + (j + 1) * width + lane) * scale - shift);
      total += first;
      also += second;
      store_rows(weights, width, j, lane, first * gate, second * gate);
    }
    if (j < keys) {
      const Lanes first = exp(load(tile + j * width + lane) * scale - shift);
      total += first;
      store_rows(weights, width, j, lane, first * gate, Lanes{});
      j += 2;
    }
    for (; j < tile_rows; j += 2) store_rows(weights, width, j, lane, Lanes{}, Lanes{});
    store(row_sums + lane, total + also);
  }
}

// The running maximum grew from `before` to row_max: brings the normaliser and the output to the new one.
template <typename T>
inline void rescale(ForwardScratch<T>& s, const float* before, int64_t head_dim, bool has_out) {
  float* normaliser = s.normaliser.template as<float>();
  float* out = s.out_columns.template as<float>();
  for (int64_t lane = 0; lane < s.width; lane += kLanes) {
    const Lanes most = load(s.row_max.template as<float>() + lane);
    const Lanes factor = exp(load(before + lane) - (most == -kInf ? Lanes{} : most));
    store(normaliser + lane, load(normaliser + lane) * factor);
    if (!has_out) continue;
    for (int64_t c = 0; c < head_dim; ++c) {
      store(out + c * s.width + lane, load(out + c * s.width + lane) * factor);
    }
  }
}

template <typename T>
void finish(const Forward<T>& f, ForwardScratch<T>& s, int64_t bh, int64_t i) {
  const Sizes& n = f.n;
  const int64_t rows = n.rows(i);
  float* out = s.out_columns.template as<float>();
  const float* row_max = s.row_max.template as<float>();
  float* inverse = s.normaliser.template as<float>();
  for (int64_t row = 0; row < s.width; ++row) {
    const float total = inverse[row];
    if (row < rows) f.logsumexp[bh * n.query_len + i * n.q_block + row] = row_max[row] + std::log(total);
    inverse[row] = row < rows && total > 0 ? 1 / total : 0;
  }
  float* mass = f.mass + (bh * n.q_blocks + i) * n.slots;
  for (int64_t c = 0; c < static_cast<int64_t>(s.kept.size()); ++c) {
    Lanes total{};
    for (int64_t lane = 0; lane < s.width; lane += kLanes) {
      const Lanes most = load(row_max + lane), inverted = load(inverse + lane);
      const Lanes then = load(s.chunk_max.template as<float>() + c / s.chunk * s.width + lane);
      const Lanes factor = exp(then - (most == -kInf ? Lanes{} : most)) * inverted;
      total += load(s.row_sums.template as<float>() + c * s.width + lane) * factor;
    }
    mass[s.kept[c]] = sum(total);
  }
  for (int64_t c = 0; c < n.head_dim; ++c) {
    for (int64_t lane = 0; lane < s.width; lane += kLanes) {
      const Lanes value = s.kept.empty() ? Lanes{} : load(out + c * s.width + lane) * load(inverse + lane);
      store(out + c * s.width + lane, value);
    }
  }
  transpose_from_padded(out, s.width, rows, n.head_dim, f.out + (bh * n.query_len + i * n.q_block) * n.head_dim,
                        n.head_dim);
}

template <typename T>
void attend(const Forward<T>& f, ForwardScratch<T>& s, int64_t b, int64_t h, int64_t i) {
  const Sizes& n = f.n;
  const int64_t bh = b * n.heads + h, rows = n.rows(i), first_row = f.rule.offset + i * n.q_block;
  const int32_t* index = f.indices + (bh * n.q_blocks + i) * n.slots;
  const bool* key_mask = f.rule.key_mask ? f.rule.key_mask + b * n.key_len : nullptr;
  s.fit(rows);
  s.kept.clear();
  for (int64_t slot = 0; slot < n.slots; ++slot) {
    const int64_t block = index[slot];
    if (block < 0) continue;
    const auto seen = tile_visibility(f.rule, key_mask, first_row, rows, block * n.k_block, n.keys(block));
    if (seen != Visibility::none) s.kept.push_back(slot);
  }
  float *row_max = s.row_max.template as<float>(), *normaliser = s.normaliser.template as<float>();
  std::fill_n(row_max, s.width, f.sinks ? f.sinks[h] : -kInf);
  std::fill_n(normaliser, s.width, f.sinks ? 1.0f : 0.0f);
  pack_columns(f.query.at(b, h, i * n.q_block), f.query.stride, rows, n.head_dim, s.query_columns.template as<T>(),
               s.width);

  const bool capped = f.rule.softcap > 0 || f.rule.scale <= 0;
  const float scale = capped ? 1.0f : f.rule.scale;
  const int64_t count = s.kept.size(), value_size = n.head_dim * f.value_stride;
  const int32_t* packed_of = f.packed_of.data() + (b * n.kv_heads + h / n.groups()) * n.k_blocks;
  std::vector<float> before(s.width);
  for (int64_t first = 0; first < count; first += s.chunk) {
    const int64_t last = std::min(count, first + s.chunk);
    std::copy_n(row_max, s.width, before.data());
    score_chunk(f, s, b, h, i, first, last, capped, scale);
    rescale(s, before.data(), n.head_dim, first > 0);
    std::copy_n(row_max, s.width, s.chunk_max.template as<float>() + first / s.chunk * s.width);
    for (int64_t c = first; c < last; ++c) {
      const int64_t slot = s.kept[c], block = index[slot];
      float* row_sums = s.row_sums.template as<float>() + c * s.width;
      weigh_tile(s.scores.template as<float>() + (c - first) * s.tile_size, s.width, n.keys(block), s.tile_rows,
                 row_max, scale, f.gate ? f.gate[(bh * n.q_blocks + i) * n.slots + slot] : 1.0f, row_sums,
                 s.weights.template as<T>());
      f.gemm(n.head_dim, s.width, s.tile_rows, f.value_columns + packed_of[block] * value_size, f.value_stride,
             s.weights.template as<T>(), s.width, s.out_columns.template as<float>(), s.width, c > 0);
      for (int64_t lane = 0; lane < s.width; lane += kLanes) {
        store(normaliser + lane, load(normaliser + lane) + load(row_sums + lane));
      }
    }
  }
  finish(f, s, bh, i);
}

template <typename T>
void run_forward(const Operands& x, at::Tensor& out, at::Tensor& logsumexp, at::Tensor& mass) {
  const Sizes& n = x.sizes;
  int64_t count = 0;
  const std::vector<int32_t> packed_of = number_kept_blocks(x.indices, n, &count);
  const Scratch values = pack_transposed<T>(x.v, n, packed_of, count);
  const Forward<T> f{n,
                     x.rule,
                     Gemm<T>{has_brgemm<T>()},
                     Rows<const T>(x.q),
                     Rows<const T>(x.k),
                     values.as<T>(),
                     round_up(n.k_block, kLanes),
                     packed_of,
                     x.indices.const_data_ptr<int32_t>(),
                     x.gate_data(),
                     x.sinks_data(),
                     out.data_ptr<T>(),
                     logsumexp.data_ptr<float>(),
                     mass.data_ptr<float>()};
  share_out(n.batch * n.heads * n.q_blocks, [&](const auto& next) {
    ForwardScratch<T> s(n);
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t bh = item / n.q_blocks;
      attend(f, s, bh / n.heads, bh % n.heads, item % n.q_blocks);
    }
    f.gemm.release();
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> block_attention_forward(STREAM_LENS_OPERANDS) {
  const Operands x =
      make_operands(q, k, v, indices, q_block, k_block, scale, offset, window, softcap, key_mask, sinks, gate);
  const Sizes& n = x.sizes;
  const auto floats = x.q.options().dtype(at::kFloat);
  at::Tensor out = at::empty({n.batch, n.heads, n.query_len, n.head_dim}, x.q.options());
  prefer_huge_pages(out.data_ptr(), out.nbytes());
  at::Tensor logsumexp = at::empty({n.batch, n.heads, n.query_len}, floats);
  at::Tensor mass = at::zeros({n.batch, n.heads, n.q_blocks, n.slots}, floats);
  if (x.q.scalar_type() == at::kFloat) {
    run_forward<float>(x, out, logsumexp, mass);
  } else {
    run_forward<at::BFloat16>(x, out, logsumexp, mass);
  }
  return {out.to(q.scalar_type()), logsumexp, mass};
}

TORCH_LIBRARY_IMPL(stream_lens_cpu, CPU, m) {
  m.impl("block_attention_forward", block_attention_forward);
}

}  // namespace stream_lens
