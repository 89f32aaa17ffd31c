#include "cpu/attention/sparse_mla_decode.h"

#include <algorithm>
#include <optional>
#include <span>

#include "cache_primitives.h"
#include "cpu/attention/attention_kernels.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

constexpr size_t kMaxScratch = 1 << 23;  // floats for the queries of a step
// So many queries a worker are each done by one, whose scratch memory stays in
// a core's L2 cache; fewer are divided among all, stage by stage.
constexpr int kQueriesAlone = 4;
constexpr int kLane = 16;
constexpr int kColumns = 64;  // a task of the combine takes no fewer

class Attention : public Staged {
 public:
  Attention(const Mla& a, bool reference, Scratch& scratch, int workers)
      : a_(a),
        reference_(reference),
        workers_(workers),
        most_(a.most_listed()),
        width_(a.layout.rank + a.layout.rope),
        lanes_(round_up(a.heads(), kLane)),
        most_splits_(round_up(most_, kSplit) / kSplit),
        all_(a.q.shape(0) * a.queries()),
        alone_(all_ >= kQueriesAlone * workers),
        step_(alone_ ? all_ : step()),
        places_(alone_ ? workers : step_),
        keys_(scratch.take_each<int32_t>(places_, most_)),
        counts_(scratch.take_each<int>(places_, most_splits_)),
        begins_(scratch.take_each<int>(places_, most_splits_)),
        filled_(scratch.take<int>(places_)),
        q_(scratch.take_each<float>(places_, lanes(width_))),
        p_(scratch.take_each<float>(places_, lanes(most_))),
        m_(scratch.take_each<float>(places_, lanes(most_splits_))),
        l_(scratch.take_each<float>(places_, lanes(most_splits_))),
        e_(scratch.take_each<float>(places_, lanes(most_splits_))),
        total_(scratch.take_each<float>(places_, lanes_)),
        row_(scratch.take_each<float>(workers, lanes(width_) + kLane)),
        sums_(scratch.take_each<float>(
            workers,
            static_cast<size_t>(a.heads()) * round_up(a.layout.rank, kLane))) {}

  void run() {
    if (reference_) {
      load();
      reference::sparse_mla_decode(a_);
    } else {
      run_stages(workers_);
    }
  }

  // For each block of queries, of all sequences, there are four stages; where
  // the queries are done alone, there is one.
  int stages() const override {
    return alone_ ? 1 : 4 * ((all_ + step_ - 1) / step_);
  }

  Stage begin(int stage) override {
    if (stage == 0) {
      load();
    }
    if (alone_) {
      begin_block(0);
      return {count_, 2 * work()};
    }
    switch (stage % 4) {
      case 0:
        begin_block(stage / 4);
        return {count_, static_cast<double>(width_) * lanes_ * count_};
      case 1:
        return begin_split();
      case 2:
        return {count_, work() / width_};
      default:
        return begin_combine();
    }
  }

  void tile(int stage, int number, int worker) override {
    if (alone_) {
      return query(number, worker);
    }
    switch (stage % 4) {
      case 0:
        load_query(number, number, row_[worker]);
        list_keys(number, number);
        return;
      case 1:
        return split_tile(number);
      case 2:
        return weigh(number, number);
      default:
        return combine_tile(number, worker);
    }
  }

 private:
  static int round_up(int n, int unit) {
    return (n + unit - 1) / unit * unit;
  }

  size_t lanes(int rows) const {
    return static_cast<size_t>(rows) * lanes_;
  }

  // Returns how many queries are taken together.
  int step() const {
    const size_t lanes = a_.heads() + kLane - 1;
    const size_t floats = (static_cast<size_t>(most_) + width_) * lanes;
    return static_cast<int>(
        std::min<size_t>(std::max<size_t>(kMaxScratch / floats, 1), all_));
  }

  double work() const {
    return static_cast<double>(width_) * lanes_ * list_ * count_;
  }

  void load() {
    a_.latents.load();
    if (a_.ropes) {
      a_.ropes->load();
    }
    list_ = a_.list_size();
    splits_ = round_up(list_, kSplit) / kSplit;
  }

  void begin_block(int number) {
    first_ = number * step_;
    count_ = std::min(step_, all_ - first_);
  }

  // The sequence of query i of those at hand, and its number there.
  int sequence(int i) const {
    return (first_ + i) / a_.queries();
  }
  int number(int i) const {
    return (first_ + i) % a_.queries();
  }

  // Does all of query i at a worker's place.
  void query(int i, int worker) const {
    load_query(i, worker, row_[worker]);
    list_keys(i, worker);
    split(i, worker, 0, filled_[worker]);
    weigh(i, worker);
    combine(i, worker, 0, a_.layout.rank, worker);
  }

  // From here on, query i has its scratch memory at a place.
  void load_query(int i, int place, float* q) const {
    const size_t row = first_ + i;
    if (a_.heads() <= kFewHeads) {
      load_row(a_.q, row, a_.heads() * width_, q_[place]);
      return;
    }
    load_row(a_.q, row, a_.heads() * width_, q);
    const size_t filled = static_cast<size_t>(a_.heads()) * width_;
    std::fill(q + filled, q + lanes(width_), 0.0f);
    attention_kernels().transpose(q, width_, lanes_, q_[place]);
  }

