// Deformable convolution on the CPU, forward and backward.
//
// Channels are taken in slabs and output pixels in tiles. A slab of one image is laid out channels last; a tile of it
// is sampled into columns that stay in the cache, which one matrix product of torch's own multiplies with the slab's
// weights. So memory beyond the results is bounded, whatever the size of the image or the batch. In the backward pass
// each thread owns a block of channels of the input gradient, so nothing is atomic and every run gives the same bits.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bilinear.h"
#include "cpu/channels_last.h"
#include "deform_conv.h"

namespace dcnv2::cpu {
namespace {

template <typename acc_t>
using Sample = ModulatedSample<acc_t>;

// A run of a slab's channels that share their convolution group, their offset group and, in the backward pass, a
// thread.
struct ChannelBlock {
  int64_t begin, size;  // in the slab
  int64_t offset_group;
  int64_t column_offset;  // in units of (pixels * taps): where the columns of its convolution group begin
  int64_t column_stride;  // channels that the slab holds of its convolution group
  int64_t column_begin;   // the block's first channel among those
};

// The channels of one convolution group that a slab holds: one matrix product.
struct GroupPart {
  int64_t begin, size;   // in the slab
  int64_t weight_begin;  // first input channel in the weight
  int64_t output_begin;  // first output channel
};

struct Slab {
  int64_t begin, size;  // channels of the input
  std::vector<GroupPart> parts;
  std::vector<ChannelBlock> blocks;
};

std::vector<Slab> make_slabs(const DeformConvShape& s, int64_t slab_channels, int64_t block_channels) {
  const int64_t per_group = s.in_channels / s.groups, per_offset_group = s.in_channels / s.offset_groups;
  const int64_t outputs = s.out_channels / s.groups;
  std::vector<Slab> slabs;
  for (int64_t begin = 0; begin < s.in_channels; begin += slab_channels) {
    const int64_t end = std::min(begin + slab_channels, s.in_channels);
    Slab slab{begin, end - begin, {}, {}};
    for (int64_t c = begin; c < end;) {
      const int64_t group = c / per_group, part_end = std::min(end, (group + 1) * per_group);
      slab.parts.push_back({c - begin, part_end - c, c - group * per_group, group * outputs});
      for (int64_t b = c; b < part_end;) {
        const int64_t offset_group = b / per_offset_group;
        const int64_t block_end = std::min({part_end, (offset_group + 1) * per_offset_group, b + block_channels});
        slab.blocks.push_back({b - begin, block_end - b, offset_group, c - begin, part_end - c, b - c});
        b = block_end;
      }
      c = part_end;
    }
    slabs.push_back(std::move(slab));
  }
  return slabs;
}

// Fills samples [pixels, taps, offset groups] for the pixels begin .. end of the tile of one image that starts at
// `first`.
template <typename acc_t>
void locate_samples(
    Sample<acc_t>* samples, const DeformConvShape& s, const acc_t* offset, const acc_t* mask, int64_t first,
    int64_t begin, int64_t end) {
  const int64_t taps = s.taps();
  for (int64_t p = begin; p < end; ++p) {
    const int64_t pixel = first + p, ho = pixel / s.out_width, wo = pixel % s.out_width;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t tap_y = s.tap_y(ho, k / s.kernel_w), tap_x = s.tap_x(wo, k % s.kernel_w);
      for (int64_t g = 0; g < s.offset_groups; ++g) {
        samples[(p * taps + k) * s.offset_groups + g] =
            locate_sample(s, offset, mask, g * taps + k, pixel, tap_y, tap_x);
      }
    }
  }
}

// columns, per convolution group [pixels, taps, channels] = mask * interpolated value, for the pixels begin .. end of a
// tile. `map` [H * W + 1, slab channels], its last row zeros.
template <typename acc_t, typename column_t>
DCNV2_MULTIVERSION void sample_columns(
    column_t* columns, const acc_t* map, const Sample<acc_t>* samples, const Slab& slab, int64_t taps,
    int64_t offset_groups, int64_t pixels, int64_t begin, int64_t end) {
  for (int64_t row = begin * taps; row < end * taps; ++row) {
    for (const ChannelBlock& block : slab.blocks) {
      const Sample<acc_t>& sample = samples[row * offset_groups + block.offset_group];
      acc_t w[4];
      sample.column_weights(w);
      const acc_t w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
      const acc_t* v0 = map + int64_t(sample.index[0]) * slab.size + block.begin;
      const acc_t* v1 = map + int64_t(sample.index[1]) * slab.size + block.begin;
      const acc_t* v2 = map + int64_t(sample.index[2]) * slab.size + block.begin;
      const acc_t* v3 = map + int64_t(sample.index[3]) * slab.size + block.begin;
      column_t* column = columns + block.column_offset * pixels * taps + row * block.column_stride + block.column_begin;
      DCNV2_SIMD
      for (int64_t c = 0; c < block.size; ++c) {
        column[c] = static_cast<column_t>(w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c]);
      }
    }
  }
}

