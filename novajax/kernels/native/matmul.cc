// Rows of activations times a packed weight: `novajax_matmul` (see `kernels/native/matmul.py` for shapes and for what each kind is).
//
// A weight lies in panels of 64 outputs; a panel is a row of steps, a step is 256 bytes: four vectors of sixteen lanes, an output in each
// lane, with as many consecutive inputs in a lane as fit into its 32 bits. So a panel is read once, in order, by one thread.
// Invariant: every output is one sum over the inputs in their order, however many rows there are: a row's result does not depend on
// the rows beside it.

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace novajax {
namespace {

namespace ffi = xla::ffi;

constexpr int kVectors = 4;
constexpr int kPanel = kVectors * kLanes;
constexpr int kStepBytes = kPanel * 4;
constexpr int64_t kBlockSteps = 64;    // 16 KiB of a panel: half of a first-level cache
constexpr int64_t kChunkRows = 96;     // 24 KiB of sums
constexpr int64_t kThreadBytes = 1 << 16;  // of weights, below which a second thread does not pay

// What a kind says: X (an activation), Sum (a vector of running sums), kInputs (of a step), kRows (at a time, by the number of registers),
// and Add, which adds the products of one step: weights at `w`, activations of row r at x[r * stride].

struct FloatByFloat {
  using X = float;
  using Sum = F16;
  static constexpr int kInputs = 1, kRows = 6;
  template <int R>
  static void Add(Sum (&sum)[R][kVectors], const X* x, int64_t stride, const char* w) {
    F16 wide[kVectors];
    for (int j = 0; j < kVectors; ++j) wide[j] = Load<F16>(w + 64 * j);
    for (int r = 0; r < R; ++r) {
      const F16 at = Spread<F16>(x[r * stride]);
      for (int j = 0; j < kVectors; ++j) sum[r][j] = Fma(at, wide[j], sum[r][j]);
    }
  }
};

// Weights that are turned into floats: Wide(raw, part) is input `part` of a step's lanes.
template <typename Form>
struct FloatByForm {
  using X = float;
  using Sum = F16;
  static constexpr int kInputs = Form::kInputs, kRows = 5;
  template <int R>
  static void Add(Sum (&sum)[R][kVectors], const X* x, int64_t stride, const char* w) {
    for (int part = 0; part < kInputs; ++part) {
      F16 wide[kVectors];
      for (int j = 0; j < kVectors; ++j) wide[j] = Form::Wide(Load<U16>(w + 64 * j), part);
      for (int r = 0; r < R; ++r) {
        const F16 at = Spread<F16>(x[r * stride + part]);
        for (int j = 0; j < kVectors; ++j) sum[r][j] = Fma(at, wide[j], sum[r][j]);
      }
    }
  }
};

struct Bf16Form {
  static constexpr int kInputs = 2;
  static F16 Wide(U16 raw, int part) { return part ? SecondHalf(raw) : FirstHalf(raw); }
};

struct Int8Form {
  static constexpr int kInputs = 4;
  static F16 Wide(U16 raw, int part) { return ToFloat(As<I16>(raw << (24 - 8 * part)) >> 24); }
};

struct Int4Form {
  static constexpr int kInputs = 8;
  static F16 Wide(U16 raw, int part) { return ToFloat(As<I16>((raw >> (8 * (part % 4) + 4 * (part / 4))) & 0xfu) - 8); }
};

struct Bf16ByBf16 {
  using X = uint16_t;
  using Sum = F16;
  static constexpr int kInputs = 2, kRows = 6;
  template <int R>
  static void Add(Sum (&sum)[R][kVectors], const X* x, int64_t stride, const char* w) {
    U16 raw[kVectors];
    for (int j = 0; j < kVectors; ++j) raw[j] = Load<U16>(w + 64 * j);
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      std::memcpy(&pair, x + r * stride, 4);
      const U16 at = Spread<U16>(pair);
      for (int j = 0; j < kVectors; ++j) sum[r][j] = DotBf16(sum[r][j], at, raw[j]);
    }
  }
};

// The processor multiplies unsigned by signed bytes: 128 is added to each activation, and 128 times the sum of the weights taken off later.
struct Int8ByInt8 {
  using X = int8_t;
  using Sum = I16;
  static constexpr int kInputs = 4, kRows = 6;
  template <int R>
  static void Add(Sum (&sum)[R][kVectors], const X* x, int64_t stride, const char* w) {
    I16 raw[kVectors];
    for (int j = 0; j < kVectors; ++j) raw[j] = Load<I16>(w + 64 * j);
    for (int r = 0; r < R; ++r) {
      uint32_t four;
      std::memcpy(&four, x + r * stride, 4);
      const U16 at = Spread<U16>(four ^ 0x80808080u);
      for (int j = 0; j < kVectors; ++j) sum[r][j] = DotBytes(sum[r][j], at, raw[j]);
    }
  }
};

// Weights are stored plus 8, so they are the unsigned side; 8 times the sum of a group's activations is taken off after each group.
struct Int8ByInt4 {
  using X = int8_t;
  using Sum = I16;
  static constexpr int kInputs = 8, kRows = 5;
  template <int R>
  static void Add(Sum (&sum)[R][kVectors], const X* x, int64_t stride, const char* w) {
    U16 raw[kVectors];
    for (int j = 0; j < kVectors; ++j) raw[j] = Load<U16>(w + 64 * j);
    for (int half = 0; half < 2; ++half) {
      U16 bytes[kVectors];
      for (int j = 0; j < kVectors; ++j) bytes[j] = (raw[j] >> (4 * half)) & 0x0f0f0f0fu;
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * stride + 4 * half, 4);
        const I16 at = Spread<I16>(four);
        for (int j = 0; j < kVectors; ++j) sum[r][j] = DotBytes(sum[r][j], bytes[j], at);
      }
    }
  }
};

