// Attention over pages where they lie: `novajax_paged_attention` (see `kernels/attention.py` for what it computes).
//
// A thread takes some queries of one row and one KV head and goes over the row's pages, 64 tokens at a time, with running maximum and
// sum (online softmax, arXiv 1805.02867). It reads what the queries see and nothing behind it, so a table may be wider than its row.
// Rounded pages are turned into floats as they are met. All sums are float.

#include <algorithm>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace novajax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTile = 64;       // tokens at a time
constexpr int64_t kQueries = 48;    // rows of a thread's score matrix, about
constexpr int64_t kTransposed = 8;  // queries from which turning a tile of keys round pays
constexpr float kMasked = -1e30f;

// The keys of all layers, or the values: [L, P, K, page, H], with scales [L, P, K, page] where they are rounded.
struct Pages {
  const char* numbers;
  const float* scale;
  ffi::DataType type;
  int64_t pages, heads, page, dim;

  int64_t Row() const {  // bytes of a token's numbers
    return type == ffi::F32 ? dim * 4 : type == ffi::BF16 ? dim * 2 : type == ffi::U8 ? dim / 2 : dim;
  }

  // Tokens [first, first + count) of a page as floats, rows of `width` at `to`.
  void Read(int64_t layer, int64_t page_id, int64_t head, int64_t first, int64_t count, int64_t width, float* to) const {
    const int64_t block = ((layer * pages + page_id) * heads + head) * page + first;
    const char* from = numbers + block * Row();
    const int64_t vectors = dim / kLanes * kLanes;
    for (int64_t token = 0; token < count; ++token, from += Row(), to += width) {
      const float by = scale == nullptr ? 1.f : scale[block + token];
      if (type == ffi::F32) {
        std::memcpy(to, from, dim * 4);
      } else if (type == ffi::BF16) {
        for (int64_t h = 0; h < vectors; h += kLanes) Store(to + h, WidenBf16(from + 2 * h));
        for (int64_t h = vectors; h < dim; ++h) {
          uint16_t half;
          std::memcpy(&half, from + 2 * h, 2);
          to[h] = As<float>(static_cast<uint32_t>(half) << 16);
        }
      } else if (type == ffi::S8) {
        for (int64_t h = 0; h < vectors; h += kLanes) Store(to + h, WidenInt8(from + h) * by);
        for (int64_t h = vectors; h < dim; ++h) to[h] = static_cast<int8_t>(from[h]) * by;
      } else if (type == ffi::U8) {  // two int4 in a byte, the first half of a row in the low bits
        for (int64_t h = 0; h < dim / 2; ++h) {
          to[h] = static_cast<int8_t>(static_cast<uint8_t>(from[h]) << 4) / 16 * by;
          to[h + dim / 2] = (static_cast<int8_t>(from[h]) >> 4) * by;
        }
      } else {
        for (int64_t h = 0; h < dim; ++h) to[h] = FromE4m3(static_cast<uint8_t>(from[h])) * by;
      }
    }
  }

  // The block that a thread reads next comes from memory while it works on this one.
  void Fetch(int64_t layer, int64_t page_id, int64_t head, int64_t first, int64_t count) const {
    const char* from = numbers + (((layer * pages + page_id) * heads + head) * page + first) * Row();
    for (int64_t byte = 0; byte < count * Row(); byte += 64) __builtin_prefetch(from + byte, 0, 2);
  }

  static float FromE4m3(uint8_t v) {  // bias 7, no infinities; NaN never gets into a page
    const uint32_t exponent = (v >> 3) & 15, mantissa = v & 7;
    const float size = exponent ? As<float>((exponent + 120) << 23 | mantissa << 20) : mantissa * 0.001953125f;
    return v & 0x80 ? -size : size;
  }
};

struct Call {
  const void* q;  // [X, Y, N, H]
  bool half;      // q is bfloat16
  Pages keys, values;
  const int32_t *tables, *positions;  // [X, W], [X, Y]
  int64_t layer, rows, queries, heads, table, window;
  float scale, softcap;
  float *out, *lse;  // [X, Y, N, H], [X, Y, N]
};

struct Scratch {
  std::vector<float> q, k, v, scores, out, best, total;
};

