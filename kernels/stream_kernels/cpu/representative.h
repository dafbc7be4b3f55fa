// What stands for a branch of key blocks while it competes: one function each, s.children into rows of s.logits.
//
// Definitions: stream_lens/blocks/branch_scores.py. A further representative is a function here and a line in
// `representative_logits`.
#pragma once

#include "search.h"

namespace stream_lens {

constexpr int64_t kGemmRows = 64;  // products of at most this many rows: few shapes for brgemm to compile

template <typename T>
int64_t real_keys(const Search<T>& f, const SearchScratch<T>& s, Branch branch) {
  const int32_t* counts = f.tables.counts + s.batch * (f.n.k_blocks + 1);
  return counts[branch.stop] - counts[branch.start];
}

// The mean over each child's real keys, and their variance where asked for, into [children, padded to whole vectors][d].
// Differences are taken in float64: keys may lie far from zero.
template <typename T>
void pool_children(const Search<T>& f, const SearchScratch<T>& s, float* means, float* spread) {
  const int64_t d = f.n.head_dim, count = s.children.size();
  const int64_t table = (s.batch * f.n.kv_heads + s.kv_head) * (f.n.k_blocks + 1) * d;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t from = table + s.children[c].start * d, to = table + s.children[c].stop * d;
    const double *lower = f.tables.sums + from, *upper = f.tables.sums + to;
    const double share = 1.0 / std::max<int64_t>(real_keys(f, s, s.children[c]), 1);
    float* mean_of = means + c * d;
    if (!f.tables.squares) {
      for (int64_t x = 0; x < d; ++x) mean_of[x] = static_cast<float>((upper[x] - lower[x]) * share);
      continue;
    }
    const double *lower_square = f.tables.squares + from, *upper_square = f.tables.squares + to;
    float* spread_of = spread + c * d;
    for (int64_t x = 0; x < d; ++x) {
      const double mean = (upper[x] - lower[x]) * share;
      const double variance = (upper_square[x] - lower_square[x]) * share - mean * mean;
      mean_of[x] = static_cast<float>(mean);
      spread_of[x] = static_cast<float>(variance > 0 ? variance : 0);
    }
  }
  const int64_t padded = round_up(count, kLanes);
  std::fill(means + count * d, means + padded * d, 0.0f);
  if (f.tables.squares) std::fill(spread + count * d, spread + padded * d, 0.0f);
}

template <typename T>
void product_of_children(const Search<T>& f, SearchScratch<T>& s, const float* children, const Scratch& columns,
                         bool add) {
  const int64_t count = round_up(s.children.size(), kLanes), d = f.n.head_dim;
  for (int64_t first = 0; first < count; first += kGemmRows) {
    f.pooled(std::min(kGemmRows, count - first), s.width, d, children + first * d, d, columns.template as<float>(),
             s.width, s.logits_of(first), s.width, add);
  }
}

// "mean": the score of the mean key; "mean_var" adds half the variance of the scores under a diagonal covariance.
template <typename T>
void mean_logits(const Search<T>& f, SearchScratch<T>& s) {
  const int64_t count = s.children.size();
  float *means = s.keys.template as<float>(), *spread = s.spread.template as<float>();
  pool_children(f, s, means, spread);
  product_of_children(f, s, means, s.scaled_columns, false);
  if (f.rule.softcap > 0) {
    Rule cap = f.rule;
    cap.scale = 1;  // the rows are scaled already
    scale_and_cap(cap, s.logits.template as<float>(), count * s.width);
  }
  if (f.tables.squares) product_of_children(f, s, spread, s.square_columns, true);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t keys = real_keys(f, s, s.children[c]), last_key = s.children[c].stop * f.n.k_block - 1;
    const float mass = f.plan.reduce == Vote::max ? 0.0f : std::log(static_cast<float>(keys));
    float* logits = s.logits_of(c);
    for (int64_t lane = 0; lane < s.width; lane += kLanes) store(logits + lane, load(logits + lane) + mass);
    if (!f.hides()) continue;
    for (int64_t row = 0; row < s.rows; ++row) {
      if (keys <= 0 || last_key <= s.position[row] - f.rule.window) logits[row] = -kInf;
    }
  }
}

// "first", "centre", "last", "strided": all of a few keys, taken to stand for the branch's real keys in equal parts.
template <typename T, typename KeysOf>
void sampled_logits(const Search<T>& f, SearchScratch<T>& s, const KeysOf& keys_of) {
  const bool most = f.plan.reduce == Vote::max;
  for (int64_t c = 0; c < static_cast<int64_t>(s.children.size()); ++c) {
    const Keys keys = keys_of(s.children[c]);
    float* logits = s.logits_of(c);
    const Visibility seen = logits_of_keys(f, s, keys, most, logits);
    if (most || seen == Visibility::none) continue;
    const float of_branch = real_keys(f, s, s.children[c]);
    for (int64_t lane = 0; lane < s.width; lane += kLanes) {
      Lanes sampled = splat(keys.count);
      if (seen == Visibility::some) {
        sampled = Lanes{};
        for (int64_t j = 0; j < keys.count; ++j) {
          sampled += load(s.tile.template as<float>() + j * s.width + lane) > -kInf ? splat(1.0f) : Lanes{};
        }
        sampled = larger(sampled, splat(1.0f));
      }
      store(logits + lane, load(logits + lane) + log(of_branch / sampled));
    }
  }
}

template <typename T>
void representative_logits(const Search<T>& f, SearchScratch<T>& s) {
  const std::string& name = f.plan.representative;
  if (name == "mean" || name == "mean_var") return mean_logits(f, s);
  if (name == "first") return sampled_logits(f, s, [&](Branch x) { return keys_of_block(f, x.start); });
  if (name == "last") return sampled_logits(f, s, [&](Branch x) { return keys_of_block(f, x.stop - 1); });
  if (name == "centre") {
    return sampled_logits(f, s, [&](Branch x) { return keys_of_block(f, x.start + (x.stop - x.start) / 2); });
  }
  TORCH_CHECK(name == "strided", "the C++ search has no representative ", name);
  sampled_logits(f, s, [&](Branch x) { return Keys{x.start * f.n.k_block, x.stop - x.start, f.n.k_block}; });
}

}  // namespace stream_lens
