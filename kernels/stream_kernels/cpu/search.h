// The pieces of the block search on one query block of one head: rows, scores of keys, votes, and the best of them.
//
// As in tile.h, a tile is transposed: [keys or branches][query rows], rows padded to whole vectors. Only rows that vote
// take part (query_stride, padding). Lanes past them hold anything, and are left out where rows become one number.
#pragma once

#include <cmath>
#include <string>

#include "tile.h"

namespace stream_lens {

constexpr int64_t kPooledBlocks = 4;  // longest branch whose pooled keys are kept, not made anew
constexpr int64_t kGemmRows = 64;     // products of at most this many rows: few shapes for brgemm to compile

enum class Vote { max, mass, peak };

// How the search runs: stream_lens.blocks.config says what each means.
struct Plan {
  std::string representative;
  Vote reduce, rank;
  int64_t oversample, query_stride, rounds;

  bool needs_forced() const { return reduce != Vote::max || (oversample > 1 && rank != Vote::max); }
};

struct Branch {  // key blocks [start, stop)
  int64_t start, stop;
};

struct Keys {  // positions first, first + step, …
  int64_t first, step, count;

  int64_t last() const { return first + (count - 1) * step; }
};

// Per kv head and batch row, over blocks: prefix sums of keys (and their squares), and of how many are real.
struct Tables {
  const double *sums, *squares;  // [batch, kv_head, k_blocks + 1, d]; squares is null unless "mean_var"
  const int32_t* counts;         // [batch, k_blocks + 1]
  const float* short_branches;   // see pool_short_branches; null where few query blocks would use it

  int64_t row(const Sizes& n) const { return squares ? 2 * n.head_dim : n.head_dim; }
};

template <typename T>
struct Search {
  const Sizes& n;
  const Rule& rule;
  Rule exact_rule;  // what is left to do to the products of exact keys
  Plan plan;
  Tables tables;
  Gemm<T> exact;
  Gemm<float> pooled;
  Rows<const T> query, key;
  const int64_t* ranges;  // [4, batch, q_blocks]: first, sink_stop, local_start, stop
  const int64_t* free;    // [batch, head, q_blocks]
  int32_t* out;           // [batch, head, q_blocks, slots]

  // Whether anything but causality may hide a key.
  bool hides() const { return rule.key_mask || rule.window < n.key_len; }
};

// One thread's state: the query block at hand (batch row, heads, voting rows) and scratch memory.
template <typename T>
struct SearchScratch {
  int64_t capacity, batch, kv_head, rows, width;
  const bool* key_mask;
  std::vector<int32_t> position;  // of each voting row, -1 in the padding
  std::vector<Branch> branches, children;
  std::vector<float> score;
  std::vector<uint32_t> order;
  std::vector<uint8_t> seen, survives;
  Scratch row_copy, scaled_copy, columns, scaled_columns, gathered, pooled, tile, logits, forced;

  explicit SearchScratch(const Search<T>& f)
      : capacity(round_up(2 * f.plan.oversample * f.n.slots + f.n.slots, kLanes)),
        score(capacity),
        row_copy(scratch<T>(f.n.q_block * f.n.head_dim)),
        scaled_copy(scratch<float>(f.n.q_block * f.n.head_dim)),
        columns(scratch<T>(f.n.head_dim * padded(f))),
        scaled_columns(scratch<float>(2 * f.n.head_dim * padded(f))),
        gathered(scratch<T>(f.n.k_block * f.n.head_dim)),
        pooled(scratch<float>(f.tables.sums ? kGemmRows * f.tables.row(f.n) : 0)),
        tile(scratch<float>(f.n.k_block * padded(f))),
        logits(scratch<float>(capacity * padded(f))),
        forced(scratch<float>(padded(f))) {}