// One channel block's share of the backward pass over a tile. On entry `columns` holds the gradient of the columns, on
// exit the columns themselves; the gradient of the map is added to; dots [pixels * taps, 4] become the dot products,
// over the block's channels, of the column gradient with each neighbour. `map_grad` has the layout of `map`; its last
// row takes what falls outside.
template <typename acc_t, typename column_t>
DCNV2_MULTIVERSION void backward_block(
    column_t* columns, acc_t* map_grad, acc_t* dots, const acc_t* map, const Sample<acc_t>* samples, const Slab& slab,
    const ChannelBlock& block, int64_t taps, int64_t offset_groups, int64_t pixels) {
  for (int64_t row = 0; row < pixels * taps; ++row) {
    const Sample<acc_t>& sample = samples[row * offset_groups + block.offset_group];
    acc_t w[4];
    sample.column_weights(w);
    const acc_t w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    const int64_t i0 = int64_t(sample.index[0]) * slab.size + block.begin,
                  i1 = int64_t(sample.index[1]) * slab.size + block.begin;
    const int64_t i2 = int64_t(sample.index[2]) * slab.size + block.begin,
                  i3 = int64_t(sample.index[3]) * slab.size + block.begin;
    const acc_t *v0 = map + i0, *v1 = map + i1, *v2 = map + i2, *v3 = map + i3;
    acc_t *d0 = map_grad + i0, *d1 = map_grad + i1, *d2 = map_grad + i2, *d3 = map_grad + i3;
    column_t* column = columns + block.column_offset * pixels * taps + row * block.column_stride + block.column_begin;
    acc_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    DCNV2_SIMD_SUM(s0, s1, s2, s3)
    for (int64_t c = 0; c < block.size; ++c) {
      const acc_t g = static_cast<acc_t>(column[c]);
      const acc_t a0 = v0[c], a1 = v1[c], a2 = v2[c], a3 = v3[c];
      column[c] = static_cast<column_t>(w0 * a0 + w1 * a1 + w2 * a2 + w3 * a3);
      s0 += g * a0;
      s1 += g * a1;
      s2 += g * a2;
      s3 += g * a3;
      d0[c] += w0 * g;
      d1[c] += w1 * g;
      d2[c] += w2 * g;
      d3[c] += w3 * g;
    }
    acc_t* dot = dots + row * 4;
    dot[0] = s0, dot[1] = s1, dot[2] = s2, dot[3] = s3;
  }
}

// Adds a tile's dot products, block by block in a fixed order, to the gradients of offset and mask of one image.
template <typename acc_t>
void add_sample_gradients(
    acc_t* offset_grad, acc_t* mask_grad, const acc_t* dots, const Sample<acc_t>* samples, const Slab& slab,
    const DeformConvShape& s, int64_t first, int64_t pixels) {
  const int64_t taps = s.taps(), out_pixels = s.out_pixels(), rows = pixels * taps;
  at::parallel_for(0, pixels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t row = p * taps + k;
        for (size_t b = 0; b < slab.blocks.size();) {
          const int64_t g = slab.blocks[b].offset_group;
          acc_t sum[4] = {0, 0, 0, 0};
          for (; b < slab.blocks.size() && slab.blocks[b].offset_group == g; ++b) {
            for (int i = 0; i < 4; ++i) sum[i] += dots[(b * rows + row) * 4 + i];
          }
          acc_t by_y, by_x, by_mask;
          samples[row * s.offset_groups + g].derivatives(sum, by_y, by_x, by_mask);
          acc_t* at = offset_grad + (g * taps + k) * 2 * out_pixels + first + p;
          at[0] += by_y;
          at[out_pixels] += by_x;
          if (mask_grad) mask_grad[(g * taps + k) * out_pixels + first + p] += by_mask;
        }
      }
    }
  });
}