struct Product {
  const void* x;  // [rows, inputs]
  int64_t rows, inputs, outputs, panels;
  const char* weights;     // [panels, inputs / kInputs, 256 bytes]
  const float* scale;      // [groups, panels * 64], or nothing
  const float* row_scale;  // [rows], or nothing
  const int32_t* sums;     // [panels * 64] of the weights, for int8 by int8
  int64_t group;           // inputs that share a scale, where there are groups
  float* out;              // [rows, outputs]
  std::vector<int32_t> group_sums;  // [rows, groups] of the activations, for int8 by int4
};

// R rows of one panel over the steps [first, last): sums go on from those at `held`, or begin at zero.
template <typename Kind, int R>
void Block(const typename Kind::X* x, int64_t stride, const char* panel, int64_t first, int64_t last, bool begin, typename Kind::Sum* held) {
  typename Kind::Sum sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kVectors; ++j) sum[r][j] = begin ? typename Kind::Sum{} : held[r * kVectors + j];
  }
  for (int64_t step = first; step < last; ++step) {
    const char* w = panel + step * kStepBytes;
    // The next block comes from memory while this one is multiplied; past the panel's end lies the next panel.
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(w + kBlockSteps * kStepBytes + 64 * j, 0, 2);
    Kind::template Add<R>(sum, x + step * Kind::kInputs, stride, w);
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kVectors; ++j) held[r * kVectors + j] = sum[r][j];
  }
}

template <typename Kind>
void Rows(int64_t rows, const typename Kind::X* x, int64_t stride, const char* panel, int64_t first, int64_t last, bool begin,
          typename Kind::Sum* held) {
  const int64_t blocks = (rows + Kind::kRows - 1) / Kind::kRows;
  for (int64_t block = 0, done = 0; block < blocks; ++block) {
    const int64_t now = (rows - done + blocks - block - 1) / (blocks - block);
    const auto* at = x + done * stride;
    auto* to = held + done * kVectors;
    switch (now) {
      case 1: Block<Kind, 1>(at, stride, panel, first, last, begin, to); break;
      case 2: Block<Kind, 2>(at, stride, panel, first, last, begin, to); break;
      case 3: Block<Kind, 3>(at, stride, panel, first, last, begin, to); break;
      case 4: Block<Kind, 4>(at, stride, panel, first, last, begin, to); break;
      case 5: Block<Kind, 5>(at, stride, panel, first, last, begin, to); break;
      default:
        if constexpr (Kind::kRows >= 6) Block<Kind, 6>(at, stride, panel, first, last, begin, to);
    }
    done += now;
  }
}

