// What one thread does in deform_conv2d, forward and backward, a tile of output pixels at a time. Included once for each
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

// Pixels of an image of either layout, from `channel` and `pixel` on, to or from rows of channels that begin `stride`
// elements apart
template <typename acc_t, typename row_t, typename scalar_t>
inline void load_pixels(
    row_t* rows, int64_t stride, const Images<const scalar_t>& from, int64_t n, int64_t channel, int64_t pixel,
    int64_t pixels, int64_t channels) {
  if (from.pixel == 1) {
    transpose<acc_t>(rows, stride, from.at(n, channel, pixel), from.channel, channels, pixels);
  } else {
    copy(rows, stride, from.at(n, channel, pixel), from.pixel, pixels, channels);
  }
}
template <typename acc_t, typename scalar_t>
inline void store_pixels(
    const Images<scalar_t>& to, int64_t n, int64_t channel, int64_t pixel, const acc_t* rows, int64_t stride,
    int64_t pixels, int64_t channels) {
  if (to.pixel == 1) {
    transpose<acc_t>(to.at(n, channel, pixel), to.channel, rows, stride, pixels, channels);
  } else {
    copy(to.at(n, channel, pixel), to.pixel, rows, stride, pixels, channels);
  }
}

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
    element_t* to, const Weight<const scalar_t>& weight, const Block& block, int64_t output, int64_t tap, int64_t taps) {
  const scalar_t* const from = weight.data + (block.output + output) * weight.output +
                               block.channel_in_group * weight.channel + tap * weight.tap;
  for (int64_t c = 0; c < block.channels; ++c)
    for (int64_t k = 0; k < taps; ++k)
      to[k * block.channels + c] = static_cast<element_t>(from[c * weight.channel + k * weight.tap]);
}

// --- forward

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
  const int64_t outputs = s.out_channels / s.groups, padded = rounded_up(outputs, lanes<acc_t>), width = s.groups * padded;
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
              columns.data(), map + block.channel, call.zeros, samples, s.in_pixels(), call.map_stride, tap, taps, pixels,
              channels);
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

// --- backward

// [a0 + a1, a2 + a3, .., b0 + b1, b2 + b3, ..]
template <typename acc_t>
inline Vector<acc_t> add_neighbours(const Vector<acc_t>& a, const Vector<acc_t>& b) {
  Vector<lane_t<acc_t>> even;
  for (int64_t i = 0; i < lanes<acc_t>; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// to [4] = the sums of the lanes of four vectors
template <typename acc_t>
inline void add_lanes(acc_t* to, const Vector<acc_t> (&v)[4]) {
  const Vector<acc_t> low = add_neighbours<acc_t>(v[0], v[1]), high = add_neighbours<acc_t>(v[2], v[3]);
  if constexpr (lanes<acc_t> == 2) {
    store(to, low);
    store(to + 2, high);
  } else {
    Vector<acc_t> sums = add_neighbours<acc_t>(low, high);
    for (int64_t width = lanes<acc_t> / 4; width > 1; width /= 2) sums = add_neighbours<acc_t>(sums, sums);
    for (int i = 0; i < 4; ++i) to[i] = sums[i];
  }
}

// The rows [begin, end) of the map that samples of a part of an image can touch
template <typename acc_t>
inline void touched_rows(
    const DeformConvShape& s, const acc_t* offset, const Part& part, int64_t offset_group, int64_t& begin,
    int64_t& end) {
  const acc_t height = s.in_height;
  acc_t least = height, most = -1;
  for (int64_t k = 0; k < s.taps(); ++k) {
    const acc_t* const move_y = offset + 2 * (offset_group * s.taps() + k) * s.out_pixels();
    for (int64_t row = part.begin; row < part.end; ++row) {
      const acc_t tap_y = s.tap_y(row, k / s.kernel_w);
      for (int64_t x = 0; x < s.out_width; ++x) {
        const acc_t y = tap_y + move_y[row * s.out_width + x];
        if (y > -1 && y < height) least = std::min(least, y), most = std::max(most, y);
      }
    }
  }
  begin = std::max<int64_t>(floor_to_index<int64_t>(least), 0);
  end = std::max(std::min<int64_t>(floor_to_index<int64_t>(most) + 2, s.in_height), begin);
}

// `columns` [pixels, taps, channels] holds the gradient of the columns. `by_sample` asks for dots [taps, tile, 4], its
// products with the four neighbours of each sample; `by_input` to add to the gradient of the map; `by_weight` to put the
// columns in its place. `channels` may be a constant, which the compiler makes use of.
template <bool by_input, bool by_sample, bool by_weight, typename acc_t, typename channels_t>
inline void backward_samples(
    acc_t* columns, acc_t* dots, acc_t* map_grad, const acc_t* map, const TileSamples<acc_t>& samples, int64_t tap,
    int64_t taps, int64_t pixels, channels_t channels) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t sample = (tap + k) * tile + p;
      const acc_t* v[4] = {};
      acc_t *d[4] = {}, w[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = samples.index(sample, j) * channels;
        if constexpr (by_sample || by_weight) v[j] = map + at;
        if constexpr (by_input) d[j] = map_grad + at;
        w[j] = samples.weight(sample, j);
      }
      acc_t *const column = columns + p * backward_stride + k * channels, *const dot = dots + sample * 4;
      Vector<acc_t> sums[4] = {};
      int64_t c = 0;
      for (; c + lanes<acc_t> <= channels; c += lanes<acc_t>) {
        Vector<acc_t> value = {}, grad = load(column + c);
        for (int j = 0; j < 4; ++j) {
          if constexpr (by_sample) sums[j] += grad * load(v[j] + c);
          if constexpr (by_weight) value += w[j] * load(v[j] + c);
          if constexpr (by_input) store(d[j] + c, load(d[j] + c) + w[j] * grad);
        }
        if constexpr (by_weight) store(column + c, value);
      }
      if constexpr (by_sample) add_lanes(dot, sums);
      for (; c < channels; ++c) {
        const acc_t grad = column[c];
        acc_t value = 0;
        for (int j = 0; j < 4; ++j) {
          if constexpr (by_sample) dot[j] += grad * v[j][c];
          if constexpr (by_weight) value += w[j] * v[j][c];
          if constexpr (by_input) d[j][c] += w[j] * grad;
        }
        if constexpr (by_weight) column[c] = value;
      }
    }
  }
}

