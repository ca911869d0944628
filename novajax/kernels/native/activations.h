// Rows of activations as a kind of product takes them: float, bfloat16, or rounded to int8 with a scale for each row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace novajax {

namespace ffi = xla::ffi;

// Activations of the caller, converted to what a kind takes and filled up with zeros.
struct Activations {
  std::vector<char> x;
  std::vector<float> scale;
  std::vector<int32_t> group_sums;
};

// A row of the caller's as floats, filled up with zeros.
inline void Widen(const ffi::AnyBuffer& x, int64_t row, int64_t inputs, int64_t filled, float* to) {
  if (x.element_type() == ffi::F32) {
    std::memcpy(to, static_cast<const float*>(x.untyped_data()) + row * inputs, inputs * sizeof(float));
  } else {
    const auto* from = static_cast<const uint16_t*>(x.untyped_data()) + row * inputs;
    auto* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < inputs; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
  }
  std::fill(to + inputs, to + filled, 0.f);
}

// A row to int8 as `quant.aqt.quantize` does: its largest magnitude at 127.5, rounded to nearest even. A row that is not finite gets the
// scale NaN, so that its results are not numbers either.
inline void Round(const ffi::AnyBuffer& x, int64_t row, int64_t inputs, int64_t filled, int8_t* to, float* row_scale) {
  static thread_local std::vector<float> wide;
  const int64_t whole = (filled + kLanes - 1) / kLanes * kLanes;
  if (static_cast<int64_t>(wide.size()) < whole) wide.resize(whole);
  Widen(x, row, inputs, whole, wide.data());
  F16 most{}, zero{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F16 value = Load<F16>(wide.data() + i);
    most = Max(most, value < 0.f ? -value : value);
    zero += value * 0.f;
  }
  const float best = Max(most), scale = (best == 0 ? 1.f : best) / 127.5f;
  const float by = std::isinf(1.f / scale) ? 1.f : 1.f / scale;
  const bool sound = Sum(zero) == 0;
  *row_scale = sound ? scale : std::nanf("");
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F16 value = Max(Load<F16>(wide.data() + i) * by, Spread<F16>(-127.f)), clipped = value < 127.f ? value : Spread<F16>(127.f);
    // Adding 1.5 x 2^23 leaves the nearest whole number, ties to even, in the low bits.
    const Bytes16 bytes = __builtin_convertvector(As<I16>(clipped + 12582912.f), Bytes16);
    std::memcpy(to + i, &bytes, std::min<int64_t>(kLanes, filled - i));
  }
}

// What the kernel reads as x: the buffer itself where it is that already, else `rows`.
inline const void* Prepare(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, bool rounded, bool half, int64_t filled, int64_t group, Activations& rows) {
  const int64_t count = x.dimensions()[0], inputs = x.dimensions()[1];
  const bool same = !rounded && half == (x.element_type() == ffi::BF16);
  if (same && filled == inputs) return x.untyped_data();
  const int64_t width = rounded ? 1 : half ? 2 : 4;
  rows.x.resize(count * filled * width);
  if (rounded) {
    rows.scale.resize(count);
    rows.group_sums.resize(group ? count * filled / group : 0);
  }
  ParallelFor(pool, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, inputs)), [&](int64_t row) {
    char* to = rows.x.data() + row * filled * width;
    if (rounded) {
      auto* bytes = reinterpret_cast<int8_t*>(to);
      Round(x, row, inputs, filled, bytes, &rows.scale[row]);
      for (int64_t at = 0; group && at < filled; at += group) {
        int32_t sum = 0;
        for (int64_t i = at; i < at + group; ++i) sum += bytes[i];
        rows.group_sums[(row * filled + at) / group] = sum;
      }
    } else if (same) {
      std::memcpy(to, static_cast<const char*>(x.untyped_data()) + row * inputs * width, inputs * width);
      std::memset(to + inputs * width, 0, (filled - inputs) * width);
    } else {
      Widen(x, row, inputs, filled, reinterpret_cast<float*>(to));
    }
  });
  return rows.x.data();
}

// Inputs in a step, by the type that panels have.
inline int64_t InputsOf(ffi::DataType weights) {
  return weights == ffi::F32 ? 1 : weights == ffi::BF16 ? 2 : weights == ffi::S8 ? 4 : 8;
}

}  // namespace novajax
