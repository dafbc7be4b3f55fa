// The final ranking of the search: candidates of several query blocks, scored by all keys of their blocks.
//
// Query blocks taken together share candidates: a block of keys is fetched and transposed once for all that ask for it.
// Here keys lie along the vector, [rows][keys], not rows as elsewhere: few rows vote, and would leave lanes idle.
#pragma once

#include "search.h"

namespace stream_lens {

// One query block of one head between its rounds and its ranking.
struct Candidates {
  int64_t item, rows, width, next;
  std::vector<int32_t> position;
  std::vector<Branch> blocks;
  Scratch query, forced, logits;  // [rows][d], [width], [blocks][width]

  // The key block to be scored next; past every block when none is left.
  int32_t wanted() const {
    return next < static_cast<int64_t>(blocks.size()) ? blocks[next].start : std::numeric_limits<int32_t>::max();
  }
};

// What one thread has gathered, all of one batch row and kv head.
template <typename T>
struct Ranking {
  int64_t key_width, used = 0;
  std::vector<Candidates> all;
  std::vector<int32_t> wanted;
  std::vector<int32_t> until;  // of each key of the block at hand: the first row position that does not see it
  Scratch keys, tile;

  Ranking(const Search<T>& f, int64_t size)
      : key_width(round_up(f.n.k_block, kLanes)),
        until(key_width),
        keys(scratch<T>(f.n.head_dim * key_width)),
        tile(scratch<float>(f.n.q_block * key_width)) {
    const int64_t width = SearchScratch<T>::padded(f), most = most_candidates(f);
    for (int64_t i = 0; f.plan.oversample > 1 && i < size; ++i) {
      all.push_back({0, 0, 0, 0, {}, {}, scratch<T>(width * f.n.head_dim), scratch<float>(width),
                     scratch<float>(most * width)});
    }
  }

  static int64_t most_candidates(const Search<T>& f) {
    return std::min(f.plan.oversample * f.n.slots, f.n.k_blocks);
  }
  static int64_t bytes_each(const Search<T>& f) {
    return SearchScratch<T>::padded(f) * (f.n.head_dim * sizeof(T) + most_candidates(f) * sizeof(float));
  }
};

// Sets the query block that s holds aside; s is free for another one.
template <typename T>
void set_aside(const Search<T>& f, SearchScratch<T>& s, Ranking<T>& ranking, int64_t item) {
  Candidates& c = ranking.all[ranking.used++];
  c.item = item;
  c.rows = s.rows;
  c.width = s.width;
  c.next = 0;
  c.position.swap(s.position);
  c.blocks.swap(s.branches);
  std::copy_n(s.exact_rows(), s.rows * f.n.head_dim, c.query.template as<T>());
  std::copy_n(s.forced.template as<float>(), s.width, c.forced.template as<float>());
}

template <typename T>
void take_back(SearchScratch<T>& s, Candidates& c) {
  s.rows = c.rows;
  s.width = c.width;
  s.branches.swap(c.blocks);
  std::copy_n(c.forced.template as<float>(), s.width, s.forced.template as<float>());
  std::copy_n(c.logits.template as<float>(), s.branches.size() * s.width, s.logits.template as<float>());
}

// The block's keys as an operand, and which rows see them.
template <typename T>
void take_keys(const Search<T>& f, const SearchScratch<T>& s, Ranking<T>& ranking, Keys keys) {
  T* packed = ranking.keys.template as<T>();
  const int64_t size = f.n.head_dim * ranking.key_width;
  if (keys.count <= ranking.key_width - kLanes) std::fill_n(packed, size, T(0));
  pack_columns(f.key.at(s.batch, s.kv_head, keys.first), f.key.stride, keys.count, f.n.head_dim, packed,
               ranking.key_width);
  for (int64_t j = 0; j < ranking.key_width; ++j) {
    const bool real = j < keys.count && (!s.key_mask || s.key_mask[keys.first + j]);
    const int64_t until = std::min<int64_t>(keys.first + j + f.rule.window, std::numeric_limits<int32_t>::max());
    ranking.until[j] = real ? until : std::numeric_limits<int32_t>::min();
  }
}

// Each row's maximum (or logsumexp) over the block's keys, into the candidate's logits. Every key lies before every row.
template <typename T>
void score_candidate(const Search<T>& f, Ranking<T>& ranking, Candidates& c, bool masked) {
  const int64_t width = ranking.key_width;
  const bool most = f.plan.rank == Vote::max;
  float* tile = ranking.tile.template as<float>();
  f.exact(c.rows, width, f.n.head_dim, c.query.template as<T>(), f.n.head_dim, ranking.keys.template as<T>(), width,
          tile, width, false);
  if (is_paired<T> || f.exact_rule.softcap > 0) scale_and_cap(f.exact_rule, tile, c.rows * width);
  const auto larger_of = [](Lanes a, Lanes b) { return larger(a, b); };
  const auto sum_of = [](Lanes a, Lanes b) { return a + b; };
  float* target = c.logits.template as<float>() + c.next++ * c.width;
  for (int64_t first = 0; first < c.rows; first += kLanes) {
    const int64_t rows = std::min(kLanes, c.rows - first);
    Lanes part[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      part[r] = splat(-kInf);
      float* row = tile + (first + r) * width;
      for (int64_t j = 0; r < rows && j < width; j += kLanes) {
        Lanes score = load(row + j);
        if (masked) {
          IntLanes until;
          std::memcpy(&until, ranking.until.data() + j, sizeof(until));
          score = until > c.position[first + r] ? score : splat(-kInf);
          store(row + j, score);
        }
        part[r] = larger(score, part[r]);
      }
    }
    const Lanes top = fold_rows(part, larger_of);
    if (most) {
      store(target + first, top);
      continue;
    }
    const Lanes shift = finite_or_zero(top);
    for (int64_t r = 0; r < kLanes; ++r) {
      part[r] = Lanes{};
      const float* row = tile + (first + r) * width;
      for (int64_t j = 0; r < rows && j < width; j += kLanes) part[r] += exp(load(row + j) - shift[r]);
    }
    store(target + first, log(fold_rows(part, sum_of)) + shift);
  }
}

// Scores every candidate of every query block set aside, in ascending order of key blocks.
template <typename T>
void score_candidates(const Search<T>& f, const SearchScratch<T>& s, Ranking<T>& ranking) {
  const bool masked = f.hides() || ranking.key_width != f.n.k_block;
  ranking.wanted.clear();
  for (int64_t i = 0; i < ranking.used; ++i) ranking.wanted.push_back(ranking.all[i].wanted());
  while (true) {
    const int32_t block = *std::min_element(ranking.wanted.begin(), ranking.wanted.end());
    if (block == std::numeric_limits<int32_t>::max()) return;
    take_keys(f, s, ranking, keys_of_block(f, block));
    for (int64_t i = 0; i < ranking.used; ++i) {
      if (ranking.wanted[i] != block) continue;
      score_candidate(f, ranking, ranking.all[i], masked);
      ranking.wanted[i] = ranking.all[i].wanted();
    }
  }
}

}  // namespace stream_lens
