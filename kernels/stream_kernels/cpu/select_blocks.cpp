// The hierarchical search for key blocks, one layer a call: kept blocks of every query block. Definition: README.md.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "operator.h"
#include "ranking.h"
#include "representative.h"

namespace stream_lens {
namespace {

constexpr int64_t kRankedTogether = 64, kRankedBytes = 5 << 18, kSharesPerThread = 8;
constexpr int64_t kQueryBlocksToPool = 8;  // below, pooling every short branch costs more than it saves

// Halves every branch; a branch of one block is its own only child.
template <typename T>
bool split_branches(SearchScratch<T>& s) {
  s.children.clear();
  for (const Branch x : s.branches) {
    const int64_t middle = x.stop - x.start <= 1 ? x.stop : (x.start + x.stop) / 2;
    s.children.push_back({x.start, middle});
    if (middle < x.stop) s.children.push_back({middle, x.stop});
  }
  return s.children.size() > s.branches.size();
}

// Log of the exact mass that each row gives to the blocks that are kept anyway, into s.forced.
template <typename T>
void weigh_forced(const Search<T>& f, SearchScratch<T>& s, Branch sinks, Branch local) {
  int64_t count = 0;
  for (const Branch x : {sinks, local}) {
    for (int64_t block = x.start; block < x.stop; ++block) {
      logits_of_keys(f, s, keys_of_block(f, block), false, s.logits_of(count++));
    }
  }
  for (int64_t lane = 0; lane < s.width; lane += kLanes) {
    store(s.forced.template as<float>() + lane, column_logsumexp(s.logits_of(0) + lane, s.width, count));
  }
}

// Whether a voting row sees any real key of the block, none of which lies after the rows.
template <typename T>
bool is_seen(const Search<T>& f, const SearchScratch<T>& s, int64_t block) {
  if (s.rows == 0) return false;
  const Keys keys = keys_of_block(f, block);
  if (keys.last() <= s.position[0] - f.rule.window) return false;
  if (!s.key_mask) return true;
  // A mean stands for the whole block, whatever of it the window reaches.
  const bool whole = f.tables.sums != nullptr;
  const int64_t reached = whole ? keys.first : std::max(keys.first, s.position[0] - f.rule.window + 1);
  return std::any_of(s.key_mask + reached, s.key_mask + keys.last() + 1, [](bool real) { return real; });
}

// The blocks that one query block keeps of its search range, into s.branches; whether they are yet to be ranked.
template <typename T>
bool search(const Search<T>& f, SearchScratch<T>& s, Branch sinks, Branch range, Branch local, int64_t free) {
  const int64_t length = range.stop - range.start;
  if (length <= free) {
    for (int64_t block = range.start; block < range.stop; ++block) {
      if (f.plan.rounds == 0 || is_seen(f, s, block)) s.branches.push_back({block, block + 1});
    }
    return false;
  }
  if (s.rows == 0) return false;
  if (f.plan.needs_forced()) weigh_forced(f, s, sinks, local);
  const int64_t branches = std::min(length, f.plan.oversample * free);
  for (int64_t j = 0; j < branches; ++j) {
    s.branches.push_back({range.start + length * j / branches, range.start + length * (j + 1) / branches});
  }
  for (int64_t round = 0; round < f.plan.rounds && split_branches(s); ++round) {
    const int64_t count = s.children.size();
    representative_logits(f, s);
    vote(f, s, f.plan.reduce, count);
    keep_best(s, count, branches);
    s.branches.clear();
    for (int64_t c = 0; c < count; ++c) {
      if (s.survives[c]) s.branches.push_back(s.children[c]);
    }
  }
  return f.plan.oversample > 1 && (static_cast<int64_t>(s.branches.size()) > free || f.hides());
}

// The ranges of one query block: sinks, what is searched, local blocks.
template <typename T>
std::array<Branch, 3> ranges_of(const Search<T>& f, int64_t b, int64_t i) {
  const int64_t step = f.n.batch * f.n.q_blocks, *at = f.ranges + b * f.n.q_blocks + i;
  return {Branch{at[0], at[step]}, Branch{at[step], at[2 * step]}, Branch{at[2 * step], at[3 * step]}};
}

// Writes what is kept of query block `item` = (batch, head, q_block): s.branches and the forced blocks.
template <typename T>
void write_kept(const Search<T>& f, const SearchScratch<T>& s, int64_t item) {
  const auto [sinks, middle, local] = ranges_of(f, item / f.n.q_blocks / f.n.heads, item % f.n.q_blocks);
  int32_t *out = f.out + item * f.n.slots, *end = out + f.n.slots;
  for (int64_t block = sinks.start; block < sinks.stop && out < end; ++block) *out++ = block;
  for (const Branch x : s.branches) {
    if (out < end) *out++ = x.start;
  }
  for (int64_t block = local.start; block < local.stop && out < end; ++block) *out++ = block;
  std::fill(out, end, -1);
}

// Of each query block set aside, the `free` best single blocks by the exact scores of all their keys.
template <typename T>
void rank_exactly(const Search<T>& f, SearchScratch<T>& s, Ranking<T>& ranking) {
  if (ranking.used > 0) score_candidates(f, s, ranking);
  for (int64_t i = 0; i < ranking.used; ++i) {
    Candidates& c = ranking.all[i];
    take_back(s, c);
    const int64_t count = s.branches.size();
    vote(f, s, f.plan.rank, count);
    keep_best(s, count, f.free[c.item]);
    int64_t kept = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (s.survives[j]) s.branches[kept++] = s.branches[j];
    }
    s.branches.resize(kept);
    write_kept(f, s, c.item);
  }
  ranking.used = 0;
}

// A run of query blocks of one kv head: item j is query block j / groups of the group's head j % groups.
template <typename T>
void select(const Search<T>& f, SearchScratch<T>& s, Ranking<T>& ranking, int64_t b, int64_t kv_head, Branch items) {
  for (int64_t j = items.start; j < items.stop; ++j) {
    const int64_t i = j / f.n.groups(), h = kv_head * f.n.groups() + j % f.n.groups();
    const int64_t item = (b * f.n.heads + h) * f.n.q_blocks + i;
    const auto [sinks, middle, local] = ranges_of(f, b, i);
    s.branches.clear();
    bool ranked = false;
    if (middle.start < middle.stop && f.free[item] > 0) {
      take_rows(f, s, b, h, i);
      ranked = search(f, s, sinks, middle, local, f.free[item]);
    }
    if (ranked) {
      set_aside(f, s, ranking, item);
    } else {
      write_kept(f, s, item);
    }
  }
  rank_exactly(f, s, ranking);
}

// How many query blocks are ranked together: as many as the second-level cache holds, if every thread has enough to do.
template <typename T>
int64_t ranked_together(const Search<T>& f) {
  const int64_t fit = kRankedBytes / Ranking<T>::bytes_each(f);
  const int64_t share = f.n.batch * f.n.heads * f.n.q_blocks / (kSharesPerThread * at::get_num_threads());
  return std::max<int64_t>(1, std::min({kRankedTogether, fit, share}));
}

// Prefix sums over blocks of real keys, or of their squares: one block's keys in float32, blocks in float64.
template <typename T>
Scratch prefix_sums(const Rows<const T>& key, const Sizes& n, const bool* key_mask, bool squares) {
  const int64_t d = n.head_dim, size = (n.k_blocks + 1) * d;
  Scratch sums = scratch<double>(n.batch * n.kv_heads * size);
  double* all = sums.as<double>();
  at::parallel_for(0, n.batch * n.kv_heads * n.k_blocks, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> total(d);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t bg = item / n.k_blocks, block = item % n.k_blocks, b = bg / n.kv_heads;
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t j = block * n.k_block; j < block * n.k_block + n.keys(block); ++j) {
        if (key_mask && !key_mask[b * n.key_len + j]) continue;
        const T* row = key.at(b, bg % n.kv_heads, j);
        for (int64_t x = 0; x < d; ++x) {
          const float value = row[x];
          total[x] += squares ? value * value : value;
        }
      }
      std::copy(total.begin(), total.end(), all + bg * size + (block + 1) * d);
    }
  });
  at::parallel_for(0, n.batch * n.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t bg = begin; bg < end; ++bg) {
      double* rows = all + bg * size;
      std::fill_n(rows, d, 0.0);
      for (int64_t x = d; x < size; ++x) rows[x] += rows[x - d];
    }
  });
  return sums;
}

