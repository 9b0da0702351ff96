// Deformable convolution on the CPU, forward and backward.
//
// A thread samples a tile of output pixels into columns that stay in its cache, some channels at a time, and multiplies
// them there and then with a product of our own (product.h): one parallel loop, nothing shared, no call of a library.
// Forward, threads share out the output pixels. Backward, they share out blocks of channels (and strips of output
// pixels, where the blocks are few): a task owns its channels of the input's and of the weight's gradient, so nothing
// is atomic. What tasks have in common is added up when all are done. Every sum has one order, which the shape of the
// call decides: equal inputs give equal bits, whatever the number of threads.
//
// deform_conv_plan.h says how a call is cut into pieces, deform_conv_tiles.h has what is done with one. The latter is
// compiled for several instruction sets, of which isa.h chooses.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "bilinear.h"
#include "cpu/channels_last.h"
#include "cpu/deform_conv_plan.h"
#include "cpu/isa.h"
#include "deform_conv.h"

#define DCNV2_ISA plain
#define DCNV2_VECTOR_BYTES 16
#define DCNV2_BFLOAT16_PAIRS 0
#include "cpu/vectors.h"
//
#include "cpu/product.h"
//
#include "cpu/deform_conv_tiles.h"

#if defined(DCNV2_X86_ISAS)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#undef DCNV2_ISA
#undef DCNV2_VECTOR_BYTES
#define DCNV2_ISA avx2
#define DCNV2_VECTOR_BYTES 32
#include "cpu/vectors.h"
//
#include "cpu/product.h"
//
#include "cpu/deform_conv_tiles.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#undef DCNV2_ISA
#undef DCNV2_VECTOR_BYTES
#define DCNV2_ISA avx512
#define DCNV2_VECTOR_BYTES 64
#include "cpu/vectors.h"
//
#include "cpu/product.h"
//
#include "cpu/deform_conv_tiles.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512,avx512bf16")
#undef DCNV2_ISA
#undef DCNV2_BFLOAT16_PAIRS
#define DCNV2_ISA avx512_bf16
#define DCNV2_BFLOAT16_PAIRS 1
#include "cpu/vectors.h"
//
#include "cpu/product.h"
//
#include "cpu/deform_conv_tiles.h"
#pragma GCC pop_options
#endif

