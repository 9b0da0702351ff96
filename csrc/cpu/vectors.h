// Vectors as wide as the registers, and the memory on either side of them. Included once for each instruction set
// (isa.h).

#if !defined(__GNUC__) || defined(__clang__)
#error "the CPU operators are written with GCC's vectors: compile them with GCC 12 or later"
#endif

namespace dcnv2::cpu::DCNV2_ISA {

constexpr int64_t vector_bytes = DCNV2_VECTOR_BYTES;

// GCC's vectors; loads and stores of them need no alignment.
template <typename value_t>
struct VectorOf {
  typedef value_t type __attribute__((vector_size(vector_bytes), aligned(alignof(value_t)), may_alias));
};
template <typename value_t>
using Vector = typename VectorOf<value_t>::type;

template <typename value_t>
constexpr int64_t lanes = vector_bytes / sizeof(value_t);

// The type of a lane's number in a shuffle
template <typename value_t>
using lane_t = std::conditional_t<sizeof(value_t) == 8, int64_t, int32_t>;

template <typename value_t>
inline Vector<value_t> load(const value_t* from) {
  return *reinterpret_cast<const Vector<value_t>*>(from);
}
template <typename value_t>
inline void store(value_t* to, const Vector<value_t>& value) {
  *reinterpret_cast<Vector<value_t>*>(to) = value;
}

// A vector of acc_t from values of another type
template <typename acc_t, typename value_t>
inline Vector<acc_t> load_as(const value_t* from) {
  if constexpr (std::is_same_v<acc_t, value_t>) {
    return load(from);
  } else if constexpr (std::is_same_v<value_t, at::BFloat16>) {
    typedef uint16_t bits_t __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));
    return (Vector<acc_t>)(__builtin_convertvector(*reinterpret_cast<const bits_t*>(from), Vector<uint32_t>) << 16);
  } else {
    Vector<acc_t> value;
    for (int64_t i = 0; i < lanes<acc_t>; ++i) value[i] = static_cast<acc_t>(from[i]);
    return value;
  }
}
template <typename acc_t, typename value_t>
inline void store_as(value_t* to, const Vector<acc_t>& value) {
  if constexpr (std::is_same_v<acc_t, value_t>) {
    store(to, value);
#if DCNV2_BFLOAT16_PAIRS
  } else if constexpr (std::is_same_v<value_t, at::BFloat16>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#endif
  } else {
    for (int64_t i = 0; i < lanes<acc_t>; ++i) to[i] = static_cast<value_t>(value[i]);
  }
}

// In each vector, trades the lanes whose number has the bit `step` with those of its partner that do not have it: half
// of the work of a transposition.
template <int64_t step, typename value_t>
inline void trade_lanes(Vector<value_t> (&v)[lanes<value_t>]) {
  Vector<lane_t<value_t>> low, high;
  for (int64_t i = 0; i < lanes<value_t>; ++i) {
    low[i] = i & step ? lanes<value_t> + i - step : i;
    high[i] = i & step ? lanes<value_t> + i : i + step;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes<value_t>; ++i) {
    if (i & step) continue;
    const Vector<value_t> a = v[i], b = v[i + step];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + step] = __builtin_shuffle(a, b, high);
  }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns
template <typename acc_t, typename to_t, typename from_t>
inline void transpose(
    to_t* to, int64_t to_stride, const from_t* from, int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int64_t side = lanes<acc_t>;
  for (int64_t j = 0; j < columns; j += side) {
    for (int64_t i = 0; i < rows; i += side) {
      if (i + side <= rows && j + side <= columns) {
        Vector<acc_t> square[side];
#pragma GCC unroll 16
        for (int64_t k = 0; k < side; ++k) square[k] = load_as<acc_t>(from + (i + k) * from_stride + j);
        trade_lanes<1, acc_t>(square);
        if constexpr (side > 2) trade_lanes<2, acc_t>(square);
        if constexpr (side > 4) trade_lanes<4, acc_t>(square);
        if constexpr (side > 8) trade_lanes<8, acc_t>(square);
#pragma GCC unroll 16
        for (int64_t k = 0; k < side; ++k) store_as<acc_t>(to + (j + k) * to_stride + i, square[k]);
      } else {
        for (int64_t n = j; n < std::min(j + side, columns); ++n)
          for (int64_t m = i; m < std::min(i + side, rows); ++m)
            to[n * to_stride + m] = static_cast<to_t>(static_cast<acc_t>(from[m * from_stride + n]));
      }
    }
  }
}

// to[i * to_stride + j] = from[i * from_stride + j] for i < rows, j < columns
template <typename to_t, typename from_t>
inline void copy(to_t* to, int64_t to_stride, const from_t* from, int64_t from_stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = static_cast<to_t>(from[i * from_stride + j]);
}

// Pixels of an image of either layout, from `channel` and `pixel` on, to or from rows of channels that begin `stride`
// elements apart
template <typename acc_t, typename row_t, typename scalar_t>
inline void load_pixels(
    row_t* rows, int64_t stride, const Images<const scalar_t>& from, int64_t n, int64_t channel, int64_t pixel,
    int64_t pixels, int64_t channels) {
  if (from.pixel == 1) {
    transpose<acc_t>(rows, stride, from.at(n, channel, pixel), from.channel, channels, pixels);
  } else if (from.channel == 1) {
    copy(rows, stride, from.at(n, channel, pixel), from.pixel, pixels, channels);
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c)
        rows[p * stride + c] = static_cast<row_t>(*from.at(n, channel + c, pixel + p));
  }
}
template <typename acc_t, typename scalar_t>
inline void store_pixels(
    const Images<scalar_t>& to, int64_t n, int64_t channel, int64_t pixel, const acc_t* rows, int64_t stride,
    int64_t pixels, int64_t channels) {
  if (to.pixel == 1) {
    transpose<acc_t>(to.at(n, channel, pixel), to.channel, rows, stride, pixels, channels);
  } else if (to.channel == 1) {
    copy(to.at(n, channel, pixel), to.pixel, rows, stride, pixels, channels);
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c)
        *to.at(n, channel + c, pixel + p) = static_cast<scalar_t>(rows[p * stride + c]);
  }
}

}  // namespace dcnv2::cpu::DCNV2_ISA