  static int64_t padded(const Search<T>& f) { return round_up((f.n.q_block - 1) / f.plan.query_stride + 1, kLanes); }
  // What exact keys are multiplied with: float rows are scaled beforehand.
  const T* exact_rows() const {
    if constexpr (is_paired<T>) return row_copy.template as<T>();
    return scaled_copy.template as<T>();
  }
  float* logits_of(int64_t branch) const { return logits.template as<float>() + branch * width; }
};

// The voting rows of query block i, as B operands; the scaled ones with half their squares below, for the variances.
template <typename T>
void take_rows(const Search<T>& f, SearchScratch<T>& s, int64_t b, int64_t h, int64_t i) {
  const Sizes& n = f.n;
  s.batch = b;
  s.kv_head = h / n.groups();
  s.key_mask = f.rule.key_mask ? f.rule.key_mask + b * n.key_len : nullptr;
  s.position.clear();
  T* rows = s.row_copy.template as<T>();
  float* scaled = s.scaled_copy.template as<float>();
  for (int64_t r = 0; r < n.rows(i); r += f.plan.query_stride) {
    const int64_t row = i * n.q_block + r, at = s.position.size() * n.head_dim;
    if (s.key_mask && !s.key_mask[f.rule.offset + row]) continue;
    const T* from = f.query.at(b, h, row);
    std::copy_n(from, n.head_dim, rows + at);
    for (int64_t c = 0; c < n.head_dim; ++c) scaled[at + c] = f.rule.scale * static_cast<float>(from[c]);
    s.position.push_back(f.rule.offset + row);
  }
  s.rows = s.position.size();
  s.width = round_up(s.rows, kLanes);
  s.position.resize(s.width, -1);
  float* columns = s.scaled_columns.template as<float>();
  pack_columns(scaled, n.head_dim, s.rows, n.head_dim, columns, s.width);
  if constexpr (is_paired<T>) {
    pack_columns(rows, n.head_dim, s.rows, n.head_dim, s.columns.template as<T>(), s.width);
  }
  if (!f.tables.squares) return;
  const int64_t size = n.head_dim * s.width;
  for (int64_t c = 0; c < size; ++c) columns[size + c] = 0.5f * columns[c] * columns[c];
}

template <typename T>
Visibility visibility(const Search<T>& f, const SearchScratch<T>& s, Keys keys) {
  const int64_t first_row = s.position[0], last_row = s.position[s.rows - 1];
  if (keys.first > last_row || keys.last() <= first_row - f.rule.window) return Visibility::none;
  bool whole = keys.last() <= first_row && keys.first > last_row - f.rule.window;
  if (s.key_mask) {
    for (int64_t j = 0; j < keys.count; ++j) whole = whole && s.key_mask[keys.first + j * keys.step];
  }
  return whole ? Visibility::all : Visibility::some;
}

// Scores of some keys into s.tile, [keys][width]; -inf where a row does not see the key.
template <typename T>
Visibility score_keys(const Search<T>& f, SearchScratch<T>& s, Keys keys) {
  const Visibility seen = visibility(f, s, keys);
  if (seen == Visibility::none) return seen;
  const T* rows = f.key.at(s.batch, s.kv_head, keys.first);
  int64_t stride = f.key.stride;
  if (keys.step != 1) {
    T* gathered = s.gathered.template as<T>();
    for (int64_t j = 0; j < keys.count; ++j) {
      std::copy_n(rows + j * keys.step * stride, f.n.head_dim, gathered + j * f.n.head_dim);
    }
    rows = gathered;
    stride = f.n.head_dim;
  }
  float* tile = s.tile.template as<float>();
  const T* columns = nullptr;
  if constexpr (is_paired<T>) {
    columns = s.columns.template as<T>();
  } else {
    columns = s.scaled_columns.template as<float>();
  }
  f.exact(keys.count, s.width, f.n.head_dim, rows, stride, columns, s.width, tile, s.width, false);
  if (is_paired<T> || f.exact_rule.softcap > 0) scale_and_cap(f.exact_rule, tile, keys.count * s.width);
  if (seen == Visibility::all) return seen;
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j * keys.step;
    const bool real = !s.key_mask || s.key_mask[key];
    const int32_t from = real ? key : std::numeric_limits<int32_t>::max();
    const int32_t until = std::min<int64_t>(key + f.rule.window, std::numeric_limits<int32_t>::max());
    for (int64_t lane = 0; lane < s.width; lane += kLanes) {
      IntLanes position;
      std::memcpy(&position, s.position.data() + lane, sizeof(position));
      Lanes score = load(tile + j * s.width + lane);
      score = position >= from ? score : splat(-kInf);
      store(tile + j * s.width + lane, position < until ? score : splat(-kInf));
    }
  }
  return seen;
}

inline Lanes finite_or_zero(Lanes most) {
  return most == -kInf ? Lanes{} : most;
}

inline Lanes column_max(const float* tile, int64_t width, int64_t count) {
  Lanes most = splat(-kInf), also = most;
  int64_t j = 0;
  for (; j + 1 < count; j += 2) {
    most = larger(load(tile + j * width), most);
    also = larger(load(tile + (j + 1) * width), also);
  }
  return larger(j < count ? larger(load(tile + j * width), most) : most, also);
}

inline Lanes column_logsumexp(const float* tile, int64_t width, int64_t count) {
  const Lanes shift = finite_or_zero(column_max(tile, width, count));
  Lanes total{};
  for (int64_t j = 0; j < count; ++j) total += exp(load(tile + j * width) - shift);
  return log(total) + shift;
}