namespace dcnv2::cpu {
namespace {

bool is_channels_last(const at::Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

at::Tensor dense(const at::Tensor& t) { return t.contiguous(t.suggest_memory_format()); }

template <typename acc_t>
at::Tensor as(const at::Tensor& t) {
  return t.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
}

template <typename value_t>
Weight<value_t> weight_of(const at::Tensor& t, value_t* data) {
  const int64_t channels = t.size(1), taps = t.size(2) * t.size(3);
  const bool last = is_channels_last(t);
  return {data, channels * taps, last ? 1 : taps, last ? channels : 1};
}

constexpr int64_t grain = 1 << 15;  // elements that make it worth to wake another thread

template <typename scalar_t, typename map_t, typename acc_t, typename factor_t>
at::Tensor forward(
    const DeformConvKernels<scalar_t, map_t, acc_t, factor_t>& kernels, const DeformConvShape& s,
    const at::Tensor& input_, const at::Tensor& offset_, const at::Tensor& weight_,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask_) {
  const at::Tensor input = dense(input_), weight = dense(weight_), offset = as<acc_t>(offset_);
  const at::Tensor mask = mask_.has_value() ? as<acc_t>(*mask_) : at::Tensor();
  const bool last = is_channels_last(input);
  const at::Tensor output = at::empty(
      {s.batch, s.out_channels, s.out_height, s.out_width}, input.options(), input.suggest_memory_format());
  if (output.numel() == 0) return output;
  advise_large_pages(output);

  at::Tensor map = input;
  int64_t map_stride = s.in_channels;
  if (!last || !std::is_same_v<scalar_t, map_t>) {
    map_stride += 16;  // against conflicts in the cache
    map = at::empty(
        {s.batch, s.in_pixels(), map_stride}, input.options().dtype(c10::CppTypeToScalarType<map_t>::value));
    advise_large_pages(map);
    const Images<map_t> to{map.data_ptr<map_t>(), s.in_pixels() * map_stride, 1, map_stride};
    const auto from = images(input.const_data_ptr<scalar_t>(), s.in_channels, s.in_pixels(), last);
    at::parallel_for(0, s.batch * s.in_height, ceil_div(grain, s.in_channels * s.in_width), [&](int64_t begin, int64_t end) {
      kernels.lay_out_rows(s, to, from, begin, end);
    });
  }
  const int64_t outputs = s.out_channels / s.groups, padded = rounded_up(outputs, kernels.lanes);
  const Buffer<acc_t> start = zeros<acc_t>(s.groups * padded);
  for (int64_t o = 0; o < s.out_channels && bias.has_value(); ++o) {
    start.data()[o / outputs * padded + o % outputs] = static_cast<acc_t>(bias->const_data_ptr<scalar_t>()[o * bias->stride(0)]);
  }
  const Buffer<map_t> outside = zeros<map_t>(forward_channels);
  const std::vector<Block> blocks = blocks_of(s, forward_channels);
  const int64_t panels = ceil_div(outputs, kernels.panel), columns = s.in_channels * s.taps();
  const Buffer<factor_t> weights(columns * panels * kernels.panel / kernels.pair);
  const ForwardCall<scalar_t, map_t, acc_t, factor_t> call{
      s, blocks, map.const_data_ptr<map_t>(), map_stride, outside.data(), offset.const_data_ptr<acc_t>(),
      mask.defined() ? mask.const_data_ptr<acc_t>() : nullptr, start.data(),
      weight_of(weight, weight.const_data_ptr<scalar_t>()), weights.data(),
      images(output.data_ptr<scalar_t>(), s.out_channels, s.out_pixels(), last)};
  at::parallel_for(
      0, blocks.size() * panels, ceil_div(grain, kernels.panel * forward_channels * s.taps()),
      [&](int64_t begin, int64_t end) { kernels.pack_weights(call, begin, end); });
  const TileRows rows(s);
  at::parallel_for(0, s.batch * s.out_pixels(), ceil_div(grain, columns), [&](int64_t begin, int64_t end) {
    kernels.forward_rows(call, rows.row_at(begin), rows.row_at(end));
  });
  return output;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Adds up the windows of the gradient of the input that tasks left, over images that several strips share.
template <typename scalar_t, typename acc_t>
void add_windows(
    const BackwardCall<scalar_t, acc_t>& call, const std::vector<Strip>& strips, const std::vector<Block>& blocks,
    const std::vector<Leftovers<acc_t>>& left) {
  struct Piece {
    int64_t image, strip, window;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> first;  // piece of each image
  for (size_t i = 0; i < strips.size(); ++i) {
    int64_t window = 0;
    for (const Part& part : strips[i].parts) {
      if (part.whole) continue;
      if (pieces.empty() || pieces.back().image != part.image) first.push_back(pieces.size());
      pieces.push_back({part.image, static_cast<int64_t>(i), window++});
    }
  }
  const int64_t count = blocks.size(), height = call.s.in_height, width = call.s.in_width;
  at::parallel_for(0, first.size() * count * height, 8, [&](int64_t begin, int64_t end) {
    const Buffer<acc_t> sums(width * backward_channels);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t y = item % height, b = item / height % count, channels = blocks[b].channels;
      size_t i = first[item / height / count];
      const int64_t image = pieces[i].image;
      std::fill_n(sums.data(), width * channels, acc_t(0));
      for (; i < pieces.size() && pieces[i].image == image; ++i) {
        const auto& window = left[pieces[i].strip * count + b].windows[pieces[i].window];
        if (y < window.begin || y >= window.end) continue;
        const acc_t* const row = window.rows.data() + (y - window.begin) * width * channels;
        for (int64_t j = 0; j < width * channels; ++j) sums.data()[j] += row[j];
      }
      from_channels_last(
          call.input_grad.at(image, blocks[b].channel, y * width), sums.data(), width, channels,
          call.input_grad.channel, call.input_grad.pixel);
    }
  });
}

// Adds up the strips' gradients of the weight and stores them.
template <typename scalar_t, typename acc_t>
void add_weight_grads(
    const BackwardCall<scalar_t, acc_t>& call, int64_t strips, const std::vector<Block>& blocks,
    const std::vector<Leftovers<acc_t>>& left) {
  const int64_t outputs = call.s.out_channels / call.s.groups, taps = call.s.taps();
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t k = 0; k < taps; ++k) {
          const int64_t at = (k / chunk_taps * rounded_up(outputs, 2) + o) * backward_width + k % chunk_taps * blocks[b].channels;
          scalar_t* const to = call.weight_grad.data + (blocks[b].output + o) * call.weight_grad.output +
                               blocks[b].channel_in_group * call.weight_grad.channel + k * call.weight_grad.tap;
          for (int64_t c = 0; c < blocks[b].channels; ++c) {
            acc_t sum = left[b].weight_grad.data()[at + c];
            for (int64_t i = 1; i < strips; ++i) sum += left[i * blocks.size() + b].weight_grad.data()[at + c];
            to[c * call.weight_grad.channel] = static_cast<scalar_t>(sum);
          }
        }
      }
    }
  });
}