// One panel times `rows` rows from `first_row` on.
template <typename Kind>
void Panel(const Product& p, int64_t panel, int64_t first_row, int64_t rows) {
  using Sum = typename Kind::Sum;
  static thread_local std::vector<Sum> held, totals;
  const int64_t vectors = rows * kVectors;
  if (static_cast<int64_t>(held.size()) < vectors) held.resize(vectors);
  const int64_t steps = p.inputs / Kind::kInputs;
  const auto* x = static_cast<const typename Kind::X*>(p.x) + first_row * p.inputs;
  const char* weights = p.weights + panel * steps * kStepBytes;
  const float* scale = p.scale == nullptr ? nullptr : p.scale + panel * kPanel;
  static thread_local std::vector<F16> out;
  if (static_cast<int64_t>(out.size()) < vectors) out.resize(vectors);
  if (p.group) {
    const int64_t by = p.group / Kind::kInputs, groups = p.inputs / p.group;
    std::fill_n(out.begin(), vectors, F16{});
    for (int64_t group = 0; group < groups; ++group) {
      Rows<Kind>(rows, x, p.inputs, weights, group * by, (group + 1) * by, true, held.data());
      for (int64_t r = 0; r < rows; ++r) {
        for (int j = 0; j < kVectors; ++j) {
          F16 sum;
          if constexpr (std::is_same_v<Sum, I16>) {
            sum = ToFloat(held[r * kVectors + j] - 8 * p.group_sums[(first_row + r) * groups + group]);
          } else {
            sum = held[r * kVectors + j];
          }
          auto& total = out[r * kVectors + j];
          total = Fma(sum, Load<F16>(scale + group * p.panels * kPanel + j * kLanes), total);
        }
      }
    }
  } else {
    const int64_t by = rows <= Kind::kRows ? steps : kBlockSteps;
    for (int64_t first = 0; first < steps; first += by) {
      Rows<Kind>(rows, x, p.inputs, weights, first, std::min(steps, first + by), first == 0, held.data());
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        F16 sum;
        if constexpr (std::is_same_v<Sum, I16>) {
          sum = ToFloat(held[r * kVectors + j] - 128 * Load<I16>(p.sums + panel * kPanel + j * kLanes));
        } else {
          sum = held[r * kVectors + j];
        }
        out[r * kVectors + j] = scale == nullptr ? sum : sum * Load<F16>(scale + j * kLanes);
      }
    }
  }
  const int64_t here = std::min<int64_t>(kPanel, p.outputs - panel * kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    F16* found = out.data() + r * kVectors;
    if (p.row_scale != nullptr) {
      for (int j = 0; j < kVectors; ++j) found[j] *= p.row_scale[row];
    }
    std::memcpy(p.out + row * p.outputs + panel * kPanel, found, here * sizeof(float));
  }
}

template <typename Kind>
void Multiply(ffi::ThreadPool& pool, const Product& p) {
  const int64_t chunks = (p.rows + kChunkRows - 1) / kChunkRows;
  const int64_t bytes = p.inputs / Kind::kInputs * kStepBytes * std::min<int64_t>(p.rows, kChunkRows);
  ParallelFor(pool, p.panels * chunks, std::max<int64_t>(1, kThreadBytes / std::max<int64_t>(1, bytes)), [&](int64_t item) {
    const int64_t first = item % chunks * kChunkRows;
    Panel<Kind>(p, item / chunks, first, std::min(kChunkRows, p.rows - first));
  });
}

void SumGroups(ffi::ThreadPool& pool, Product& p) {
  const int64_t groups = p.inputs / p.group;
  p.group_sums.resize(p.rows * groups);
  ParallelFor(pool, p.rows, 64, [&](int64_t row) {
    const auto* x = static_cast<const int8_t*>(p.x) + row * p.inputs;
    for (int64_t group = 0; group < groups; ++group) {
      int32_t sum = 0;
      for (int64_t at = group * p.group; at < (group + 1) * p.group; ++at) sum += x[at];
      p.group_sums[row * groups + group] = sum;
    }
  });
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer row_scale, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
               ffi::AnyBuffer sums, int64_t group, ffi::Result<ffi::AnyBuffer> out) {
  Product p;
  p.x = x.untyped_data();
  p.rows = x.dimensions()[0];
  p.inputs = x.dimensions()[1];
  p.outputs = out->dimensions()[1];
  p.panels = weights.dimensions()[0];
  p.weights = static_cast<const char*>(weights.untyped_data());
  p.scale = scale.element_count() ? static_cast<const float*>(scale.untyped_data()) : nullptr;
  p.row_scale = row_scale.element_count() ? static_cast<const float*>(row_scale.untyped_data()) : nullptr;
  p.sums = static_cast<const int32_t*>(sums.untyped_data());
  p.group = group;
  p.out = static_cast<float*>(out->untyped_data());
  if (p.rows == 0) return ffi::Error::Success();
  const auto kind = std::make_pair(x.element_type(), weights.element_type());
  const auto is = [&](ffi::DataType one, ffi::DataType other) { return kind == std::make_pair(one, other); };
  if (is(ffi::F32, ffi::F32)) {
    Multiply<FloatByFloat>(pool, p);
  } else if (is(ffi::F32, ffi::BF16)) {
    Multiply<FloatByForm<Bf16Form>>(pool, p);
  } else if (is(ffi::BF16, ffi::BF16)) {
    Multiply<Bf16ByBf16>(pool, p);
  } else if (is(ffi::F32, ffi::S8)) {
    Multiply<FloatByForm<Int8Form>>(pool, p);
  } else if (is(ffi::S8, ffi::S8)) {
    Multiply<Int8ByInt8>(pool, p);
  } else if (is(ffi::F32, ffi::U8) && group > 0) {
    Multiply<FloatByForm<Int4Form>>(pool, p);
  } else if (is(ffi::S8, ffi::U8) && group > 0) {
    SumGroups(pool, p);
    Multiply<Int8ByInt4>(pool, p);
  } else {
    return ffi::Error::InvalidArgument("novajax_matmul: no product of these types");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace novajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(novajax_matmul, novajax::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Ret<xla::ffi::AnyBuffer>());