// Turns the dots [taps, tile, 4] of a tile into derivatives by y, x and mask.
template <typename acc_t>
inline void derive_samples(acc_t* dots, const TileSamples<acc_t>& samples, int64_t taps, int64_t pixels) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t at = k * tile; at < k * tile + pixels; ++at) {
      ModulatedSample<acc_t> sample;
      sample.ly = samples.places.data()[at];
      sample.lx = samples.places.data()[samples.plane + at];
      sample.mask = samples.places.data()[2 * samples.plane + at];
      acc_t* const dot = dots + at * 4;
      sample.derivatives({dot[0], dot[1], dot[2], dot[3]}, dot[0], dot[1], dot[2]);
    }
  }
}

// Adds them to the gradients of offset (y, then x of each tap) and mask, which may be null: planes that are `stride`
// elements apart and have rows of `width`. A step of its own, so that no product is fused with a sum: what another
// thread has to add up later must have the same bits.
template <typename acc_t>
inline void add_derivatives(
    acc_t* offset_grad, acc_t* mask_grad, int64_t stride, int64_t width, const acc_t* derivatives, int64_t taps,
    const Tile& area) {
  for (int64_t k = 0; k < taps; ++k) {
    const acc_t* from = derivatives + k * tile * 4;
    for (int64_t row = 0; row < area.rows; ++row) {
      for (int64_t at = row * width; at < row * width + area.columns; ++at, from += 4) {
        offset_grad[2 * k * stride + at] += from[0];
        offset_grad[(2 * k + 1) * stride + at] += from[1];
        if (mask_grad) mask_grad[k * stride + at] += from[2];
      }
    }
  }
}

// A tile of the gradient of the output, as the two products want it
template <typename acc_t, typename element_t, typename factor_t>
struct TileGrads {
  static constexpr int64_t pair = sizeof(factor_t) / sizeof(element_t);
  Buffer<element_t> rows;   // [outputs, tile]; in pairs of pixels
  Buffer<factor_t> paired;  // [outputs / 2, tile], in pairs of outputs

  explicit TileGrads(int64_t outputs) : rows(rounded_up(outputs, 2) * tile), paired(pair == 2 ? outputs / 2 * tile : 0) {}