// out[r] += scores[r] x values for R queries and the vectors [first, first + J) of the head.
template <int R, int J>
void Weigh(const float* scores, const float* values, int64_t tokens, int64_t width, float* out) {
  F16 sum[R][J];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) sum[r][j] = Load<F16>(out + r * width + j * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    F16 v[J];
    for (int j = 0; j < J; ++j) v[j] = Load<F16>(values + t * width + j * kLanes);
    for (int r = 0; r < R; ++r) {
      const F16 p = Spread<F16>(scores[r * kTile + t]);
      for (int j = 0; j < J; ++j) sum[r][j] = Fma(p, v[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) Store(out + r * width + j * kLanes, sum[r][j]);
  }
}

template <int J>
void WeighAll(int64_t queries, const float* scores, const float* values, int64_t tokens, int64_t width, float* out) {
  int64_t r = 0;
  for (; r + 4 <= queries; r += 4) Weigh<4, J>(scores + r * kTile, values, tokens, width, out + r * width);
  if (queries - r == 3) Weigh<3, J>(scores + r * kTile, values, tokens, width, out + r * width);
  if (queries - r == 2) Weigh<2, J>(scores + r * kTile, values, tokens, width, out + r * width);
  if (queries - r == 1) Weigh<1, J>(scores + r * kTile, values, tokens, width, out + r * width);
}

// scores[r][t] = q[r] . k[t], tokens rounded up to whole vectors.
void Score(int64_t queries, const float* q, const float* k, int64_t tokens, int64_t width, float* scores) {
  if (queries < kTransposed) {
    for (int64_t r = 0; r < queries; ++r) {
      for (int64_t t = 0; t < tokens; ++t) {
        F16 sum{};
        for (int64_t h = 0; h < width; h += kLanes) sum = Fma(Load<F16>(q + r * width + h), Load<F16>(k + t * width + h), sum);
        scores[r * kTile + t] = Sum(sum);
      }
    }
    return;
  }
  for (int64_t t = 0; t < tokens; t += kLanes) {
    for (int64_t r = 0; r < queries; ++r) Store(scores + r * kTile + t, F16{});
    for (int64_t h = 0; h < width; h += kLanes) {
      F16 turned[kLanes];
      for (int i = 0; i < kLanes; ++i) turned[i] = Load<F16>(k + (t + i) * width + h);
      Transpose(turned);
      for (int64_t r = 0; r < queries; ++r) {
        F16 sum[2] = {Load<F16>(scores + r * kTile + t), F16{}};
        for (int i = 0; i < kLanes; ++i) sum[i % 2] = Fma(Spread<F16>(q[r * width + h + i]), turned[i], sum[i % 2]);
        Store(scores + r * kTile + t, sum[0] + sum[1]);
      }
    }
  }
}

// Queries [first, last) of row x, for one KV head.
void Attend(const Call& c, int64_t x, int64_t head, int64_t first, int64_t last) {
  static thread_local Scratch s;
  const int64_t dim = c.keys.dim, width = (dim + kLanes - 1) / kLanes * kLanes, page = c.keys.page;
  const int64_t groups = c.heads / c.keys.heads, queries = (last - first) * groups;
  s.q.assign(queries * width, 0.f);
  s.out.assign(queries * width, 0.f);
  if (static_cast<int64_t>(s.k.size()) != kTile * width) {
    s.k.assign(kTile * width, 0.f);
    s.v.assign(kTile * width, 0.f);
  }
  s.scores.resize(queries * kTile);
  s.best.assign(queries, kMasked);
  s.total.assign(queries, 0.f);
  const int32_t* positions = c.positions + x * c.queries;
  int64_t low = INT64_MAX, high = -1;
  for (int64_t y = first; y < last; ++y) {
    if (positions[y] < 0) continue;
    low = std::min<int64_t>(low, c.window ? std::max<int64_t>(0, positions[y] - c.window + 1) : 0);
    high = std::max<int64_t>(high, positions[y]);
  }
  high = std::min(high, c.table * page - 1);
  const auto row_of = [&](int64_t r) { return (x * c.queries + first + r / groups) * c.heads + head * groups + r % groups; };
  for (int64_t r = 0; r < queries; ++r) {
    for (int64_t h = 0; h < dim; ++h) {
      float value;
      if (c.half) {
        value = As<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(c.q)[row_of(r) * dim + h]) << 16);
      } else {
        value = static_cast<const float*>(c.q)[row_of(r) * dim + h];
      }
      s.q[r * width + h] = value * c.scale;
    }
  }
  for (int64_t begin = low / page * page; begin <= high; begin += kTile) {
    const int64_t tokens = std::min(kTile, high + 1 - begin);
    for (int64_t t = 0; t < tokens;) {
      const int64_t at = begin + t, count = std::min(tokens - t, page - at % page);
      const int64_t id = std::clamp<int64_t>(c.tables[x * c.table + at / page], 0, c.keys.pages - 1);
      c.keys.Read(c.layer, id, head, at % page, count, width, s.k.data() + t * width);
      c.values.Read(c.layer, id, head, at % page, count, width, s.v.data() + t * width);
      t += count;
    }
    for (int64_t at = begin + tokens; at <= high && at < begin + tokens + kTile; at = (at / page + 1) * page) {
      const int64_t id = std::clamp<int64_t>(c.tables[x * c.table + at / page], 0, c.keys.pages - 1);
      const int64_t count = std::min({page - at % page, high + 1 - at, begin + tokens + kTile - at});
      c.keys.Fetch(c.layer, id, head, at % page, count);
      c.values.Fetch(c.layer, id, head, at % page, count);
    }
    Score(queries, s.q.data(), s.k.data(), tokens, width, s.scores.data());
    for (int64_t r = 0; r < queries; ++r) {
      float* scores = s.scores.data() + r * kTile;
      const int64_t to = positions[first + r / groups] - begin;  // the last token seen
      const int64_t from = c.window ? to - c.window + 1 : 0;
      F16 best = Spread<F16>(kMasked);
      for (int64_t t = 0; t < kTile; t += kLanes) {
        const I16 lane = kIota + static_cast<int32_t>(t);
        F16 score = Load<F16>(scores + t);
        if (c.softcap > 0) {
          const F16 size = score < 0.f ? -score : score;
          const F16 low_power = Exp(size * (-2.f / c.softcap));
          const F16 tanh = (1.f - low_power) / (1.f + low_power);
          score = c.softcap * (score < 0.f ? -tanh : tanh);
        }
        const I16 seen = (lane <= static_cast<int32_t>(std::min<int64_t>(to, tokens - 1))) & (lane >= static_cast<int32_t>(std::max<int64_t>(from, 0)));
        score = seen ? score : Spread<F16>(kMasked);
        Store(scores + t, score);
        best = Max(best, score);
      }
      const float now = std::max(s.best[r], Max(best));
      const float kept = s.best[r] == now ? 1.f : std::exp(s.best[r] - now);
      F16 sum{};
      for (int64_t t = 0; t < kTile; t += kLanes) {
        const F16 weight = Exp(Load<F16>(scores + t) - now);
        Store(scores + t, weight);
        sum += weight;
      }
      s.total[r] = s.total[r] * kept + Sum(sum);
      s.best[r] = now;
      if (kept != 1.f) {
        for (int64_t h = 0; h < width; h += kLanes) Store(s.out.data() + r * width + h, Load<F16>(s.out.data() + r * width + h) * kept);
      }
    }
    int64_t h = 0;
    for (; h + 4 * kLanes <= width; h += 4 * kLanes) WeighAll<4>(queries, s.scores.data(), s.v.data() + h, tokens, width, s.out.data() + h);
    for (; h < width; h += kLanes) WeighAll<1>(queries, s.scores.data(), s.v.data() + h, tokens, width, s.out.data() + h);
  }
  for (int64_t r = 0; r < queries; ++r) {
    const float share = s.total[r] > 0 ? 1.f / s.total[r] : 0.f;
    for (int64_t h = 0; h < dim; ++h) c.out[row_of(r) * dim + h] = s.out[r * width + h] * share;
    c.lse[row_of(r)] = s.best[r] + std::log(std::max(s.total[r], 1e-37f));
  }
}

