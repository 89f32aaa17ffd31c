#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/dot/matrix.h"
#include "reference/reference.h"
#include "softmax_exp.h"

namespace glm_fused::reference {

namespace {

float float_at(const uint8_t* from, FloatType type, int i) {
  if (type == FloatType::float32) {
    float value;
    memcpy(&value, from + 4 * i, 4);
    return value;
  }
  uint16_t value;
  memcpy(&value, from + 2 * i, 2);
  return type == FloatType::bfloat16 ? from_bfloat16(value)
                                     : from_float16(value);
}

float e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = exponent == 0
      ? std::ldexp(static_cast<float>(mantissa), -9)
      : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// Returns the rank + rope values of one row.
std::vector<float> values(const Rows& rows, int key) {
  const Row row = rows[key];
  std::vector<float> out;
  for (int i = 0; i < rows.rank; i++) {
    if (rows.format == RowFormat::floating) {
      out.push_back(float_at(row.latent, rows.latent_type, i));
    } else if (rows.format == RowFormat::fp8) {
      const int tile = i / kScaleTile;
      const float scale = float_at(row.scales, FloatType::float32, tile);
      out.push_back(e4m3(row.latent[i]) * scale);
    } else {
      const float scale = float_at(row.scales, FloatType::float32, 0);
      out.push_back(static_cast<int8_t>(row.latent[i]) * scale);
    }
  }
  for (int i = 0; i < rows.rope_dim; i++) {
    out.push_back(float_at(row.rope, rows.rope_type, i));
  }
  return out;
}

float dot(const float* q, const std::vector<float>& k) {
  float sum = 0;
  for (size_t d = 0; d < k.size(); d++) {
    sum = multiply_add(q[d], k[d], sum);
  }
  return sum;
}

float score(
    const cpu::Indexer& a,
    const float* q,
    const float* weights,
    const std::vector<float>& key) {
  float sum = 0;
  for (int h = 0; h < a.heads(); h++) {
    const float product = dot(q + h * a.dim(), key) * a.scale;
    sum = multiply_add(weights[h], product < 0 ? 0 : product, sum);
  }
  return std::isnan(sum) ? -std::numeric_limits<float>::infinity() : sum;
}

// Returns the ascending indices of the k largest scores; the lowest index wins
// a tie.
std::vector<int> largest(const std::vector<float>& scores, int k) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
    return scores[i] > scores[j];
  });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace

void indexer_topk(const cpu::Indexer& a) {
  std::vector<float> q(a.heads() * a.dim());
  for (int b = 0; b < a.q.shape(0); b++) {
    const Rows rows = a.rows(b);
    const cpu::Visible visible = a.visible(b);
    for (int i = 0; i < a.queries(); i++) {
      const int low = visible.low, high = visible.high(i);
      if (high - low <= a.k()) {
        cpu::select_all(low, high, a.k(), a.out(b, i));
        continue;
      }
      cpu::load_row(a.q, a.row(b, i), static_cast<int>(q.size()), q.data());
      const float* weights = a.weights.data<float>() + a.row(b, i) * a.heads();
      std::vector<float> scores;
      for (int key = low; key < high; key++) {
        scores.push_back(score(a, q.data(), weights, values(rows, key)));
      }
      int32_t* out = a.out(b, i);
      for (int key : largest(scores, a.k())) {
        *out++ = low + key;
      }
    }
  }
}

namespace {

// One split of one head.
struct Split {
  float m = -std::numeric_limits<float>::infinity(), l = 0;
  std::vector<float> o;
};

Split split(
    const float* q,
    const std::vector<std::vector<float>>& rows,
    float scale,
    int rank) {
  Split made;
  std::vector<float> scores;
  for (const auto& row : rows) {
    scores.push_back(dot(q, row) * scale);
    made.m = scores.back() > made.m ? scores.back() : made.m;
  }
  made.o.assign(rank, 0);
  for (size_t i = 0; i < rows.size(); i++) {
    const float p = exp_negative(scores[i] - made.m);
    made.l = made.l + p;
    for (int c = 0; c < rank; c++) {
      made.o[c] = multiply_add(p, rows[i][c], made.o[c]);
    }
  }
  return made;
}

void combine(const std::vector<Split>& splits, int rank, float* out) {
  std::fill_n(out, rank, 0.0f);
  if (splits.empty()) {
    return;
  }
  float most = -std::numeric_limits<float>::infinity(), total = 0;
  for (const auto& s : splits) {
    most = s.m > most ? s.m : most;
  }
  for (const auto& s : splits) {
    const float e = exp_negative(s.m - most);
    total = multiply_add(e, s.l, total);
    for (int c = 0; c < rank; c++) {
      out[c] = multiply_add(e, s.o[c], out[c]);
    }
  }
  for (int c = 0; c < rank; c++) {
    out[c] = out[c] / total;
  }
}

}  // namespace

void sparse_mla_decode(const cpu::Mla& a) {
  const int rank = a.layout.rank, width = rank + a.layout.rope;
  std::vector<float> q(a.heads() * width);
  for (int b = 0; b < a.q.shape(0); b++) {
    const Rows rows = a.rows(b);
    for (int i = 0; i < a.queries(); i++) {
      cpu::load_row(a.q, a.row(b, i), static_cast<int>(q.size()), q.data());
      std::vector<std::vector<Split>> heads(a.heads());
      const cpu::Mla::List list = a.list(b, i);
      for (int first = 0; first < a.list_size(); first += kSplit) {
        std::vector<std::vector<float>> keys;
        const int last = std::min(first + kSplit, a.list_size());
        for (int j = first; j < last; j++) {
          const int key = list[j];
          if (key >= 0) {
            keys.push_back(values(rows, key));
          }
        }
        for (int h = 0; h < a.heads() && !keys.empty(); h++) {
          heads[h].push_back(split(&q[h * width], keys, a.scale, rank));
        }
      }
      for (int h = 0; h < a.heads(); h++) {
        combine(heads[h], rank, a.out(b, i) + h * rank);
      }
    }
  }
}

}  // namespace glm_fused::reference