// Each row's maximum (or logsumexp) over some keys, into target [width].
template <typename T>
Visibility logits_of_keys(const Search<T>& f, SearchScratch<T>& s, Keys keys, bool most, float* target) {
  const Visibility seen = score_keys(f, s, keys);
  if (seen == Visibility::none) std::fill_n(target, s.width, -kInf);
  for (int64_t lane = 0; seen != Visibility::none && lane < s.width; lane += kLanes) {
    const float* tile = s.tile.template as<float>() + lane;
    store(target + lane, most ? column_max(tile, s.width, keys.count) : column_logsumexp(tile, s.width, keys.count));
  }
  return seen;
}

template <typename T>
Keys keys_of_block(const Search<T>& f, int64_t block) {
  return {block * f.n.k_block, 1, f.n.keys(block)};
}

// s.logits, [count][width], become s.score, one number a branch; -inf where no row sees it.
template <typename T>
void vote(const Search<T>& f, SearchScratch<T>& s, Vote how, int64_t count) {
  float* logits = s.logits.template as<float>();
  s.seen.assign(count, true);
  for (int64_t c = 0; f.hides() && c < count; ++c) {
    const float* row = s.logits_of(c);
    s.seen[c] = std::any_of(row, row + s.rows, [](float x) { return x > -kInf; });
  }
  for (int64_t lane = 0; how != Vote::max && lane < s.width; lane += kLanes) {
    const Lanes forced = load(s.forced.template as<float>() + lane);
    const Lanes shift = finite_or_zero(larger(forced, column_max(logits + lane, s.width, count)));
    Lanes total = exp(forced - shift);
    for (int64_t c = 0; c < count; ++c) {
      const Lanes weight = exp(load(s.logits_of(c) + lane) - shift);
      store(s.logits_of(c) + lane, weight);
      total += weight;
    }
    const Lanes inverse = total > 0.0f ? 1.0f / total : Lanes{};
    for (int64_t c = 0; c < count; ++c) store(s.logits_of(c) + lane, load(s.logits_of(c) + lane) * inverse);
  }
  const bool add = how == Vote::mass;
  const Lanes nothing = splat(add ? 0.0f : -kInf);
  for (int64_t first = 0; first < count; first += kLanes) {
    Lanes part[kLanes];
    for (int64_t c = 0; c < kLanes; ++c) {
      part[c] = nothing;
      for (int64_t lane = 0; first + c < count && lane < s.width; lane += kLanes) {
        const Lanes there = iota() < static_cast<float>(s.rows - lane) ? load(s.logits_of(first + c) + lane) : nothing;
        part[c] = add ? part[c] + there : larger(part[c], there);
      }
    }
    store(s.score.data() + first, fold_rows(part, [&](Lanes a, Lanes b) { return add ? a + b : larger(a, b); }));
  }
  for (int64_t c = 0; c < count; ++c) {
    if (!s.seen[c]) s.score[c] = -kInf;
    if (std::isnan(s.score[c])) s.score[c] = kInf;  // as torch sorts it
  }
}

// Floats as unsigned numbers in the same order.
inline BitLanes ordered_bits(Lanes x) {
  const BitLanes bits = bits_as<BitLanes>(x + 0.0f);  // -0 becomes 0
  return bits >= 0x80000000u ? ~bits : bits | 0x80000000u;
}

// s.survives of the `keep` best scores; ties go to the lower index, -inf is never kept. The lowest score that may stay
// is built bit by bit from counts, a vector at a time: half the time of nth_element, which mispredicts every branch.
template <typename T>
void keep_best(SearchScratch<T>& s, int64_t count, int64_t keep) {
  const int64_t padded = round_up(count, kLanes);
  std::fill(s.score.begin() + count, s.score.begin() + padded, -kInf);
  s.order.resize(padded);
  for (int64_t c = 0; c < padded; c += kLanes) {
    const BitLanes order = ordered_bits(load(s.score.data() + c));
    std::memcpy(s.order.data() + c, &order, sizeof(order));
  }
  const auto reach = [&](uint32_t bar) {
    IntLanes total{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      BitLanes order;
      std::memcpy(&order, s.order.data() + c, sizeof(order));
      total -= order >= bar;
    }
    int64_t sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += total[i];
    return sum;
  };
  const uint32_t nothing = ordered_bits(splat(-kInf))[0];
  uint32_t bar = nothing + 1;  // a full house: whatever is seen
  if (keep < count && keep > 0) {
    bar = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      const int64_t reached = reach(bar | bit);
      if (reached >= keep) bar |= bit;
      if (reached == keep) break;
    }
  }
  int64_t tied_room = keep - reach(bar + 1);
  s.survives.resize(count);
  for (int64_t c = 0; c < count; ++c) {
    const bool tied = s.order[c] == bar && tied_room > 0;
    tied_room -= tied;
    s.survives[c] = keep > 0 && s.order[c] > nothing && (s.order[c] > bar || tied);
  }
}

}  // namespace stream_lens
