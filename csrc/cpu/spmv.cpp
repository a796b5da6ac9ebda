// One row of input against the remaining weights, in row-major order beside the column of each: no tile to pack, so
// that the values come straight from memory, and x or its gradient fits a cache and is gathered from there. Gathers are
// what limits all three. What is gathered from is of floats, whatever the elements are.
#include "elements.h"
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// How far the prefetches run ahead, in elements.
template <typename T>
constexpr int64_t kAhead = tuning::kBytesAhead / int64_t{sizeof(T)};
constexpr int64_t kColumnsAhead = tuning::kBytesAhead / int64_t{sizeof(uint16_t)};

// body(first row, last row) for each task; rows of about kSmallGrain remaining weights.
template <typename Body>
void for_rows(const Team& team, const Rows& rows, const Body& body) {
  const int64_t nnz = rows.offsets[rows.count];
  const int64_t tasks = max<int64_t>(min(ceil_div(nnz, tuning::kSmallGrain), rows.count), 1);
  team.for_each(tasks, [&](int64_t task) { body(rows.count * task / tasks, rows.count * (task + 1) / tasks); });
}

template <typename T>
void gather_dots(const Team& team, const Rows& rows, const T* values, const float* x, const T* bias, T* y) {
  for_rows(team, rows, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      int64_t i = rows.offsets[n];
      const int64_t end = rows.offsets[n + 1];
      Vec sum = Vec::zero(), other = Vec::zero();
      for (; i + 2 * L <= end; i += 2 * L) {
        prefetch(values + i + kAhead<T>);
        if (sizeof(T) * L == 64) prefetch(values + i + kAhead<T> + L);
        prefetch(rows.columns + i + kColumnsAhead);
        sum = fmadd(load_floats(values + i), Vec::gather(x, rows.columns + i), sum);
        other = fmadd(load_floats(values + i + L), Vec::gather(x, rows.columns + i + L), other);
      }
      for (; i < end; i += L) {
        sum = fmadd(load_first(end - i, values + i), Vec::gather(x, rows.columns + i).select(Vec::first(end - i)), sum);
      }
      store_float((sum + other).sum() + (bias ? to_float(bias[n]) : 0), y + n);
    }
  });
}

template <typename T>
void scatter_rows(const Team& team, const Rows& rows, int64_t cols, const T* values, const T* dy, T* dx) {
  // Each task has a result of its own, so that the order of the sums is that of the rows.
  const int64_t tasks = max<int64_t>(min<int64_t>(team.threads, rows.count), 1);
  float* const parts = static_cast<float*>(scratch(Slot::kPanelA, size_t(tasks * cols) * sizeof(float)));
  team.for_each(tasks, [&](int64_t task) {
    float* const part = parts + task * cols;
    std::memset(part, 0, size_t(cols) * sizeof(float));
    for (int64_t n = rows.count * task / tasks; n < rows.count * (task + 1) / tasks; ++n) {
      const float factor = to_float(dy[n]);
      const Vec factors = Vec::set1(factor);
      int64_t i = rows.offsets[n];
      const int64_t end = rows.offsets[n + 1];
      for (; i + L <= end; i += L) {
        prefetch(values + i + kAhead<T>);
        prefetch(rows.columns + i + kColumnsAhead);
        const uint16_t* const columns = rows.columns + i;
        fmadd(factors, load_floats(values + i), Vec::gather(part, columns)).scatter(part, columns);
      }
      for (; i < end; ++i) part[rows.columns[i]] += factor * to_float(values[i]);
    }
  });
  for (int64_t k = 0; k < cols; ++k) {
    for (int64_t task = 1; task < tasks; ++task) parts[k] += parts[task * cols + k];
  }
  round_floats(parts, cols, dx);
}

template <typename T>
void outer(const Team& team, const Rows& rows, const T* dy, const float* x, T* grad_values) {
  for_rows(team, rows, [&](int64_t first, int64_t last) {
    const int64_t end = rows.offsets[last];
    for (int64_t n = first; n < last; ++n) {
      const Vec factor = Vec::set1(to_float(dy[n]));
      for (int64_t i = rows.offsets[n]; i < rows.offsets[n + 1]; i += L) {
        const Vec v = factor * Vec::gather(x, rows.columns + i);
        if (kIsFloat<T> && kSlowPartStores && end - i >= L) {
          store_floats(v, grad_values + i);  // over what the next rows have
        } else {
          store_floats(v, rows.offsets[n + 1] - i, grad_values + i);
        }
      }
    }
  });
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

void spmv(const Team& team, const Rows& rows, int64_t cols, Dtype dtype, const void* values, const void* x,
          const void* bias, void* y) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    gather_dots(team, rows, static_cast<const T*>(values),
                as_floats(team, Slot::kPanelA, static_cast<const T*>(x), cols), static_cast<const T*>(bias),
                static_cast<T*>(y));
  });
}

void spmv_transposed(const Team& team, const Rows& rows, int64_t cols, Dtype dtype, const void* values, const void* dy,
                     void* dx) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    scatter_rows(team, rows, cols, static_cast<const T*>(values), static_cast<const T*>(dy), static_cast<T*>(dx));
  });
}

void sampled_outer(const Team& team, const Rows& rows, int64_t cols, Dtype dtype, const void* dy, const void* x,
                   void* grad_values) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    outer(team, rows, static_cast<const T*>(dy), as_floats(team, Slot::kPanelA, static_cast<const T*>(x), cols),
          static_cast<T*>(grad_values));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