Pages PagesOf(const ffi::AnyBuffer& numbers, const ffi::AnyBuffer& scale, int64_t dim) {
  const auto shape = numbers.dimensions();
  const auto* scales = scale.element_count() ? static_cast<const float*>(scale.untyped_data()) : nullptr;
  return {static_cast<const char*>(numbers.untyped_data()), scales, numbers.element_type(), shape[1], shape[2], shape[3], dim};
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer key_scale, ffi::AnyBuffer values,
               ffi::AnyBuffer value_scale, ffi::AnyBuffer tables, ffi::AnyBuffer positions, int64_t layer, float scale, int64_t window,
               float softcap, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse) {
  const auto shape = q.dimensions();
  Call c;
  c.q = q.untyped_data();
  c.half = q.element_type() == ffi::BF16;
  c.keys = PagesOf(keys, key_scale, shape[3]);
  c.values = PagesOf(values, value_scale, shape[3]);
  c.tables = static_cast<const int32_t*>(tables.untyped_data());
  c.positions = static_cast<const int32_t*>(positions.untyped_data());
  c.layer = layer;
  c.rows = shape[0];
  c.queries = shape[1];
  c.heads = shape[2];
  c.table = tables.dimensions()[1];
  c.window = window;
  c.scale = scale;
  c.softcap = softcap;
  c.out = static_cast<float*>(out->untyped_data());
  c.lse = static_cast<float*>(lse->untyped_data());
  const int64_t by = std::max<int64_t>(1, kQueries / (c.heads / c.keys.heads));
  const int64_t blocks = (c.queries + by - 1) / by, items = c.rows * c.keys.heads * blocks;
  // The last queries of a chunk see most, so they go first.
  ParallelFor(pool, items, 2, [&](int64_t item) {
    const int64_t block = blocks - 1 - item % blocks, head = item / blocks % c.keys.heads;
    Attend(c, item / blocks / c.keys.heads, head, block * by, std::min(c.queries, (block + 1) * by));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace novajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(novajax_paged_attention, novajax::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
