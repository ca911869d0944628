// New rows into their pages, in place: `novajax_write_pages` (see `kernels/attention.py`, write_pages).

#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace novajax {
namespace {

namespace ffi = xla::ffi;

// held [L, P, K, page, ...] is the result too; rows [T, K, ...]; a token whose page is not one of the P is dropped.
ffi::Error Run(ffi::AnyBuffer held, ffi::AnyBuffer rows, ffi::AnyBuffer pages, ffi::AnyBuffer offsets, int64_t layer,
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

}  // namespace
}  // namespace novajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(novajax_write_pages, novajax::Run,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Ret<xla::ffi::AnyBuffer>());
