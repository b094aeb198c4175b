// bfloat16 without loss in about two thirds of its bytes: the exponents are coded, since few of them occur
// often; signs and mantissas look random and stay as they are. Every bit pattern comes back, NaN payloads, -0
// and denormals too. The idea is ZipNN's (Hershcovitch et al., 2024) and DFloat11's (Zhang et al., 2025).
//
// The code is Huffman's with at most 11 bits a symbol, optimal by package-merge (Larmore and Hirschberg, JACM
// 1990), in its canonical form. On Gaussian data an exponent takes 2.6 bits, and an element 10.6 of 16.
//
// The wire is blocks of 65536 elements, of which the last may be shorter. A block of n elements is
//
//   uint32             the bytes that follow; 2n: these are the elements as they are
//   n bytes            of each element the sign (bit 7) and the mantissa
//   2 bytes            the least and the largest exponent that occur
//   a nibble each      for the exponents from the least to the largest, the low nibble first: the length of its
//                      code plus 1, or 0 if it does not occur
//   3 uint32           the bytes of the first three streams; the fourth takes the rest
//   four streams       of codes, each of a quarter of the elements in order (rounded up; the last ones get
//                      fewer), in the order of bits from low to high
//
// in little-endian order. Codes are given out by length, then by exponent, and begin with their high bit. An
// exponent that occurs alone has a code of length 0, and the streams are empty. A block that would not save 8
// bytes is stored as it is, so the wire is never larger than the bound.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm::kernels {

// The most bytes that `count` elements take: their own, and 4 for each block.
int64_t lossless_bound(int64_t count);

// Encodes `count` elements; returns how many bytes of `wire` they took. It has room for lossless_bound(count),
// and bytes there that were not taken may be overwritten too. Here as below, `x` and `wire` may lie at any
// address.
size_t lossless_encode(const void* x, size_t count, void* wire);

// Decodes `count` elements; returns how many of the `bytes` of `wire` they took. The bytes may be anything:
// throws ValueError for what no encode has made, and never reads or writes past either end. `x` is undefined
// then.
size_t lossless_decode(const void* wire, size_t bytes, void* x, size_t count);

}  // namespace pycomm::kernels
