// What one thread does in the forward pass of deform_conv2d. Included once for each instruction set (isa.h).

namespace dcnv2::cpu::DCNV2_ISA {

// columns [pixels, taps, channels] = weighted sums of four neighbours. `channels` may be a constant, which the compiler
// makes use of.
template <typename column_t, typename acc_t, typename map_t, typename channels_t>
inline void sample_columns(
    column_t* columns, const map_t* map, const map_t* zeros, const TileSamples<acc_t>& samples, int64_t in_pixels,
    int64_t map_stride, int64_t tap, int64_t taps, int64_t pixels, channels_t channels) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t sample = (tap + k) * tile + p;
      const map_t* v[4];
      acc_t w[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t index = samples.index(sample, j);
        v[j] = index == in_pixels ? zeros : map + index * map_stride;
        w[j] = samples.weight(sample, j);
      }
      column_t* const column = columns + p * forward_stride + k * channels;
      int64_t c = 0;
      for (; c + lanes<acc_t> <= channels; c += lanes<acc_t>) {
        store_as<acc_t>(
            column + c, w[0] * load_as<acc_t>(v[0] + c) + w[1] * load_as<acc_t>(v[1] + c) +
                            w[2] * load_as<acc_t>(v[2] + c) + w[3] * load_as<acc_t>(v[3] + c));
      }
      for (; c < channels; ++c) {
        column[c] = static_cast<column_t>(
            w[0] * acc_t(v[0][c]) + w[1] * acc_t(v[1][c]) + w[2] * acc_t(v[2][c]) + w[3] * acc_t(v[3][c]));
      }
    }
  }
}

// The weights of blocks and output panels begin .. end - 1, in the order in which forward_rows takes them
template <typename scalar_t, typename map_t, typename acc_t, typename column_t, typename factor_t>
void pack_weights(const ForwardCall<scalar_t, map_t, acc_t, factor_t>& call, int64_t begin, int64_t end) {
  constexpr int64_t pair = sizeof(factor_t) / sizeof(column_t);
  const DeformConvShape& s = call.s;
  const int64_t outputs = s.out_channels / s.groups, panels = ceil_div(outputs, panel<acc_t>);
  const Buffer<column_t> rows(panel<acc_t> * forward_width);
  for (int64_t item = begin; item < end; ++item) {
    const Block& block = call.blocks[item / panels];
    const int64_t first = item % panels * panel<acc_t>, used = std::min(panel<acc_t>, outputs - first);
    for (int64_t tap = 0; tap < s.taps(); tap += chunk_taps) {
      const int64_t taps = std::min(chunk_taps, s.taps() - tap), width = taps * block.channels;
      for (int64_t o = 0; o < used; ++o) {
        order_weights(rows.data() + o * forward_width, call.weight, block, first + o, tap, taps);
      }
      for (int64_t o = used; o < panel<acc_t>; ++o) std::fill_n(rows.data() + o * forward_width, width, column_t(0));
      const int64_t at = (block.channel * s.taps() + tap * block.channels) * panels + item % panels * width;
      transpose<factor_t>(
          call.weights + at / pair * panel<acc_t>, panel<acc_t>, reinterpret_cast<const factor_t*>(rows.data()),
          forward_width / pair, panel<acc_t>, width / pair);
    }
  }
}

// The rows begin .. end - 1 of TileRows: sampled into columns, a chunk at a time, and multiplied at once.
template <typename scalar_t, typename map_t, typename acc_t, typename column_t, typename factor_t>
void forward_rows(const ForwardCall<scalar_t, map_t, acc_t, factor_t>& call, int64_t begin, int64_t end) {
  constexpr int64_t pair = sizeof(factor_t) / sizeof(column_t);
  const DeformConvShape& s = call.s;
  const TileRows rows(s);
  const int64_t rows_of_image = rows.columns * rows.height;
  const int64_t outputs = s.out_channels / s.groups, padded = rounded_up(outputs, lanes<acc_t>),
                width = s.groups * padded;
  const int64_t most = std::min(tile, rounded_up((end - begin) * tile_width, 2));
  TileSamples<acc_t> samples(s.taps());
  const Buffer<column_t> columns(most * forward_stride);
  const Buffer<acc_t> sums(most * width);
  for (int64_t at = begin; at < end;) {
    const int64_t rows_before = at / rows_of_image * rows_of_image;
    const Tile area = rows.tile_at({at / rows_of_image, 0, s.out_height, 0, true}, at - rows_before, end - rows_before);
    at += area.rows;
    const int64_t pixels = area.pixels();
    for (int64_t p = 0; p < pixels; ++p) std::copy_n(call.bias, width, sums.data() + p * width);
    const map_t* const map = call.map + area.image * s.in_pixels() * call.map_stride;
    const factor_t* weights = call.weights;
    int64_t located = -1;
    for (const Block& block : call.blocks) {
      const int64_t channels = block.channels;
      if (block.offset_group != located) {
        located = block.offset_group;
        const int64_t plane = area.image * s.offset_groups * s.taps() * s.out_pixels();
        samples.locate(
            s, call.offset + 2 * plane, call.mask ? call.mask + plane : nullptr, located, area, 0,
            static_cast<int32_t>(s.in_pixels()));
      }
      for (int64_t tap = 0; tap < s.taps(); tap += chunk_taps) {
        const int64_t taps = std::min(chunk_taps, s.taps() - tap), count = taps * channels;
        const auto sample = [&](auto channels) {
          sample_columns(
              columns.data(), map + block.channel, call.zeros, samples, s.in_pixels(), call.map_stride, tap, taps,
              pixels, channels);
        };
        if (channels == forward_channels) {
          sample(std::integral_constant<int64_t, forward_channels>());
        } else {
          sample(channels);
        }
        for (int64_t o = 0; o < outputs; o += panel<acc_t>, weights += count / pair * panel<acc_t>) {
          multiply<forward_stride / pair, 1, panel<acc_t>>(
              sums.data() + block.group * padded + o, width, reinterpret_cast<const factor_t*>(columns.data()), weights,
              pixels, outputs - o, count / pair, true);
        }
      }
    }
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t row = 0; row < area.rows; ++row) {
        store_pixels(
            call.output, area.image, g * outputs, (area.row + row) * s.out_width + area.column,
            sums.data() + row * area.columns * width + g * padded, width, area.columns, outputs);
      }
    }
  }
}

}  // namespace dcnv2::cpu::DCNV2_ISA
