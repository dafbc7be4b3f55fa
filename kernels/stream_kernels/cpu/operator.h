// The arguments that the block attention operators share, checked and made ready.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "tile.h"

// Must match the schemas in block_attention.py.
#define STREAM_LENS_OPERANDS                                                                                       \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &indices, int64_t q_block,       \
      int64_t k_block, double scale, int64_t offset, std::optional<int64_t> window, std::optional<double> softcap, \
      const std::optional<at::Tensor>&key_mask, const std::optional<at::Tensor>&sinks,                             \
      const std::optional<at::Tensor>&gate

namespace stream_lens {

struct Operands {
  at::Tensor q, k, v, indices, key_mask, sinks, gate;
  Sizes sizes;
  Rule rule;

  const float* gate_data() const { return gate.defined() ? gate.const_data_ptr<float>() : nullptr; }
  const float* sinks_data() const { return sinks.defined() ? sinks.const_data_ptr<float>() : nullptr; }
};

inline at::Tensor contiguous_as(const std::optional<at::Tensor>& x, at::ScalarType dtype) {
  return x ? x->to(dtype).contiguous() : at::Tensor();
}

// bfloat16 products need brgemm and an even head dimension; without, the same kernels run in float32.
inline at::ScalarType compute_dtype(const at::Tensor& q) {
  const bool half = q.scalar_type() == at::kBFloat16 && q.size(3) % 2 == 0 && has_brgemm<at::BFloat16>();
  return half ? at::kBFloat16 : at::kFloat;
}

inline Sizes make_sizes(const at::Tensor& q, const at::Tensor& k, int64_t q_block, int64_t k_block, int64_t slots) {
  const int64_t query_len = q.size(2), key_len = k.size(2);
  return {q.size(0), q.size(1), k.size(1),
          query_len, key_len,   q.size(3),
          q_block,   k_block,   (query_len + q_block - 1) / q_block,
          (key_len + k_block - 1) / k_block, slots};
}

inline Rule make_rule(const Sizes& n, double scale, int64_t offset, std::optional<int64_t> window,
                      std::optional<double> softcap, const at::Tensor& key_mask) {
  return {static_cast<float>(scale), offset, window.value_or(n.key_len + n.query_len + offset),
          static_cast<float>(softcap.value_or(0)), key_mask.defined() ? key_mask.const_data_ptr<bool>() : nullptr};
}

inline Operands make_operands(STREAM_LENS_OPERANDS) {
  Operands x;
  const at::ScalarType dtype = compute_dtype(q);
  x.q = rows_contiguous(q.to(dtype));
  x.k = rows_contiguous(k.to(dtype));
  x.v = rows_contiguous(v.to(dtype));
  x.indices = indices.to(at::kInt).contiguous();
  x.key_mask = contiguous_as(key_mask, at::kBool);
  x.sinks = contiguous_as(sinks, at::kFloat);
  x.gate = contiguous_as(gate, at::kFloat);
  x.sizes = make_sizes(q, k, q_block, k_block, indices.size(3));
  x.rule = make_rule(x.sizes, scale, offset, window, softcap, x.key_mask);
  return x;
}

}  // namespace stream_lens
