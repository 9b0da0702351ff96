// The hot loops of the RoI poolings, over the bins of one box and the channels of one class. Included once for each
// instruction set (isa.h).

namespace dcnv2::cpu::DCNV2_ISA {

// So many channels at once, which stay in registers; a single one is no vector.
template <typename acc_t, int64_t size>
struct PackOf {
  typedef acc_t type __attribute__((vector_size(size * sizeof(acc_t)), aligned(alignof(acc_t)), may_alias));
};
template <typename acc_t>
struct PackOf<acc_t, 1> {
  using type = acc_t;
};

template <typename acc_t, int64_t size, int count>
struct Packs {
  using pack_t = typename PackOf<acc_t, size>::type;
  pack_t v[count];

  void zero() {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) v[j] = pack_t{};
  }
  void load(const acc_t* from) {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) v[j] = *reinterpret_cast<const pack_t*>(from + j * size);
  }
  void store(acc_t* to) const {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) *reinterpret_cast<pack_t*>(to + j * size) = v[j];
  }
  // += weight * other
  void add(acc_t weight, const Packs& other) {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) v[j] += weight * other.v[j];
  }
  acc_t dot(const Packs& other) const {
    pack_t sum = v[0] * other.v[0];
#pragma GCC unroll 4
    for (int j = 1; j < count; ++j) sum += v[j] * other.v[j];
    if constexpr (size == 1) {
      return sum;
    } else {
      alignas(sizeof(pack_t)) acc_t lane[size];
      *reinterpret_cast<pack_t*>(lane) = sum;
      for (int64_t half = size / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
      return lane[0];
    }
  }
};

// Calls fn(packs, first channel) until all channels had their turn, with as many at once as fit.
template <typename acc_t, int most, typename fn_t>
inline void for_each_pack(int64_t channels, const fn_t& fn) {
  constexpr int64_t size = lanes<acc_t>, small = 16 / sizeof(acc_t);
  int64_t c = 0;
  for (; c + most * size <= channels; c += most * size) fn(Packs<acc_t, size, most>(), c);
  for (; c + size <= channels; c += size) fn(Packs<acc_t, size, 1>(), c);
  for (; c + small <= channels; c += small) fn(Packs<acc_t, small, 1>(), c);
  for (; c < channels; ++c) fn(Packs<acc_t, 1, 1>(), c);
}

// out [bins, channels] = weighted sums of the pixels of each bin
template <typename acc_t>
void pool_bins(
    acc_t* out, int64_t stride, const acc_t* map, const BinStencil<acc_t>* bins, const StencilEntry<acc_t>* entries,
    int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; ++i, out += stride) {
    const BinStencil<acc_t> bin = bins[i];
    const StencilEntry<acc_t>*const rows = entries + bin.entries, *const columns = rows + bin.rows;
    for_each_pack<acc_t, 4>(channels, [&](auto sum, int64_t c) {
      auto value = sum;
      sum.zero();
      for (int64_t y = 0; y < bin.rows; ++y) {
        const acc_t* const row = map + rows[y].pixel + c;
        const acc_t weight = bin.scale * rows[y].weight;
        for (int64_t x = 0; x < bin.columns; ++x) {
          value.load(row + columns[x].pixel);
          sum.add(weight * columns[x].weight, value);
        }
      }
      sum.store(out + c);
    });
  }
}

// map_grad += weights * grad [bins, channels]; dots [bins, 3] += grad * derivatives of the sums by y, x and scale
template <typename acc_t, bool by_input, bool by_sample>
void unpool_bins(
    acc_t* map_grad, acc_t* dots, const acc_t* map, const acc_t* grad, int64_t stride, const BinStencil<acc_t>* bins,
    const StencilEntry<acc_t>* entries, int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; ++i, grad += stride, dots += 3) {
    const BinStencil<acc_t> bin = bins[i];
    const StencilEntry<acc_t>*const rows = entries + bin.entries, *const columns = rows + bin.rows;
    for_each_pack<acc_t, 2>(channels, [&](auto g, int64_t c) {
      auto by_y = g, by_x = g, by_scale = g;
      by_y.zero(), by_x.zero(), by_scale.zero();
      g.load(grad + c);
      for (int64_t y = 0; y < bin.rows; ++y) {
        const acc_t weight = bin.scale * rows[y].weight;
        auto value = g, slope = g;
        value.zero(), slope.zero();
        for (int64_t x = 0; x < bin.columns; ++x) {
          const int64_t place = rows[y].pixel + columns[x].pixel + c;
          auto pixel = g;
          if constexpr (by_sample) {
            pixel.load(map + place);
            value.add(columns[x].weight, pixel);
            slope.add(columns[x].slope, pixel);
          }
          if constexpr (by_input) {
            pixel.load(map_grad + place);
            pixel.add(weight * columns[x].weight, g);
            pixel.store(map_grad + place);
          }
        }
        by_y.add(rows[y].slope, value);
        by_x.add(rows[y].weight, slope);
        by_scale.add(rows[y].weight, value);
      }
      if constexpr (by_sample) {
        dots[0] += g.dot(by_y);
        dots[1] += g.dot(by_x);
        dots[2] += g.dot(by_scale);
      }
    });
  }
}

template <typename scalar_t, typename acc_t>
RoIPoolKernels<scalar_t, acc_t> roi_pool_kernels(bool by_input, bool by_sample) {
  return {
      &load_pixels<acc_t, acc_t, scalar_t>, &store_pixels<acc_t, scalar_t>, &pool_bins<acc_t>,
      !by_sample ? &unpool_bins<acc_t, true, false>
      : by_input ? &unpool_bins<acc_t, true, true>
                 : &unpool_bins<acc_t, false, true>};
}

}  // namespace dcnv2::cpu::DCNV2_ISA
