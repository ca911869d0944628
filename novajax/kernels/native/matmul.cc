// Rows of activations times packed weights: `novajax_matmul` (see `kernels/native/matmul.py` for shapes and for what each kind is).
//
// A weight lies in panels of 64 outputs; a panel is a row of steps, a step is 256 bytes: four vectors of sixteen lanes, an output in each
// lane, with as many consecutive inputs in a lane as fit into its 32 bits. So a panel is read once, in order, by one thread.
// Invariant: every output is one sum over the inputs in their order, however many rows there are: a row's result does not depend on
// the rows beside it.

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "activations.h"
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

// Activations as a kind takes them, and one of the weights that they meet.
struct Product {
  const void* x;  // [rows, inputs]
  int64_t rows, inputs;
  const float* row_scale;     // [rows], or nothing
  const int32_t* group_sums;  // [rows, groups] of the activations, for int8 by int4
  int64_t group;              // inputs that share a scale; 0: all
  int64_t outputs, panels;
  const char* weights;  // [panels, inputs / kInputs, 256 bytes]
  const float* scale;   // [groups, panels * 64]; for int8 the scales, then the sums of the weights over the inputs; or nothing
  float* out;           // [rows, outputs]
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
          sum = ToFloat(held[r * kVectors + j] - 128 * __builtin_convertvector(Load<F16>(scale + p.panels * kPanel + j * kLanes), I16));
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
void Multiply(ffi::ThreadPool& pool, const std::vector<Product>& products) {
  const Product& one = products.front();
  const int64_t chunks = (one.rows + kChunkRows - 1) / kChunkRows;
  const int64_t bytes = one.inputs / Kind::kInputs * kStepBytes * std::min<int64_t>(one.rows, kChunkRows);
  int64_t panels = 0;
  for (const Product& p : products) panels += p.panels;
  ParallelFor(pool, panels * chunks, std::max<int64_t>(1, kThreadBytes / std::max<int64_t>(1, bytes)), [&](int64_t item) {
    const int64_t first = item % chunks * kChunkRows;
    int64_t panel = item / chunks;
    const Product* p = products.data();
    for (; panel >= p->panels; ++p) panel -= p->panels;
    Panel<Kind>(*p, panel, first, std::min(kChunkRows, p->rows - first));
  });
}

// x [rows, inputs], then each weight and its scales; a result for each weight.
ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs weights, int64_t group, bool rounded, ffi::RemainingRets out) {
  static thread_local Activations rows;
  static thread_local std::vector<Product> products;
  const auto first = weights.get<ffi::AnyBuffer>(0);
  if (!first) return first.error();
  const ffi::DataType type = first->element_type();
  const bool half = x.element_type() == ffi::BF16 && type == ffi::BF16;
  const int64_t filled = first->dimensions()[1] * InputsOf(type);
  Product p{};
  p.rows = x.dimensions()[0];
  if (p.rows == 0) return ffi::Error::Success();
  p.inputs = filled;
  p.group = group;
  p.x = Prepare(pool, x, rounded, half, filled, group, rows);
  p.row_scale = rounded ? rows.scale.data() : nullptr;
  p.group_sums = rows.group_sums.data();
  products.clear();
  for (size_t i = 0; i < out.size(); ++i) {
    const auto panels = weights.get<ffi::AnyBuffer>(2 * i), scale = weights.get<ffi::AnyBuffer>(2 * i + 1);
    const auto result = out.get<ffi::AnyBuffer>(i);
    if (!panels) return panels.error();
    if (!scale) return scale.error();
    if (!result) return result.error();
    p.weights = static_cast<const char*>(panels->untyped_data());
    p.panels = panels->dimensions()[0];
    p.scale = scale->element_count() ? static_cast<const float*>(scale->untyped_data()) : nullptr;
    p.out = static_cast<float*>((*result)->untyped_data());
    p.outputs = (*result)->dimensions()[1];
    products.push_back(p);
  }
  if (type == ffi::F32 && !rounded) {
    Multiply<FloatByFloat>(pool, products);
  } else if (type == ffi::BF16 && !rounded) {
    half ? Multiply<Bf16ByBf16>(pool, products) : Multiply<FloatByForm<Bf16Form>>(pool, products);
  } else if (type == ffi::S8) {
    rounded ? Multiply<Int8ByInt8>(pool, products) : Multiply<FloatByForm<Int8Form>>(pool, products);
  } else if (type == ffi::U8 && group > 0) {
    rounded ? Multiply<Int8ByInt4>(pool, products) : Multiply<FloatByForm<Int4Form>>(pool, products);
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
                                  .RemainingArgs()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("rounded")
                                  .RemainingRets());