  template <typename scalar_t>
  void load(const Images<const scalar_t>& grad, int64_t output, int64_t outputs, const Tile& area, int64_t out_width) {
    const int64_t pixels = area.pixels();
    for (int64_t row = 0; row < area.rows; ++row) {
      const scalar_t* const from = grad.at(area.image, output, (area.row + row) * out_width + area.column);
      element_t* const to = rows.data() + row * area.columns;
      if (grad.pixel == 1) {
        copy(to, tile, from, grad.channel, outputs, area.columns);
      } else {
        transpose<acc_t>(to, tile, from, grad.pixel, area.columns, outputs);
      }
    }
    if constexpr (pair == 2) {
      if (pixels % 2 != 0)
        for (int64_t o = 0; o < outputs; ++o) rows.data()[o * tile + pixels] = 0;
      for (int64_t o = 0; o < outputs; o += 2) {
        const auto* const low = reinterpret_cast<const uint16_t*>(rows.data() + o * tile);
        for (int64_t p = 0; p < pixels; ++p) paired.data()[o / 2 * tile + p] = low[p] | uint32_t(low[tile + p]) << 16;
      }
    }
  }
  const factor_t* by_pixel() const {
    if constexpr (pair == 2) return paired.data();
    else return rows.data();
  }
  const factor_t* by_output() const { return reinterpret_cast<const factor_t*>(rows.data()); }
};

#if DCNV2_BFLOAT16_PAIRS
inline __m512i narrow(const float* from) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

