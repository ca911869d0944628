// New rows for pages: rounded to int8 (`novajax_round_rows`, see `quant/cache.py`, rounded), and put into their places without a copy of the
// pages (`novajax_write_pages`, see `kernels/attention.py`, write_pages).

#include <cstring>

#include "activations.h"

namespace novajax {
namespace {

// held [L, P, K, page, ...] is the result too; rows [T, K, ...]; a token whose page is not one of the P is dropped.
ffi::Error Write(ffi::AnyBuffer held, ffi::AnyBuffer rows, ffi::AnyBuffer pages, ffi::AnyBuffer offsets, int64_t layer,
               ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = held.dimensions();
  const int64_t count = shape[1], heads = shape[2], page = shape[3], tokens = rows.dimensions()[0];
  const int64_t bytes = tokens * heads == 0 ? 0 : static_cast<int64_t>(rows.size_bytes()) / (tokens * heads);
  if (out->untyped_data() != held.untyped_data()) return ffi::Error::Internal("novajax_write_pages: the pages were copied");
  auto* to = static_cast<char*>(out->untyped_data());
  const auto* from = static_cast<const char*>(rows.untyped_data());
  const auto *ids = static_cast<const int32_t*>(pages.untyped_data()), *places = static_cast<const int32_t*>(offsets.untyped_data());
  for (int64_t token = 0; token < tokens; ++token) {
    if (ids[token] < 0 || ids[token] >= count) continue;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = (((layer * count + ids[token]) * heads + head) * page) + places[token];
      std::memcpy(to + at * bytes, from + (token * heads + head) * bytes, bytes);
    }
  }
  return ffi::Error::Success();
}

// x [..., H] to int8 of that shape, and a scale for each row of H.
ffi::Error RoundRows(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> numbers, ffi::Result<ffi::AnyBuffer> scale) {
  const int64_t dim = x.dimensions().back(), rows = dim ? static_cast<int64_t>(x.element_count()) / dim : 0;
  auto* to = static_cast<int8_t*>(numbers->untyped_data());
  auto* scales = static_cast<float*>(scale->untyped_data());
  for (int64_t row = 0; row < rows; ++row) Round(x, row, dim, dim, to + row * dim, scales + row);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace novajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(novajax_round_rows, novajax::RoundRows,
                              xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(novajax_write_pages, novajax::Write,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Ret<xla::ffi::AnyBuffer>());