// Adds the gradients of offset and mask that tasks left to what others have put into the results.
template <typename scalar_t, typename acc_t>
void add_sample_grads(
    const BackwardCall<scalar_t, acc_t>& call, const std::vector<Strip>& strips, const std::vector<Block>& blocks,
    const std::vector<Leftovers<acc_t>>& left) {
  const DeformConvShape& s = call.s;
  const int64_t taps = s.taps(), planes = call.mask_grad ? 3 * taps : 2 * taps;
  at::parallel_for(0, strips.size() * planes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Strip& strip = strips[item / planes];
      const int64_t plane = item % planes;
      for (size_t b = 0; b < blocks.size(); ++b) {
        const Buffer<acc_t>& buffer = left[item / planes * blocks.size() + b].sample_grads;
        if (!buffer.data()) continue;
        for (const Part& part : strip.parts) {
          const int64_t own = part.image * s.offset_groups + blocks[b].offset_group;
          acc_t* const to = plane < 2 * taps ? call.offset_grad + (own * 2 * taps + plane) * s.out_pixels()
                                             : call.mask_grad + (own * taps + plane - 2 * taps) * s.out_pixels();
          const acc_t* const from = buffer.data() + plane * strip.pixels + part.before;
          const int64_t width = s.out_width;
          for (int64_t p = 0; p < (part.end - part.begin) * width; ++p) to[part.begin * width + p] += from[p];
        }
      }
    }
  });
}

template <typename scalar_t, typename map_t, typename acc_t, typename factor_t>
Gradients backward(
    const DeformConvKernels<scalar_t, map_t, acc_t, factor_t>& kernels, const DeformConvShape& s,
    const at::Tensor& grad_, const at::Tensor& input_, const at::Tensor& offset_, const at::Tensor& weight_,
    const std::optional<at::Tensor>& mask_, std::array<bool, 4> wanted) {
  const at::Tensor grad = dense(grad_), input = dense(input_), weight = dense(weight_), offset = as<acc_t>(offset_);
  const at::Tensor mask = mask_.has_value() ? as<acc_t>(*mask_) : at::Tensor();
  wanted[3] = wanted[3] && mask.defined();
  const bool by_sample = wanted[1] || wanted[3], last = is_channels_last(input);
  const at::Tensor none = at::empty({0}, input.options());
  const at::Tensor input_grad = wanted[0] ? at::empty_like(input) : none;
  const at::Tensor weight_grad = wanted[2] ? at::empty_like(weight) : none;
  const at::Tensor offset_grad = by_sample ? at::zeros_like(offset) : none;
  const at::Tensor mask_grad = by_sample && mask.defined() ? at::zeros_like(mask) : none;

  const BackwardCall<scalar_t, acc_t> call{
      s,
      images(grad.const_data_ptr<scalar_t>(), s.out_channels, s.out_pixels(), is_channels_last(grad)),
      images(input.const_data_ptr<scalar_t>(), s.in_channels, s.in_pixels(), last),
      offset.const_data_ptr<acc_t>(),
      mask.defined() ? mask.const_data_ptr<acc_t>() : nullptr,
      weight_of(weight, weight.const_data_ptr<scalar_t>()),
      wanted[0],
      by_sample,
      wanted[2],
      images(wanted[0] ? input_grad.data_ptr<scalar_t>() : nullptr, s.in_channels, s.in_pixels(), last),
      by_sample ? offset_grad.data_ptr<acc_t>() : nullptr,
      by_sample && mask.defined() ? mask_grad.data_ptr<acc_t>() : nullptr,
      weight_of(weight, wanted[2] ? weight_grad.data_ptr<scalar_t>() : nullptr)};
  const std::vector<Block> blocks = blocks_of(s, backward_channels);
  const std::vector<Strip> strips = strips_of(s, blocks.size());
  std::vector<Leftovers<acc_t>> left(strips.size() * blocks.size());
  at::parallel_for(0, left.size(), 1, [&](int64_t begin, int64_t end) {
    bool in_place = false;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item % blocks.size();
      // The blocks of a strip add to the same gradients of offset and mask: into the results as long as their order
      // allows it, which is where one thread has them all from the first on.
      in_place = in_place || b == 0 || blocks[b].offset_group != blocks[b - 1].offset_group;
      kernels.backward_strip(call, strips[item / blocks.size()], blocks[b], in_place, left[item]);
    }
  });
  if (wanted[0]) add_windows(call, strips, blocks, left);
  if (wanted[2]) add_weight_grads(call, strips.size(), blocks, left);
  if (by_sample) add_sample_grads(call, strips, blocks, left);
  return {
      input_grad, wanted[1] ? offset_grad.to(offset_.scalar_type()) : none, weight_grad,
      wanted[3] ? mask_grad.to(mask_->scalar_type()) : none};
}