  // Lists the visible keys of a query, back to back, and its splits that have
  // any.
  void list_keys(int i, int place) const {
    const Mla::List list = a_.list(sequence(i), number(i));
    int keys = 0, splits = 0;
    for (int s = 0; s < list_; s += kSplit) {
      const int begin = keys;
      for (int j = s; j < std::min(s + kSplit, list_); j++) {
        const int key = list[j];
        if (key >= 0) {
          keys_[place][keys++] = key;
        }
      }
      if (keys > begin) {
        begins_[place][splits] = begin;
        counts_[place][splits++] = keys - begin;
      }
    }
    filled_[place] = splits;
  }

  // Divides a query's splits among tiles; a tile takes several, one after the
  // other, as one's keys are fetched during that before it.
  Stage begin_split() {
    constexpr int most = 16;
    const int share = splits_ * count_ / (2 * workers_);
    each_ = std::clamp(share, 1, most);
    tiles_ = (splits_ + each_ - 1) / each_;
    return {count_ * tiles_, work()};
  }

  void split_tile(int number) const {
    const int i = number / tiles_, begin = number % tiles_ * each_;
    split(i, i, begin, std::min(begin + each_, filled_[i]));
  }

  void split(int i, int place, int begin, int end) const {
    const Rows rows = a_.rows(sequence(i));
    for (int s = begin; s < end; s++) {
      attention_kernels().split(
          {q_[place],
           a_.heads(),
           lanes_,
           a_.scale,
           &rows,
           keys_[place] + begins_[place][s],
           counts_[place][s],
           s + 1 < filled_[place] ? counts_[place][s + 1] : 0,
           p_[place] + lanes(begins_[place][s]),
           m_[place] + lanes(s),
           l_[place] + lanes(s)});
    }
  }

  void weigh(int i, int place) const {
    const Rows rows = a_.rows(sequence(i));
    attention_kernels().weigh(parts(i, place, rows), e_[place], total_[place]);
  }

  CombineArgs parts(int i, int place, const Rows& rows) const {
    return {
        &rows,
        keys_[place],
        counts_[place],
        filled_[place],
        a_.heads(),
        lanes_,
        p_[place],
        m_[place],
        l_[place],
        e_[place],
        total_[place],
        0,
        rows.rank,
        nullptr,
        a_.out(sequence(i), number(i))};
  }

  // Divides a query's columns among tiles, no further than the threads need,
  // because each part walks all of its rows.
  Stage begin_combine() {
    const int rank = a_.layout.rank;
    const int wanted = (workers_ + count_ - 1) / count_;
    const int blocks = (rank + kColumns - 1) / kColumns;
    each_ = (blocks + wanted - 1) / wanted * kColumns;
    tiles_ = (rank + each_ - 1) / each_;
    return {count_ * tiles_, work()};
  }

  void combine_tile(int number, int worker) const {
    const int i = number / tiles_, column = number % tiles_ * each_;
    const int columns = std::min(each_, a_.layout.rank - column);
    combine(i, i, column, columns, worker);
  }

  void combine(int i, int place, int column, int columns, int worker) const {
    const Rows rows = a_.rows(sequence(i));
    CombineArgs args = parts(i, place, rows);
    args.column = column;
    args.columns = columns;
    args.sums = sums_[worker];
    if (args.splits == 0) {
      const size_t values = static_cast<size_t>(args.heads) * rows.rank;
      std::fill_n(args.out, values, 0);
    } else {
      attention_kernels().combine(args);
    }
  }

  const Mla a_;
  const bool reference_;
  const int workers_, most_, width_, lanes_, most_splits_;
  const int all_;  // queries of all sequences
  const bool alone_;
  const int step_, places_;
  // For each place these are a query's keys, the sizes, first keys and number
  // of its splits, and what the kernels need.
  const Shares<int32_t> keys_;
  const Shares<int> counts_, begins_;
  const std::span<int> filled_;
  const Shares<float> q_, p_, m_, l_, e_, total_;
  const Shares<float> row_, sums_;  // one for each worker
  int list_ = 0, splits_ = 0;       // of this run
  int first_ = 0, count_ = 0;       // the queries at hand
  int each_ = 0, tiles_ = 0;  // splits or columns of a tile; a query's tiles
};

}  // namespace

}  // namespace cpu

void SparseMlaDecode::read(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const int* filled) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    const cpu::RowArray latents(in[2], scratch, filled);
    std::optional<cpu::RowArray> ropes;
    if (ropes_) {
      ropes.emplace(in[3], scratch, filled);
    }
    const cpu::Mla a{
        in[0],
        in[1],
        latents,
        ropes,
        selected_ ? &in[3 + ropes_] : nullptr,
        layout_,
        scale_,
        out[0]};
    return cpu::Attention(a, reference_, scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
