#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "formats/families.h"
#include "primitives.h"

namespace glm_fused {

namespace cpu {

namespace {

// Computes the rows [.., hidden] of tokens. Of one that the table lacks, which
// is refused later, the row is NaN.
struct EmbedAll {
  const Matrix table;
  const mx::array& tokens;
  mx::array& y;

  void run() {
    const int32_t* ids = tokens.data<int32_t>();
    with_family(table.format.family(), [&]<class Tag>(Tag) {
      using Row = RowOf<Tag::value>::type;
      if constexpr (requires(const Row row, float* to) {
                      row.embedded(0, 0, to);
                    }) {
        for (size_t i = 0; i < tokens.size(); i++) {
          if (std::cmp_greater_equal(static_cast<uint32_t>(ids[i]), table.n)) {
            store(i, [](int, int count, float* to) {
              std::fill_n(to, count, NAN);
            });
            continue;
          }
          const uint8_t* planes[kMaxPlanes];
          table.locate(0, ids[i], planes);
          const Row row(table.format, planes);
          store(i, [&](int column, int count, float* to) {
            row.embedded(column, count, to);
          });
        }
      }
    });
  }

  // fill(column, count, to) gives the values from a column on.
  template <class Fill>
  void store(size_t token, const Fill& fill) {
    constexpr int kValues = 256;  // so many are stored at once
    float values[kValues];
    for (int at = 0; at < table.k; at += kValues) {
      const int count = std::min(kValues, table.k - at);
      fill(at, count, values);
      store_row(y, token * table.k + at, values, count);
    }
  }
};

}  // namespace

}  // namespace cpu

void Embed::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch&, int) {
    size_t next = 1;
    const cpu::Matrix table(in, next, format_, out[0].shape(-1));
    return cpu::EmbedAll{table, in[0], out[0]};
  };
  cpu::dispatch(*this, inputs, outputs, make);
}

}  // namespace glm_fused