// Calls fn(kernels) with those for the type and this processor. bfloat16 is multiplied in pairs along the channels and
// the outputs, where the processor can and both are even.
template <typename fn_t>
auto dispatch_kernels(const DeformConvShape& s, at::ScalarType type, const fn_t& fn) {
  const bool even = s.in_channels / s.groups % 2 == 0 && s.in_channels / s.offset_groups % 2 == 0 &&
                    s.out_channels / s.groups % 2 == 0;
  const auto choose_isa = [&](auto scalar, auto map, auto acc) {
    using scalar_t = decltype(scalar);
    using map_t = decltype(map);
    using acc_t = decltype(acc);
#if defined(DCNV2_X86_ISAS)
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      if (even && isa() == Isa::avx512_bf16) {
        return fn(avx512_bf16::kernels<scalar_t, map_t, acc_t, scalar_t, Bfloat16Pair>());
      }
    }
    if (isa() >= Isa::avx512) return fn(avx512::kernels<scalar_t, map_t, acc_t, acc_t, acc_t>());
    if (isa() == Isa::avx2) return fn(avx2::kernels<scalar_t, map_t, acc_t, acc_t, acc_t>());
#endif
    return fn(plain::kernels<scalar_t, map_t, acc_t, acc_t, acc_t>());
  };
  switch (type) {
    case at::kDouble:
      return choose_isa(double(), double(), double());
    case at::kFloat:
      return choose_isa(float(), float(), float());
    case at::kBFloat16:
      return choose_isa(at::BFloat16(), at::BFloat16(), float());
    case at::kHalf:
      return choose_isa(at::Half(), float(), float());
    default:
      TORCH_CHECK_TYPE(false, "deform_conv2d: input must be float64, float32, bfloat16 or float16, got ", type);
  }
}

at::Tensor deform_conv2d(
    const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const DeformConvShape s = check_deform_conv(input, offset, weight, bias, mask, stride, padding, dilation);
  return dispatch_kernels(s, input.scalar_type(), [&](const auto& kernels) {
    return forward(kernels, s, input, offset, weight, bias, mask);
  });
}

Gradients deform_conv2d_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 4> wanted) {
  const DeformConvShape s = check_deform_conv(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_grad("deform_conv2d", grad, input, {s.batch, s.out_channels, s.out_height, s.out_width}, "[N, O, Ho, Wo]");
  return dispatch_kernels(s, input.scalar_type(), [&](const auto& kernels) {
    return backward(kernels, s, grad, input, offset, weight, mask, wanted);
  });
}

}  // namespace
}  // namespace dcnv2::cpu

TORCH_LIBRARY_IMPL(dcnv2_d2, CPU, m) {
  m.impl("deform_conv2d", &dcnv2::cpu::deform_conv2d);
  m.impl("deform_conv2d_backward", &dcnv2::cpu::deform_conv2d_backward);
}
