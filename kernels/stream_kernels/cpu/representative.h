// What stands for a branch of key blocks while it competes: one function each, s.children into rows of s.logits.
//
// Definitions: stream_lens/blocks/branch_scores.py. A further representative is a function here and a line in
// `representative_logits`.
#pragma once

#include "search.h"

namespace stream_lens {

template <typename T>
int64_t real_keys(const Search<T>& f, const SearchScratch<T>& s, Branch branch) {
  const int32_t* counts = f.tables.counts + s.batch * (f.n.k_blocks + 1);
  return counts[branch.stop] - counts[branch.start];
}

// The mean over a branch's real keys into row [0, d), and their variance where asked for into row [d, 2d).
// Differences are taken in float64: keys may lie far from zero.
inline void pool_branch(const Tables& tables, const Sizes& n, int64_t batch, int64_t kv_head, Branch branch, float* row) {
  const int64_t d = n.head_dim, table = (batch * n.kv_heads + kv_head) * (n.k_blocks + 1);
  const int64_t from = (table + branch.start) * d, to = (table + branch.stop) * d;
  const int32_t* counts = tables.counts + batch * (n.k_blocks + 1);
  const double *lower = tables.sums + from, *upper = tables.sums + to;
  const double share = 1.0 / std::max(counts[branch.stop] - counts[branch.start], 1);
  if (!tables.squares) {
    for (int64_t x = 0; x < d; ++x) row[x] = static_cast<float>((upper[x] - lower[x]) * share);
    return;
  }
  const double *lower_square = tables.squares + from, *upper_square = tables.squares + to;
  for (int64_t x = 0; x < d; ++x) {
    const double mean = (upper[x] - lower[x]) * share;
    const double variance = (upper_square[x] - lower_square[x]) * share - mean * mean;
    row[x] = static_cast<float>(mean);
    row[d + x] = static_cast<float>(variance > 0 ? variance : 0);
  }
}

// The rows of every branch of at most kPooledBlocks blocks, which the last rounds ask for again and again:
// [batch, kv_head, k_blocks, blocks of the branch, row].
inline Scratch pool_short_branches(const Tables& tables, const Sizes& n) {
  const int64_t row = tables.row(n);
  Scratch pooled = scratch<float>(n.batch * n.kv_heads * n.k_blocks * kPooledBlocks * row);
  at::parallel_for(0, n.batch * n.kv_heads * n.k_blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t bg = item / n.k_blocks, start = item % n.k_blocks;
      for (int64_t size = 1; size <= std::min(kPooledBlocks, n.k_blocks - start); ++size) {
        pool_branch(tables, n, bg / n.kv_heads, bg % n.kv_heads, {start, start + size},
                    pooled.as<float>() + (item * kPooledBlocks + size - 1) * row);
      }
    }
  });
  return pooled;
}

// The rows of children [first, first + count), into [count, padded to whole vectors][row].
template <typename T>
void pool_children(const Search<T>& f, const SearchScratch<T>& s, int64_t first, int64_t count, float* rows) {
  const int64_t size = f.tables.row(f.n), table = (s.batch * f.n.kv_heads + s.kv_head) * f.n.k_blocks;
  for (int64_t c = 0; c < count; ++c) {
    const Branch child = s.children[first + c];
    const int64_t blocks = child.stop - child.start;
    if (f.tables.short_branches && blocks <= kPooledBlocks) {
      const float* from = f.tables.short_branches + ((table + child.start) * kPooledBlocks + blocks - 1) * size;
      std::copy_n(from, size, rows + c * size);
    } else {
      pool_branch(f.tables, f.n, s.batch, s.kv_head, child, rows + c * size);
    }
  }
  std::fill(rows + count * size, rows + round_up(count, kLanes) * size, 0.0f);
}

// "mean": the score of the mean key; "mean_var" adds half the variance of the scores under a diagonal covariance.
template <typename T>
void mean_logits(const Search<T>& f, SearchScratch<T>& s) {
  const int64_t children = s.children.size(), d = f.n.head_dim, stride = f.tables.row(f.n);
  float *rows = s.pooled.template as<float>(), *columns = s.scaled_columns.template as<float>();
  Rule cap = f.rule;
  cap.scale = 1;  // the rows are scaled already
  for (int64_t first = 0; first < children; first += kGemmRows) {
    const int64_t count = std::min(kGemmRows, children - first), padded = round_up(count, kLanes);
    float* logits = s.logits_of(first);
    pool_children(f, s, first, count, rows);
    f.pooled(padded, s.width, d, rows, stride, columns, s.width, logits, s.width, false);
    if (cap.softcap > 0) scale_and_cap(cap, logits, count * s.width);
    if (f.tables.squares) {
      f.pooled(padded, s.width, d, rows + d, stride, columns + d * s.width, s.width, logits, s.width, true);
    }
  }
  for (int64_t c = 0; c < children; c += kLanes) {
    Lanes keys{};
    for (int64_t j = 0; j < kLanes && c + j < children; ++j) keys[j] = real_keys(f, s, s.children[c + j]);
    const Lanes mass = f.plan.reduce == Vote::max ? Lanes{} : log(keys);
    for (int64_t j = 0; j < kLanes && c + j < children; ++j) {
      float* logits = s.logits_of(c + j);
      for (int64_t lane = 0; lane < s.width; lane += kLanes) store(logits + lane, load(logits + lane) + mass[j]);
    }
  }
  for (int64_t c = 0; f.hides() && c < children; ++c) {
    const int64_t last_key = s.children[c].stop * f.n.k_block - 1;
    const bool empty = real_keys(f, s, s.children[c]) <= 0;
    for (int64_t row = 0; row < s.rows; ++row) {
      if (empty || last_key <= s.position[row] - f.rule.window) s.logits_of(c)[row] = -kInf;
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