// The tensors of one call in the types and layouts that the loops want.
template <typename scalar_t, typename acc_t, typename column_t>
struct Call {
  const DeformConvShape& s;
  at::Tensor input;         // contiguous, NCHW or NHWC, as it came
  at::Tensor offset, mask;  // contiguous, acc_t; mask may be undefined
  at::ScalarType column_type = c10::CppTypeToScalarType<column_t>::value;
  at::TensorOptions acc_options, column_options;
  int64_t slab_channels, tile;

  Call(
      const DeformConvShape& shape, const at::Tensor& input_, const at::Tensor& offset_,
      const std::optional<at::Tensor>& mask_, int64_t least_channels)
      : s(shape), input(input_.contiguous(input_.suggest_memory_format())) {
    acc_options = at::TensorOptions().dtype(c10::CppTypeToScalarType<acc_t>::value);
    column_options = acc_options.dtype(column_type);
    offset = offset_.to(acc_options).contiguous();
    if (mask_.has_value()) mask = mask_->to(acc_options).contiguous();
    plan(least_channels);
  }

  // Chooses how many channels make a slab and how many pixels a tile, so that beside the results a call needs about a
  // tenth of the memory that the columns of one whole image would take: two thirds of it for the slab's map and
  // weights.
  void plan(int64_t least_channels) {
    const int64_t budget = s.taps() * s.in_channels * s.out_pixels() * sizeof(column_t) / 12;
    const int64_t per_channel = (s.in_pixels() + s.taps() * s.out_channels / s.groups) * sizeof(acc_t);
    slab_channels = budget * 2 / 3 / per_channel / 16 * 16;
    slab_channels = std::clamp(slab_channels, least_channels, std::max<int64_t>(least_channels, 128));
    // Half columns are multiplied once, so that nothing is rounded between slabs.
    if (!std::is_same_v<column_t, acc_t>) slab_channels = s.in_channels;
    slab_channels = std::min(slab_channels, s.in_channels);
    const int64_t tile_bytes = std::clamp<int64_t>(budget / 3, 1 << 18, 1 << 22);
    tile = tile_bytes / (s.taps() * slab_channels * static_cast<int64_t>(sizeof(column_t)));
    tile = std::min(std::max<int64_t>(tile, 64), s.out_pixels());
  }

  const acc_t* offset_of(int64_t n) const { return offset.const_data_ptr<acc_t>() + n * offset.stride(0); }
  const acc_t* mask_of(int64_t n) const {
    return mask.defined() ? mask.const_data_ptr<acc_t>() + n * mask.stride(0) : nullptr;
  }

  // map [H * W + 1, slab channels], the last row zeros
  void load_map(at::Tensor& map, int64_t n, const Slab& slab) const {
    const bool last = input.stride(1) == 1;
    to_channels_last(
        map.data_ptr<acc_t>(), input.const_data_ptr<scalar_t>() + n * input.stride(0) + slab.begin * input.stride(1),
        s.in_pixels(), slab.size, input.stride(1), last ? s.in_channels : 1);
  }

  // Per part [O / groups, taps * channels]
  std::vector<at::Tensor> slab_weights(const at::Tensor& weight, const Slab& slab) const {
    std::vector<at::Tensor> weights;
    for (const GroupPart& part : slab.parts) {
      weights.push_back(weight.narrow(0, part.output_begin, s.out_channels / s.groups)
                            .narrow(1, part.weight_begin, part.size)
                            .permute({0, 2, 3, 1})
                            .to(column_type)
                            .contiguous()
                            .flatten(1));
    }
    return weights;
  }

  // The part's columns of a tile [pixels, taps * channels]
  at::Tensor part_columns(const at::Tensor& columns, const GroupPart& part, int64_t pixels) const {
    const int64_t width = s.taps() * part.size;
    return columns.narrow(0, part.begin * s.taps() * pixels, width * pixels).view({pixels, width});
  }

  // The part's outputs of a tile [O / groups, pixels], of one image
  at::Tensor part_outputs(const at::Tensor& image, const GroupPart& part, int64_t first, int64_t pixels) const {
    return image.flatten(1).narrow(0, part.output_begin, s.out_channels / s.groups).narrow(1, first, pixels);
  }
};