std::vector<int32_t> prefix_counts(const Sizes& n, const bool* key_mask) {
  std::vector<int32_t> counts;
  for (int64_t b = 0; b < n.batch; ++b) {
    counts.push_back(0);
    for (int64_t block = 0; block < n.k_blocks; ++block) {
      const bool* mask = key_mask + b * n.key_len + block * n.k_block;
      counts.push_back(counts.back() + (key_mask ? std::count(mask, mask + n.keys(block), true) : n.keys(block)));
    }
  }
  return counts;
}

template <typename T>
void run_search(const at::Tensor& q, const at::Tensor& k, const Sizes& n, const Rule& rule, const Plan& plan,
                const at::Tensor& ranges, const at::Tensor& free, at::Tensor& out) {
  const Rows<const T> key(k);
  const bool pooled = plan.representative == "mean" || plan.representative == "mean_var";
  const bool spread = plan.representative == "mean_var";
  const Scratch sums = pooled ? prefix_sums(key, n, rule.key_mask, false) : scratch<double>(0);
  const Scratch squares = spread ? prefix_sums(key, n, rule.key_mask, true) : scratch<double>(0);
  const std::vector<int32_t> counts = prefix_counts(n, rule.key_mask);
  Tables tables{pooled ? sums.as<double>() : nullptr, spread ? squares.as<double>() : nullptr, counts.data(), nullptr};
  const bool asked_often = pooled && n.groups() * n.q_blocks >= kQueryBlocksToPool;
  const Scratch short_branches = asked_often ? pool_short_branches(tables, n) : scratch<float>(0);
  if (asked_often) tables.short_branches = short_branches.as<float>();
  Rule exact_rule = rule;
  if (!is_paired<T>) exact_rule.scale = 1;  // float rows are scaled beforehand
  const Search<T> f{n,
                    rule,
                    exact_rule,
                    plan,
                    tables,
                    Gemm<T>{has_brgemm<T>()},
                    Gemm<float>{has_brgemm<float>()},
                    Rows<const T>(q),
                    key,
                    ranges.const_data_ptr<int64_t>(),
                    free.const_data_ptr<int64_t>(),
                    out.data_ptr<int32_t>()};
  const int64_t together = ranked_together(f), items = n.groups() * n.q_blocks;
  const int64_t runs = (items + together - 1) / together;
  share_out(n.batch * n.kv_heads * runs, [&](const auto& next) {
    SearchScratch<T> s(f);
    Ranking<T> ranking(f, together);
    for (int64_t run = next(); run >= 0; run = next()) {
      const int64_t bg = run / runs, first = run % runs * together;
      select(f, s, ranking, bg / n.kv_heads, bg % n.kv_heads, {first, std::min(first + together, items)});
    }
    f.exact.release();
    f.pooled.release();
  });
}

