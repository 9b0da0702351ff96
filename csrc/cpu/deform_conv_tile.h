// What both passes of deform_conv2d do with a tile: where it samples, and its pixels in memory. Included once for each
// instruction set (isa.h).

namespace dcnv2::cpu::DCNV2_ISA {

// Where the taps of one offset group sample for a tile of pixels, and with what weights
template <typename acc_t>
struct TileSamples {
  int64_t plane;  // [taps, tile] is the shape of each of the eleven
  Buffer<int32_t> indices;
  Buffer<acc_t> weights, places;

  explicit TileSamples(int64_t taps) : plane(taps * tile), indices(4 * plane), weights(4 * plane), places(3 * plane) {}

  // `offset` and `mask` (or null) are those of the tile's image. A neighbour's index counts from `origin`; `outside`
  // stands for one that counts as zero.
  void locate(
      const DeformConvShape& s, const acc_t* offset, const acc_t* mask, int64_t offset_group, const Tile& area,
      int32_t origin, int32_t outside) {
    const int32_t height = s.in_height, width = s.in_width, beyond = height * width, stride = s.stride_w;
    const int64_t plane = this->plane;  // which the loop below must know to be constant
    for (int64_t k = 0; k < s.taps(); ++k) {
      const int64_t first_plane = (offset_group * s.taps() + k) * s.out_pixels();
      for (int64_t row = 0; row < area.rows; ++row) {
        const int64_t pixel = (area.row + row) * s.out_width + area.column, at = k * tile + row * area.columns;
        const acc_t *const move_y = offset + 2 * first_plane + pixel, *const move_x = move_y + s.out_pixels();
        const acc_t* const factor = mask ? mask + first_plane + pixel : nullptr;
        const acc_t tap_y = s.tap_y(area.row + row, k / s.kernel_w);
        const int32_t tap_x = s.tap_x(area.column, k % s.kernel_w), count = area.columns;
        int32_t* const index = indices.data() + at;
        acc_t *const weight = weights.data() + at, *const place = places.data() + at;
        DCNV2_SIMD
        for (int32_t i = 0; i < count; ++i) {
          const auto sample = sample_zero_padded<acc_t, int32_t>(
              tap_y + move_y[i], acc_t(tap_x + i * stride) + move_x[i], height, width);
          const acc_t modulation = factor ? factor[i] : acc_t(1);
          acc_t w[4];
          sample.weights(w);
          for (int j = 0; j < 4; ++j) {
            index[j * plane + i] = sample.index[j] == beyond ? outside : sample.index[j] - origin;
            weight[j * plane + i] = modulation * w[j];
          }
          place[i] = sample.ly, place[plane + i] = sample.lx, place[2 * plane + i] = modulation;
        }
      }
    }
  }

  int64_t index(int64_t at, int j) const { return indices.data()[j * plane + at]; }
  acc_t weight(int64_t at, int j) const { return weights.data()[j * plane + at]; }
};

// The rows begin .. end - 1 of all images, in channels last
template <typename scalar_t, typename map_t, typename acc_t>
void lay_out_rows(
    const DeformConvShape& s, const Images<map_t>& to, const Images<const scalar_t>& from, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / s.in_height, pixel = row % s.in_height * s.in_width;
    load_pixels<acc_t>(to.at(n, 0, pixel), to.pixel, from, n, 0, pixel, s.in_width, s.in_channels);
  }
}

// One output's weights of a block at some taps, in the order of the columns
template <typename element_t, typename scalar_t>
inline void order_weights(
    element_t* to, const Weight<const scalar_t>& weight, const Block& block, int64_t output, int64_t tap,
    int64_t taps) {
  const scalar_t* const from = weight.data + (block.output + output) * weight.output +
                               block.channel_in_group * weight.channel + tap * weight.tap;
  for (int64_t c = 0; c < block.channels; ++c)
    for (int64_t k = 0; k < taps; ++k)
      to[k * block.channels + c] = static_cast<element_t>(from[c * weight.channel + k * weight.tap]);
}

}  // namespace dcnv2::cpu::DCNV2_ISA
