// What one thread does in the backward pass of deform_conv2d. Included once for each instruction set (isa.h).

namespace dcnv2::cpu::DCNV2_ISA {

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
// products with the four neighbours of each sample; `by_input` to add to the gradient of the map; `by_weight` to put
// the columns in its place. `channels` may be a constant, which the compiler makes use of.
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
        const acc_t grad = by_input || by_sample ? column[c] : acc_t(0);
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

// Puts them into, or adds them to, the gradients of offset (y, then x of each tap) and mask, which may be null: planes
// that are `stride` elements apart and have rows of `width`. A step of its own, so that no product is fused with a sum:
// what is added up later must have the same bits.
template <typename acc_t>
inline void put_derivatives(
    acc_t* offset_grad, acc_t* mask_grad, int64_t stride, int64_t width, const acc_t* derivatives, int64_t taps,
    const Tile& area, bool add) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int i = 0; i < (mask_grad ? 3 : 2); ++i) {
      acc_t* const plane = i < 2 ? offset_grad + (2 * k + i) * stride : mask_grad + k * stride;
      const acc_t* from = derivatives + k * tile * 4 + i;
      for (int64_t row = 0; row < area.rows; ++row) {
        for (int64_t at = row * width; at < row * width + area.columns; ++at, from += 4) {
          plane[at] = add ? plane[at] + *from : *from;
        }
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

  explicit TileGrads(int64_t outputs)
      : rows(rounded_up(outputs, 2) * tile), paired(pair == 2 ? outputs / 2 * tile : 0) {}

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
    if constexpr (pair == 2)
      return paired.data();
    else
      return rows.data();
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

// One block's share of the backward pass over a strip
template <typename scalar_t, typename acc_t, typename element_t, typename factor_t>
void backward_strip(
    const BackwardCall<scalar_t, acc_t>& call, const Strip& strip, const Block& block, Place place,
    Leftovers<acc_t>& left) {
  constexpr int64_t pair = sizeof(factor_t) / sizeof(element_t);
  const DeformConvShape& s = call.s;
  const int64_t outputs = s.out_channels / s.groups, channels = block.channels, taps = s.taps();
  const bool with_map = call.by_sample || call.by_weight, with_columns = call.by_input || call.by_sample;

  std::vector<Buffer<factor_t>>
      weights;  // of each chunk [panels, outputs, panel]; with pairs, two outputs side by side
  for (int64_t tap = 0; tap < taps && with_columns; tap += chunk_taps) {
    const int64_t now = std::min(chunk_taps, taps - tap), width = rounded_up(now * channels, panel<acc_t>);
    weights.emplace_back(outputs / pair * width);
    std::vector<element_t> rows(pair * backward_width);
    for (int64_t o = 0; o < outputs; o += pair) {
      for (int64_t i = 0; i < pair; ++i) {
        order_weights(rows.data() + i * backward_width, call.weight, block, o + i, tap, now);
      }
      for (int64_t j = 0; j < width; j += panel<acc_t>) {
        auto* const to =
            reinterpret_cast<element_t*>(weights.back().data() + j * outputs / pair + o / pair * panel<acc_t>);
        for (int64_t k = 0; k < panel<acc_t>; ++k)
          for (int64_t i = 0; i < pair; ++i) to[k * pair + i] = rows[i * backward_width + j + k];
      }
    }
  }
  const int64_t sums = rounded_up(outputs, 2) * backward_width;
  if (call.by_weight) left.weight_grad = zeros<acc_t>(ceil_div(taps, chunk_taps) * sums);
  if (call.by_sample && place == Place::leave) left.sample_grads = Buffer<acc_t>(3 * taps * strip.pixels);

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
      if (place == Place::leave) {
        acc_t* const to = left.sample_grads.data() + part.before + (area.row - part.begin) * s.out_width + area.column;
        put_derivatives(
            to, call.mask_grad ? to + 2 * taps * strip.pixels : nullptr, strip.pixels, s.out_width, dots.data(), taps,
            area, false);
      } else {
        const int64_t first = area.row * s.out_width + area.column;
        put_derivatives(
            call.offset_grad + 2 * own_plane * s.out_pixels() + first,
            call.mask_grad ? call.mask_grad + own_plane * s.out_pixels() + first : nullptr, s.out_pixels(), s.out_width,
            dots.data(), taps, area, place == Place::add);
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

}  // namespace dcnv2::cpu::DCNV2_ISA
