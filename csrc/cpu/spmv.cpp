// One row of input against the remaining weights, in row-major order beside the column of each: no tile to pack, so
// that the values come straight from memory, and x or its gradient fits a cache and is gathered from there. Gathers are
// what limits all three.
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// body(first row, last row) for each task; rows of about kSmallGrain remaining weights.
template <typename Body>
void for_rows(const Team& team, const Rows& rows, const Body& body) {
  const int64_t nnz = rows.offsets[rows.count];
  const int64_t tasks = max<int64_t>(min(ceil_div(nnz, tuning::kSmallGrain), rows.count), 1);
  team.for_each(tasks, [&](int64_t task) { body(rows.count * task / tasks, rows.count * (task + 1) / tasks); });
}

}  // namespace

void row_columns(const Team& team, Bits bits, int64_t rows, int64_t, const int64_t* offsets, uint16_t* columns) {
  for_rows(team, {rows, offsets, nullptr}, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      uint16_t* to = columns + offsets[n];
      for (int64_t w = 0; w < bits.stride; ++w) {
        for (uint64_t word = bits.row(n)[w]; word; word &= word - 1) {
          *to++ = uint16_t(w * 64 + __builtin_ctzll(word));
        }
      }
    }
  });
}

void spmv(const Team& team, const Rows& rows, const float* values, const float* x, const float* bias, float* y) {
  for_rows(team, rows, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      int64_t i = rows.offsets[n];
      const int64_t end = rows.offsets[n + 1];
      Vec sum = Vec::zero(), other = Vec::zero();
      for (; i + 2 * L <= end; i += 2 * L) {
        prefetch(values + i + tuning::kFloatsAhead);
        prefetch(values + i + tuning::kFloatsAhead + L);
        prefetch(rows.columns + i + tuning::kFloatsAhead);
        sum = fmadd(Vec::loadu(values + i), Vec::gather(x, rows.columns + i), sum);
        other = fmadd(Vec::loadu(values + i + L), Vec::gather(x, rows.columns + i + L), other);
      }
      for (; i < end; i += L) {
        const auto valid = Vec::first(end - i);
        sum = fmadd(Vec::loadu(valid, values + i), Vec::gather(x, rows.columns + i).select(valid), sum);
      }
      y[n] = (sum + other).sum() + (bias ? bias[n] : 0);
    }
  });
}

void spmv_transposed(const Team& team, const Rows& rows, int64_t cols, const float* values, const float* dy,
                     float* dx) {
  // Each task has a result of its own, so that the order of the sums is that of the rows.
  const int64_t tasks = max<int64_t>(min<int64_t>(team.threads, rows.count), 1);
  float* const parts = static_cast<float*>(scratch(Slot::kPanelA, size_t(tasks * cols) * sizeof(float)));
  team.for_each(tasks, [&](int64_t task) {
    float* const part = parts + task * cols;
    std::memset(part, 0, size_t(cols) * sizeof(float));
    for (int64_t n = rows.count * task / tasks; n < rows.count * (task + 1) / tasks; ++n) {
      const Vec factor = Vec::set1(dy[n]);
      int64_t i = rows.offsets[n];
      const int64_t end = rows.offsets[n + 1];
      for (; i + L <= end; i += L) {
        prefetch(values + i + tuning::kFloatsAhead);
        prefetch(rows.columns + i + tuning::kFloatsAhead);
        const uint16_t* const columns = rows.columns + i;
        fmadd(factor, Vec::loadu(values + i), Vec::gather(part, columns)).scatter(part, columns);
      }
      for (; i < end; ++i) part[rows.columns[i]] += dy[n] * values[i];
    }
  });
  for (int64_t k = 0; k < cols; ++k) {
    float sum = parts[k];
    for (int64_t task = 1; task < tasks; ++task) sum += parts[task * cols + k];
    dx[k] = sum;
  }
}

void sampled_outer(const Team& team, const Rows& rows, const float* dy, const float* x, float* grad_values) {
  for_rows(team, rows, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const Vec factor = Vec::set1(dy[n]);
      for (int64_t i = rows.offsets[n]; i < rows.offsets[n + 1]; i += L) {
        const auto valid = Vec::first(rows.offsets[n + 1] - i);
        (factor * Vec::gather(x, rows.columns + i)).storeu(valid, grad_values + i);
      }
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