Vote vote_of(const std::string& name) {
  TORCH_CHECK(name == "max" || name == "mass" || name == "peak", "the C++ search has no reduction ", name);
  return name == "max" ? Vote::max : name == "mass" ? Vote::mass : Vote::peak;
}

}  // namespace

// Must match the schema in select_blocks.py.
at::Tensor select_blocks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& ranges, const at::Tensor& free,
                         int64_t q_block, int64_t k_block, double scale, int64_t offset, std::optional<int64_t> window,
                         std::optional<double> softcap, const std::optional<at::Tensor>& key_mask,
                         std::string representative, std::string reduce, std::string rank, int64_t oversample,
                         int64_t query_stride, int64_t slots, int64_t rounds) {
  const at::ScalarType dtype = compute_dtype(q);
  const at::Tensor rows = rows_contiguous(q.to(dtype)), keys = rows_contiguous(k.to(dtype));
  const at::Tensor mask = contiguous_as(key_mask, at::kBool);
  const Sizes n = make_sizes(q, k, q_block, k_block, slots);
  const Rule rule = make_rule(n, scale, offset, window, softcap, mask);
  const Plan plan{representative, vote_of(reduce), vote_of(rank), oversample, query_stride, rounds};
  const at::Tensor all_ranges = ranges.to(at::kLong).contiguous(), all_free = free.to(at::kLong).contiguous();
  at::Tensor out = at::empty({n.batch, n.heads, n.q_blocks, n.slots}, q.options().dtype(at::kInt));
  if (dtype == at::kFloat) {
    run_search<float>(rows, keys, n, rule, plan, all_ranges, all_free, out);
  } else {
    run_search<at::BFloat16>(rows, keys, n, rule, plan, all_ranges, all_free, out);
  }
  return out;
}

TORCH_LIBRARY_IMPL(stream_lens_cpu, CPU, m) {
  m.impl("select_blocks", select_blocks);
}

}  // namespace stream_lens