template <typename scalar_t, typename acc_t, typename column_t>
at::Tensor forward(
    const DeformConvShape& s, const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask) {
  const Call<scalar_t, acc_t, column_t> call(s, input, offset, mask, 32);
  at::Tensor output = at::empty(
      {s.batch, s.out_channels, s.out_height, s.out_width}, call.column_options, input.suggest_memory_format());
  if (bias.has_value()) {
    output.copy_(bias->view({1, -1, 1, 1}).expand_as(output));
  } else {
    output.zero_();
  }

  at::Tensor columns = at::empty({call.tile * s.taps() * call.slab_channels}, call.column_options);
  std::vector<Sample<acc_t>> samples(call.tile * s.taps() * s.offset_groups);
  for (const Slab& slab : make_slabs(s, call.slab_channels, call.slab_channels)) {
    const std::vector<at::Tensor> weights = call.slab_weights(weight, slab);
    at::Tensor map = at::zeros({s.in_pixels() + 1, slab.size}, call.acc_options);
    for (int64_t n = 0; n < s.batch; ++n) {
      call.load_map(map, n, slab);
      const at::Tensor image = output.select(0, n);
      for (int64_t first = 0; first < s.out_pixels(); first += call.tile) {
        const int64_t pixels = std::min(call.tile, s.out_pixels() - first);
        at::parallel_for(0, pixels, 16, [&](int64_t begin, int64_t end) {
          locate_samples(samples.data(), s, call.offset_of(n), call.mask_of(n), first, begin, end);
          sample_columns<acc_t, column_t>(
              columns.data_ptr<column_t>(), map.const_data_ptr<acc_t>(), samples.data(), slab, s.taps(),
              s.offset_groups, pixels, begin, end);
        });
        for (size_t i = 0; i < slab.parts.size(); ++i) {
          call.part_outputs(image, slab.parts[i], first, pixels)
              .addmm_(weights[i], call.part_columns(columns, slab.parts[i], pixels).t());
        }
      }
    }
  }
  return output.to(input.scalar_type());
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename scalar_t, typename acc_t, typename column_t>
Gradients backward(
    const DeformConvShape& s, const at::Tensor& grad_, const at::Tensor& input, const at::Tensor& offset,
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, std::array<bool, 4> wanted) {
  // Each thread gets a block of channels of the slab.
  const int64_t threads = at::get_num_threads();
  const Call<scalar_t, acc_t, column_t> call(s, input, offset, mask, 32 * threads);
  const int64_t block_channels = ((call.slab_channels + threads - 1) / threads + 15) / 16 * 16;
  const at::Tensor grad = grad_.to(call.column_type).contiguous(grad_.suggest_memory_format());
  at::Tensor input_grad = at::empty_like(call.input);
  at::Tensor weight_grad = at::empty(weight.sizes(), weight.options());
  at::Tensor offset_grad = at::zeros_like(call.offset);
  at::Tensor mask_grad = call.mask.defined() ? at::zeros_like(call.mask) : at::empty({0}, call.acc_options);

  at::Tensor columns = at::empty({call.tile * s.taps() * call.slab_channels}, call.column_options);
  std::vector<Sample<acc_t>> samples(call.tile * s.taps() * s.offset_groups);
  for (const Slab& slab : make_slabs(s, call.slab_channels, block_channels)) {
    const std::vector<at::Tensor> weights = call.slab_weights(weight, slab);
    std::vector<at::Tensor> weight_grads;
    for (const at::Tensor& w : weights) weight_grads.push_back(at::zeros(w.sizes(), call.acc_options));
    at::Tensor map = at::zeros({s.in_pixels() + 1, slab.size}, call.acc_options), map_grad = at::empty_like(map);
    std::vector<acc_t> dots(slab.blocks.size() * call.tile * s.taps() * 4);
    for (int64_t n = 0; n < s.batch; ++n) {
      call.load_map(map, n, slab);
      map_grad.zero_();
      const at::Tensor image_grad = grad.select(0, n);
      for (int64_t first = 0; first < s.out_pixels(); first += call.tile) {
        const int64_t pixels = std::min(call.tile, s.out_pixels() - first);
        at::parallel_for(0, pixels, 16, [&](int64_t begin, int64_t end) {
          locate_samples(samples.data(), s, call.offset_of(n), call.mask_of(n), first, begin, end);
        });
        for (size_t i = 0; i < slab.parts.size(); ++i) {
          at::Tensor part = call.part_columns(columns, slab.parts[i], pixels);
          at::mm_out(part, call.part_outputs(image_grad, slab.parts[i], first, pixels).t(), weights[i]);
        }
        at::parallel_for(0, slab.blocks.size(), 1, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            backward_block<acc_t, column_t>(
                columns.data_ptr<column_t>(), map_grad.data_ptr<acc_t>(), dots.data() + b * pixels * s.taps() * 4,
                map.const_data_ptr<acc_t>(), samples.data(), slab, slab.blocks[b], s.taps(), s.offset_groups, pixels);
          }
        });
        add_sample_gradients(
            offset_grad.data_ptr<acc_t>() + n * offset_grad.stride(0),
            call.mask.defined() ? mask_grad.data_ptr<acc_t>() + n * mask_grad.stride(0) : nullptr, dots.data(),
            samples.data(), slab, s, first, pixels);
        if (!wanted[2]) continue;
        for (size_t i = 0; i < slab.parts.size(); ++i) {
          const at::Tensor part_grad = call.part_outputs(image_grad, slab.parts[i], first, pixels);
          const at::Tensor part = call.part_columns(columns, slab.parts[i], pixels);
          if constexpr (std::is_same_v<column_t, acc_t>) {
            weight_grads[i].addmm_(part_grad, part);
          } else {
            weight_grads[i] += at::mm(part_grad, part);
          }
        }
      }
      from_channels_last(
          input_grad.data_ptr<scalar_t>() + n * input_grad.stride(0) + slab.begin * input_grad.stride(1),
          map_grad.const_data_ptr<acc_t>(), s.in_pixels(), slab.size, input_grad.stride(1),
          input_grad.stride(1) == 1 ? s.in_channels : 1);
    }
    for (size_t i = 0; i < slab.parts.size(); ++i) {
      const GroupPart& part = slab.parts[i];
      weight_grad.narrow(0, part.output_begin, s.out_channels / s.groups)
          .narrow(1, part.weight_begin, part.size)
          .copy_(weight_grads[i].view({-1, s.kernel_h, s.kernel_w, part.size}).permute({0, 3, 1, 2}));
    }
  }
  const at::Tensor none = at::empty({0}, input.options());
  return {
      wanted[0] ? input_grad : none, wanted[1] ? offset_grad.to(offset.scalar_type()) : none,
      wanted[2] ? weight_grad : none, wanted[3] && mask.has_value() ? mask_grad.to(mask->scalar_type()) : none};
}

