// A matrix product that keeps its sums in registers and runs inside a parallel loop. Included once for each instruction
// set (isa.h).

namespace dcnv2::cpu::DCNV2_ISA {

// Rows and columns of the result that stay in registers: their sums take 28 of 32, or 12 of 16 of them. Columns are the
// width that b is filled up to.
constexpr int64_t block_rows = vector_bytes == 64 ? 14 : 6;
template <typename acc_t>
constexpr int64_t panel = 2 * lanes<acc_t>;

template <typename value_t>
inline void multiply_add(Vector<value_t>& sum, value_t a, const Vector<value_t>& b) {
  sum += a * b;
}
#if DCNV2_BFLOAT16_PAIRS
inline void multiply_add(Vector<float>& sum, Bfloat16Pair a, const Vector<Bfloat16Pair>& b) {
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}
#endif

// out [rows, vectors * lanes] = a [rows, count] * b [count, vectors * lanes], added to what is there if `add`. `a_row`
// and `a_step` are the distances of a's rows and columns, `b_step` of b's rows.
template <int rows, int vectors, int64_t a_row, int64_t a_step, int64_t b_step, typename acc_t, typename factor_t>
inline void multiply_block(
    acc_t* out, int64_t out_stride, const factor_t* a, const factor_t* b, int64_t count, bool add) {
  Vector<acc_t> sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v)
      sums[i][v] = add ? load(out + i * out_stride + v * lanes<acc_t>) : Vector<acc_t>{};
  for (; count > 0; --count, a += a_step, b += b_step) {
    Vector<factor_t> right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = load(b + v * lanes<factor_t>);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) multiply_add(sums[i][v], a[i * a_row], right[v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(out + i * out_stride + v * lanes<acc_t>, sums[i][v]);
}

// The last rows: the smallest even block that holds them, which for an odd number computes one row more than there is.
template <int rows, int vectors, int64_t a_row, int64_t a_step, int64_t b_step, typename acc_t, typename factor_t>
inline void multiply_rest(
    int64_t left, acc_t* out, int64_t out_stride, const factor_t* a, const factor_t* b, int64_t count, bool add) {
  if constexpr (rows > 0) {
    if (left > rows - 2) {
      multiply_block<rows, vectors, a_row, a_step, b_step>(out, out_stride, a, b, count, add);
    } else {
      multiply_rest<rows - 2, vectors, a_row, a_step, b_step>(left, out, out_stride, a, b, count, add);
    }
  }
}

// The same for any number of rows (for an odd one, out and a must have room for another) and the width that is left,
// of which one panel is taken.
template <int64_t a_row, int64_t a_step, int64_t b_step, typename acc_t, typename factor_t>
inline void multiply(
    acc_t* out, int64_t out_stride, const factor_t* a, const factor_t* b, int64_t rows, int64_t width, int64_t count,
    bool add) {
  for (; rows > 0; rows -= block_rows, out += block_rows * out_stride, a += block_rows * a_row) {
    if (width > lanes<acc_t>) {
      multiply_rest<block_rows, 2, a_row, a_step, b_step>(
          std::min(rows, block_rows), out, out_stride, a, b, count, add);
    } else {
      multiply_rest<block_rows, 1, a_row, a_step, b_step>(
          std::min(rows, block_rows), out, out_stride, a, b, count, add);
    }
  }
}

}  // namespace dcnv2::cpu::DCNV2_ISA
