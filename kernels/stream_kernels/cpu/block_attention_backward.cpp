// Block-sparse attention, backward: dq, dk, dv and dgate, recomputed from logsumexp. Formulas: README.md.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "operator.h"
#include "tile.h"

namespace stream_lens {
namespace {

constexpr int64_t kExtraBytes = int64_t{512} << 20;  // at most this much for partial dk and dv beside the first

template <typename T>
struct Backward {
  const Sizes& n;
  const Rule& rule;
  Gemm<T> gemm;
  Rows<const T> query, key, value, out, grad_out;
  const T* key_columns;  // kept key blocks as [d][key_stride]
  int64_t key_stride;
  const std::vector<int32_t>& packed_of;
  const int32_t* indices;
  const float* gate;  // null: all ones
  const float* logsumexp;
  T* dq;
  float *dk, *dv;  // [split, batch, kv_head, key, d]
  float* dgate;
};

// One thread's scratch for one query block. `*_columns` are B operands over d, `*_rows` over query rows.
template <typename T>
struct BackwardScratch {
  int64_t width, tile_rows;
  Scratch query_columns, grad_columns, query_rows, grad_rows;
  Scratch scores, grad_scores, weights, score_rows, score_columns, dq_columns, logsumexp, delta;

  explicit BackwardScratch(const Sizes& n)
      : width(round_up(n.q_block, kLanes)),
        tile_rows(round_up(n.k_block, 2)),
        query_columns(scratch<T>(n.head_dim * width)),
        grad_columns(scratch<T>(n.head_dim * width)),
        query_rows(scratch<T>(n.head_dim * width)),
        grad_rows(scratch<T>(n.head_dim * width)),
        scores(scratch<float>(tile_rows * width)),
        grad_scores(scratch<float>(tile_rows * width)),
        weights(scratch<T>(tile_rows * width)),
        score_rows(scratch<T>(tile_rows * width)),
        score_columns(scratch<T>(tile_rows * width)),
        dq_columns(scratch<float>(n.head_dim * width)),
        logsumexp(scratch<float>(width)),
        delta(scratch<float>(width)) {}
};

// Query rows as the B operand of a product over rows, zeros up to `width` rows.
inline void pack_rows(const float* rows, int64_t stride, int64_t count, int64_t head_dim, float* target,
                      int64_t width) {
  for (int64_t row = 0; row < width; ++row) {
    if (row < count)
      std::copy_n(rows + row * stride, head_dim, target + row * head_dim);
    else
      std::fill_n(target + row * head_dim, head_dim, 0.0f);
  }
}

inline void pack_rows(const at::BFloat16* rows, int64_t stride, int64_t count, int64_t head_dim, at::BFloat16* target,
                      int64_t width) {
  const at::BFloat16 zero(0.0f);
  for (int64_t row = 0; row < width; ++row) {
    at::BFloat16* to = target + row / 2 * head_dim * 2 + row % 2;
    for (int64_t c = 0; c < head_dim; ++c) to[c * 2] = row < count ? rows[row * stride + c] : zero;
  }
}

template <typename T>
inline float dot(const T* a, const T* b, int64_t count) {
  Lanes total{};
  for (int64_t c = 0; c < count; c += kLanes) total += load_first(a + c, count - c) * load_first(b + c, count - c);
  return sum(total);
}

// d score / d (scale · q·k) given the capped score: 1 - (score / softcap)^2.
inline Lanes cap_slope(const Rule& rule, Lanes capped) {
  const Lanes t = capped / rule.softcap;
  return 1.0f - t * t;
}

// From q·k and dO·v of one tile: gated probabilities, score gradients (as A and as B operand); returns dgate.
template <typename T>
float differentiate_tile(const Backward<T>& f, BackwardScratch<T>& s, int64_t keys, float gate) {
  const int64_t width = s.width;
  const float* scores = s.scores.template as<float>();
  const float* grads = s.grad_scores.template as<float>();
  T *weights = s.weights.template as<T>(), *score_rows = s.score_rows.template as<T>();
  T* score_columns = s.score_columns.template as<T>();
  const bool capped = f.rule.softcap > 0;
  Lanes dgate{};
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const Lanes logsumexp = load(s.logsumexp.template as<float>() + lane);
    const Lanes delta = load(s.delta.template as<float>() + lane);
    const auto step = [&](int64_t j) {
      if (j >= keys) return Lanes{};
      const Lanes score = load(scores + j * width + lane), grad = load(grads + j * width + lane);
      const Lanes p = exp(score - logsumexp);
      dgate += p * grad;
      Lanes slope = p * (grad * gate - delta) * f.rule.scale;
      if (capped) slope = p == 0 ? Lanes{} : slope * cap_slope(f.rule, score);
      store(weights + j * width + lane, p * gate);
      store(score_rows + j * width + lane, slope);
      return slope;
    };
    for (int64_t j = 0; j < s.tile_rows; j += 2) {
      const Lanes first = step(j), second = step(j + 1);
      store_rows(score_columns, width, j, lane, first, second);
    }
  }
  return sum(dgate);
}

// One query block of head h: its dq and dgate, and its share of dk and dv, added to [kv_head] of this split.
template <typename T>
void differentiate(const Backward<T>& f, BackwardScratch<T>& s, int64_t split, int64_t b, int64_t h, int64_t i) {
  const Sizes& n = f.n;
  const int64_t bh = b * n.heads + h, kv = h / n.groups(), row = i * n.q_block, rows = n.rows(i);
  const int64_t d = n.head_dim, first_row = f.rule.offset + row;
  const int32_t* index = f.indices + (bh * n.q_blocks + i) * n.slots;
  const bool* key_mask = f.rule.key_mask ? f.rule.key_mask + b * n.key_len : nullptr;
  s.width = round_up(rows, kLanes);
  pack_columns(f.query.at(b, h, row), f.query.stride, rows, d, s.query_columns.template as<T>(), s.width);
  pack_columns(f.grad_out.at(b, h, row), f.grad_out.stride, rows, d, s.grad_columns.template as<T>(), s.width);
  pack_rows(f.query.at(b, h, row), f.query.stride, rows, d, s.query_rows.template as<T>(), s.width);
  pack_rows(f.grad_out.at(b, h, row), f.grad_out.stride, rows, d, s.grad_rows.template as<T>(), s.width);
  for (int64_t r = 0; r < s.width; ++r) {
    const float logsumexp = r < rows ? f.logsumexp[bh * n.query_len + row + r] : kInf;
    s.logsumexp.template as<float>()[r] = logsumexp == -kInf ? kInf : logsumexp;  // exp(score - inf) = 0
    s.delta.template as<float>()[r] = r < rows ? dot(f.out.at(b, h, row + r), f.grad_out.at(b, h, row + r), d) : 0.0f;
  }
  float *scores = s.scores.template as<float>(), *grads = s.grad_scores.template as<float>();
  float* dq_columns = s.dq_columns.template as<float>();
  std::fill_n(dq_columns, d * s.width, 0.0f);
  for (int64_t slot = 0; slot < n.slots; ++slot) {
    const int64_t block = index[slot];
    if (block < 0) continue;
    const int64_t first_key = block * n.k_block, keys = n.keys(block);
    const Visibility seen = tile_visibility(f.rule, key_mask, first_row, rows, first_key, keys);
    if (seen == Visibility::none) continue;
    f.gemm(keys, s.width, d, f.key.at(b, kv, first_key), f.key.stride, s.query_columns.template as<T>(), s.width,
           scores, s.width, false);
    f.gemm(keys, s.width, d, f.value.at(b, kv, first_key), f.value.stride, s.grad_columns.template as<T>(), s.width,
           grads, s.width, false);
    scale_and_cap(f.rule, scores, keys * s.width);
    if (seen == Visibility::some) mask_tile(f.rule, key_mask, scores, s.width, first_row, first_key, keys);
    const int64_t at = (bh * n.q_blocks + i) * n.slots + slot;
    f.dgate[at] = differentiate_tile(f, s, keys, f.gate ? f.gate[at] : 1.0f);
    const int64_t target = (((split * n.batch + b) * n.kv_heads + kv) * n.key_len + first_key) * d;
    f.gemm(keys, d, s.width, s.weights.template as<T>(), s.width, s.grad_rows.template as<T>(), d, f.dv + target, d,
           true);
    f.gemm(keys, d, s.width, s.score_rows.template as<T>(), s.width, s.query_rows.template as<T>(), d, f.dk + target, d,
           true);
    const int64_t packed = f.packed_of[(b * n.kv_heads + kv) * n.k_blocks + block];
    f.gemm(d, s.width, s.tile_rows, f.key_columns + packed * d * f.key_stride, f.key_stride,
           s.score_columns.template as<T>(), s.width, dq_columns, s.width, true);
  }
  transpose_from_padded(dq_columns, s.width, rows, d, f.dq + (bh * n.query_len + row) * d, d);
}

// Query ranges that accumulate dk and dv apart, so that threads never write the same row: the fewest that share
// batch · kv_heads · splits items evenly among the threads (or are many), within kExtraBytes.
int64_t count_splits(const Sizes& n) {
  const int64_t heads = n.batch * n.kv_heads, threads = at::get_num_threads();
  const int64_t bytes = std::max<int64_t>(1, 2 * sizeof(float) * heads * n.key_len * n.head_dim);
  const int64_t most = std::max<int64_t>(1, std::min(n.q_blocks, 1 + kExtraBytes / bytes));
  int64_t splits = 1;
  while (splits < most && heads * splits % threads != 0 && heads * splits < 4 * threads) ++splits;
  return splits;
}

template <typename T>
void run_backward(const Operands& x, const at::Tensor& logsumexp, const at::Tensor& out, const at::Tensor& grad_out,
                  at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, at::Tensor& dgate) {
  const Sizes& n = x.sizes;
  int64_t count = 0;
  const std::vector<int32_t> packed_of = number_kept_blocks(x.indices, n, &count);
  const Scratch keys = pack_transposed<T>(x.k, n, packed_of, count);
  const Backward<T> f{n,
                      x.rule,
                      Gemm<T>{has_brgemm<T>()},
                      Rows<const T>(x.q),
                      Rows<const T>(x.k),
                      Rows<const T>(x.v),
                      Rows<const T>(out),
                      Rows<const T>(grad_out),
                      keys.as<T>(),
                      round_up(n.k_block, kLanes),
                      packed_of,
                      x.indices.const_data_ptr<int32_t>(),
                      x.gate_data(),
                      logsumexp.const_data_ptr<float>(),
                      dq.data_ptr<T>(),
                      dk.data_ptr<float>(),
                      dv.data_ptr<float>(),
                      dgate.data_ptr<float>()};
  const int64_t splits = dk.size(0), heads = n.batch * n.kv_heads;
  share_out(splits * heads, [&](const auto& next) {
    BackwardScratch<T> s(n);
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t split = item / heads, b = item % heads / n.kv_heads, kv = item % n.kv_heads;
      for (int64_t i = split * n.q_blocks / splits; i < (split + 1) * n.q_blocks / splits; ++i) {
        for (int64_t h = kv * n.groups(); h < (kv + 1) * n.groups(); ++h) differentiate(f, s, split, b, h, i);
      }
    }
    f.gemm.release();
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> block_attention_backward(STREAM_LENS_OPERANDS,
                                                                                    const at::Tensor& logsumexp,
                                                                                    const at::Tensor& out,
                                                                                    const at::Tensor& grad_out) {
  const Operands x =
      make_operands(q, k, v, indices, q_block, k_block, scale, offset, window, softcap, key_mask, sinks, gate);
  const Sizes& n = x.sizes;
  const auto floats = x.q.options().dtype(at::kFloat);
  const at::ScalarType dtype = x.q.scalar_type();
  const at::Tensor lse = logsumexp.to(at::kFloat).contiguous();
  const at::Tensor z = rows_contiguous(out.to(dtype)), dz = rows_contiguous(grad_out.to(dtype));
  at::Tensor dq = at::empty({n.batch, n.heads, n.query_len, n.head_dim}, x.q.options());
  at::Tensor dk = at::zeros({count_splits(n), n.batch, n.kv_heads, n.key_len, n.head_dim}, floats),
             dv = at::zeros_like(dk);
  at::Tensor dgate = at::zeros({n.batch, n.heads, n.q_blocks, n.slots}, floats);
  if (dtype == at::kFloat) {
    run_backward<float>(x, lse, z, dz, dq, dk, dv, dgate);
  } else {
    run_backward<at::BFloat16>(x, lse, z, dz, dq, dk, dv, dgate);
  }
  const auto joined = [&](const at::Tensor& parts) {
    return (parts.size(0) == 1 ? parts.select(0, 0) : parts.sum(0)).to(q.scalar_type());
  };
  return {dq.to(q.scalar_type()), joined(dk), joined(dv), dgate};
}

TORCH_LIBRARY_IMPL(stream_lens_cpu, CPU, m) {
  m.impl("block_attention_backward", block_attention_backward);
}

}  // namespace stream_lens