// Joins rows of columns, two and two, into rows of pairs; an odd last one is joined with zeros.
inline void pair_columns(float* columns, int64_t pixels, int64_t width) {
  for (int64_t p = 0; p < pixels; p += 2, columns += 2 * backward_stride) {
    for (int64_t j = 0; j < width; j += 16) {
      const __m512i low = narrow(columns + j);
      const __m512i high = p + 1 < pixels ? narrow(columns + backward_stride + j) : _mm512_setzero_si512();
      _mm512_storeu_si512(columns + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}
#endif

// One block's share of the backward pass over a strip. The gradients of offset and mask are added to the results, if
// `in_place`.
template <typename scalar_t, typename acc_t, typename element_t, typename factor_t>
void backward_strip(
    const BackwardCall<scalar_t, acc_t>& call, const Strip& strip, const Block& block, bool in_place,
    Leftovers<acc_t>& left) {
  constexpr int64_t pair = sizeof(factor_t) / sizeof(element_t);
  const DeformConvShape& s = call.s;
  const int64_t outputs = s.out_channels / s.groups, channels = block.channels, taps = s.taps();
  const bool with_map = call.by_sample || call.by_weight, with_columns = call.by_input || call.by_sample;

  std::vector<Buffer<factor_t>> weights;  // of each chunk [panels, outputs, panel]; with pairs, two outputs side by side
  for (int64_t tap = 0; tap < taps && with_columns; tap += chunk_taps) {
    const int64_t now = std::min(chunk_taps, taps - tap), width = rounded_up(now * channels, panel<acc_t>);
    weights.emplace_back(outputs / pair * width);
    std::vector<element_t> rows(pair * backward_width);
    for (int64_t o = 0; o < outputs; o += pair) {
      for (int64_t i = 0; i < pair; ++i) {
        order_weights(rows.data() + i * backward_width, call.weight, block, o + i, tap, now);
      }
      for (int64_t j = 0; j < width; j += panel<acc_t>) {
        auto* const to = reinterpret_cast<element_t*>(weights.back().data() + j * outputs / pair + o / pair * panel<acc_t>);
        for (int64_t k = 0; k < panel<acc_t>; ++k)
          for (int64_t i = 0; i < pair; ++i) to[k * pair + i] = rows[i * backward_width + j + k];
      }
    }
  }
  const int64_t sums = rounded_up(outputs, 2) * backward_width;
  if (call.by_weight) left.weight_grad = zeros<acc_t>(ceil_div(taps, chunk_taps) * sums);
  if (call.by_sample && !in_place) left.sample_grads = zeros<acc_t>(3 * taps * strip.pixels);

  const TileRows rows(s);
  TileSamples<acc_t> samples(taps);
  TileGrads<acc_t, element_t, factor_t> grads(outputs);
  const Buffer<acc_t> columns(tile * backward_stride), dots(taps * tile * 4);
  for (const Part& part : strip.parts) {
    const int64_t plane = part.image * s.offset_groups * taps, own_plane = plane + block.offset_group * taps;
    const acc_t* const offset = call.offset + 2 * plane * s.out_pixels();
    const acc_t* const mask = call.mask ? call.mask + plane * s.out_pixels() : nullptr;
    int64_t begin = 0, end = s.in_height;
    if (!part.whole) touched_rows(s, offset, part, block.offset_group, begin, end);
    const int64_t in_pixels = (end - begin) * s.in_width;
    // The last row of the map is zeros, and that of its gradient takes what falls outside.
    Buffer<acc_t> map, map_grad;
    if (with_map) {
      map = Buffer<acc_t>((in_pixels + 1) * channels);
      load_pixels<acc_t>(
          map.data(), channels, call.input, part.image, block.channel, begin * s.in_width, in_pixels, channels);
      std::fill_n(map.data() + in_pixels * channels, channels, acc_t(0));
    }
    if (call.by_input) map_grad = zeros<acc_t>((in_pixels + 1) * channels);

    const int64_t count = rows.columns * (part.end - part.begin);
    for (int64_t at = 0; at < count;) {
      const Tile area = rows.tile_at(part, at, count);
      const int64_t pixels = area.pixels();
      at += area.rows;
      samples.locate(
          s, offset, mask, block.offset_group, area, static_cast<int32_t>(begin * s.in_width),
          static_cast<int32_t>(in_pixels));
      grads.load(call.grad, block.output, outputs, area, s.out_width);
      for (int64_t tap = 0; tap < taps; tap += chunk_taps) {
        const int64_t now = std::min(chunk_taps, taps - tap), width = now * channels, chunk = tap / chunk_taps;
        for (int64_t j = 0; j < width && with_columns; j += panel<acc_t>) {
          multiply<1, tile, panel<acc_t>>(
              columns.data() + j, backward_stride, grads.by_pixel(), weights[chunk].data() + j * outputs / pair, pixels,
              width - j, outputs / pair, false);
        }
        const auto run = [&](auto by_input, auto by_sample, auto by_weight) {
          const auto with = [&](auto constant_or_not) {
            backward_samples<by_input, by_sample, by_weight>(
                columns.data(), dots.data(), map_grad.data(), map.data(), samples, tap, now, pixels, constant_or_not);
          };
          if (channels == backward_channels) {
            with(std::integral_constant<int64_t, backward_channels>());
          } else {
            with(channels);
          }
        };
        choose(run, call.by_input, call.by_sample, call.by_weight);
        if (!call.by_weight) continue;
        if constexpr (pair == 2) {
#if DCNV2_BFLOAT16_PAIRS
          pair_columns(columns.data(), pixels, width);
#endif
        }
        for (int64_t j = 0; j < width; j += panel<acc_t>) {
          multiply<tile / pair, 1, backward_stride * pair>(
              left.weight_grad.data() + chunk * sums + j, backward_width, grads.by_output(),
              reinterpret_cast<const factor_t*>(columns.data()) + j, outputs, width - j, ceil_div(pixels, pair), true);
        }
      }
      if (!call.by_sample) continue;
      derive_samples(dots.data(), samples, taps, pixels);
      if (in_place) {
        const int64_t first = area.row * s.out_width + area.column;
        add_derivatives(
            call.offset_grad + 2 * own_plane * s.out_pixels() + first,
            call.mask_grad ? call.mask_grad + own_plane * s.out_pixels() + first : nullptr, s.out_pixels(), s.out_width,
            dots.data(), taps, area);
      } else {
        acc_t* const to =
            left.sample_grads.data() + part.before + (area.row - part.begin) * s.out_width + area.column;
        add_derivatives(
            to, call.mask_grad ? to + 2 * taps * strip.pixels : nullptr, strip.pixels, s.out_width, dots.data(),
            taps, area);
      }
    }
    if (!call.by_input) continue;
    if (part.whole) {
      store_pixels(call.input_grad, part.image, block.channel, 0, map_grad.data(), channels, in_pixels, channels);
    } else {
      left.windows.push_back({std::move(map_grad), begin, end});
    }
  }
}

// The functions of this instruction set, for one choice of types
template <typename scalar_t, typename map_t, typename acc_t, typename column_t, typename factor_t>
DeformConvKernels<scalar_t, map_t, acc_t, factor_t> kernels() {
  return {
      &lay_out_rows<scalar_t, map_t, acc_t>, &pack_weights<scalar_t, map_t, acc_t, column_t, factor_t>,
      &forward_rows<scalar_t, map_t, acc_t, column_t, factor_t>,
      &backward_strip<scalar_t, acc_t, column_t, factor_t>, panel<acc_t>, lanes<acc_t>,
      sizeof(factor_t) / sizeof(column_t)};
}

}  // namespace dcnv2::cpu::DCNV2_ISA
