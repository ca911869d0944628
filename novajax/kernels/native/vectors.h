// Sixteen lanes, on any processor: the compiler's vector types, with the processor's own dot products where it has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace novajax {

constexpr int kLanes = 16;
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

template <typename V, typename T>
inline V Load(const T* from) {
  V v;
  static_assert(sizeof(V) == 64);
  std::memcpy(&v, from, 64);
  return v;
}

template <typename V, typename T>
inline void Store(T* to, V v) {
  std::memcpy(to, &v, 64);
}

template <typename V, typename T>
inline V Spread(T value) {
  return V{} + value;
}

template <typename To, typename From>
inline To As(From v) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));

// Sixteen bfloat16, or int8, as floats.
inline F16 WidenBf16(const void* from) {
  Halves16 v;
  std::memcpy(&v, from, sizeof(v));
  return As<F16>(__builtin_convertvector(v, U16) << 16);
}

inline F16 WidenInt8(const void* from) {
  Bytes16 v;
  std::memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, F16);
}

inline F16 ToFloat(I16 v) { return __builtin_convertvector(v, F16); }

inline F16 Fma(F16 a, F16 b, F16 sum) {
#if defined(__AVX512F__)
  return As<F16>(_mm512_fmadd_ps(As<__m512>(a), As<__m512>(b), As<__m512>(sum)));
#else
  return a * b + sum;
#endif
}

// Of 32 bit lanes with two bfloat16 each: the first and the second, as floats.
inline F16 FirstHalf(U16 pairs) { return As<F16>(pairs << 16); }
inline F16 SecondHalf(U16 pairs) { return As<F16>(pairs & 0xffff0000u); }

// sum + a0 * b0 + a1 * b1 of lanes with two bfloat16 each.
inline F16 DotBf16(F16 sum, U16 a, U16 b) {
#if defined(__AVX512BF16__)
  return As<F16>(_mm512_dpbf16_ps(As<__m512>(sum), As<__m512bh>(a), As<__m512bh>(b)));
#else
  return Fma(SecondHalf(a), SecondHalf(b), Fma(FirstHalf(a), FirstHalf(b), sum));
#endif
}

// sum + the four products of bytes in each lane: a unsigned, b signed.
inline I16 DotBytes(I16 sum, U16 a, I16 b) {
#if defined(__AVX512VNNI__)
  return As<I16>(_mm512_dpbusd_epi32(As<__m512i>(sum), As<__m512i>(a), As<__m512i>(b)));
#else
  for (int byte = 0; byte < 4; ++byte) {
    sum += As<I16>((a >> (8 * byte)) & 0xffu) * ((b << (24 - 8 * byte)) >> 24);
  }
  return sum;
#endif
}

// Halves are added to halves.
inline float Sum(F16 v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
  return v[0] + v[1];
}

// The 16 x 16 transpose of sixteen vectors, in place: four rounds of interleaving the halves.
inline void Transpose(F16 (&v)[kLanes]) {
  for (int round = 0; round < 4; ++round) {
    F16 next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

constexpr I16 kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline F16 Max(F16 a, F16 b) { return a > b ? a : b; }

inline float Max(F16 v) {
  v = Max(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
  v = Max(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
  v = Max(v, __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3));
  return v[0] > v[1] ? v[0] : v[1];
}

// e^v to about one unit in the last place for v in [-87, 0], 0 below: 2^n times a Taylor series of e^r, |r| <= ln(2) / 2.
inline F16 Exp(F16 v) {
  const F16 scaled = v * 1.44269504088896341f;
  const I16 n = __builtin_convertvector(scaled - 0.5f, I16);  // towards zero: v <= 0
  const F16 whole = ToFloat(n);
  const F16 r = Fma(whole, Spread<F16>(-1.428606820e-6f), Fma(whole, Spread<F16>(-0.693145752f), v));
  F16 sum = Spread<F16>(1.f / 5040);
  for (const float term : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) sum = Fma(sum, r, Spread<F16>(term));
  const F16 power = As<F16>((n + 127) << 23);
  return v < -87.f ? F16{} : sum * power;
}

}  // namespace novajax