bool multiplies_bfloat16_fast() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Calls fn(scalar, accumulator, column) with a zero of each type. Half columns only where the processor multiplies them
// fast.
template <typename fn_t>
auto dispatch(at::ScalarType type, const fn_t& fn) {
  switch (type) {
    case at::kDouble:
      return fn(double(), double(), double());
    case at::kFloat:
      return fn(float(), float(), float());
    case at::kBFloat16:
      if (multiplies_bfloat16_fast()) return fn(at::BFloat16(), float(), at::BFloat16());
      return fn(at::BFloat16(), float(), float());
    case at::kHalf:
      return fn(at::Half(), float(), float());
    default:
      TORCH_CHECK_TYPE(false, "deform_conv2d: input must be float64, float32, bfloat16 or float16, got ", type);
  }
}

at::Tensor deform_conv2d(
    const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const DeformConvShape s = check_deform_conv(input, offset, weight, bias, mask, stride, padding, dilation);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch(input.scalar_type(), [&](auto scalar, auto acc, auto column) {
    return forward<decltype(scalar), decltype(acc), decltype(column)>(s, input, offset, weight, bias, mask);
  });
}

Gradients deform_conv2d_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 4> wanted) {
  const DeformConvShape s = check_deform_conv(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_grad("deform_conv2d", grad, input, {s.batch, s.out_channels, s.out_height, s.out_width}, "[N, O, Ho, Wo]");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch(input.scalar_type(), [&](auto scalar, auto acc, auto column) {
    return backward<decltype(scalar), decltype(acc), decltype(column)>(s, grad, input, offset, weight, mask, wanted);
  });
}

}  // namespace
}  // namespace dcnv2::cpu

TORCH_LIBRARY_IMPL(dcnv2_d2, CPU, m) {
  m.impl("deform_conv2d", &dcnv2::cpu::deform_conv2d);
  m.impl("deform_conv2d_backward", &dcnv2::cpu::deform_conv2d_backward);
}
