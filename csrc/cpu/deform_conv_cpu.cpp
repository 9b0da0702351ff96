// Deformable convolution on the CPU, forward and backward.
//
// A thread samples a tile of output pixels into columns that stay in its cache, some channels at a time, and multiplies
// them there and then with a product of our own (product.h): one parallel loop, nothing shared, no call of a library.
// Forward, threads share out the output pixels. Backward, they share out blocks of channels (and strips of output
// pixels, where the blocks are few): a task owns its channels of the input's and of the weight's gradient, so nothing
// is atomic. What tasks have in common is added up when all are done. Every sum has one order, which the shape of the
// call decides: equal inputs give equal bits, whatever the number of threads.
//
// deform_conv_plan.h says how a call is cut into pieces; deform_conv_forward.h and deform_conv_backward.h have what is
// done with one, and are compiled for several instruction sets, of which isa.h chooses.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "bilinear.h"
#include "cpu/deform_conv_plan.h"
#include "cpu/isa.h"
#include "deform_conv.h"

#if defined(DCNV2_X86_ISAS)
#include <immintrin.h>
#endif

#define DCNV2_ISA plain
#define DCNV2_VECTOR_BYTES 16
#define DCNV2_BFLOAT16_PAIRS 0
#include "cpu/deform_conv_kernels.h"

#if defined(DCNV2_X86_ISAS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define DCNV2_ISA avx2
#define DCNV2_VECTOR_BYTES 32
#define DCNV2_BFLOAT16_PAIRS 0
#include "cpu/deform_conv_kernels.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define DCNV2_ISA avx512
#define DCNV2_VECTOR_BYTES 64
#define DCNV2_BFLOAT16_PAIRS 0
#include "cpu/deform_conv_kernels.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512,avx512bf16")
#define DCNV2_ISA avx512_bf16
#define DCNV2_VECTOR_BYTES 64
#define DCNV2_BFLOAT16_PAIRS 1
#include "cpu/deform_conv_kernels.h"
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
  const at::Tensor output =
      at::empty({s.batch, s.out_channels, s.out_height, s.out_width}, input.options(), input.suggest_memory_format());
  if (output.numel() == 0) return output;
  advise_large_pages(output);

  at::Tensor map = input;
  int64_t map_stride = s.in_channels;
  if (!last || !std::is_same_v<scalar_t, map_t>) {
    map_stride += 16;  // against conflicts in the cache
    map =
        at::empty({s.batch, s.in_pixels(), map_stride}, input.options().dtype(c10::CppTypeToScalarType<map_t>::value));
    advise_large_pages(map);
    const Images<map_t> to{map.data_ptr<map_t>(), s.in_pixels() * map_stride, 1, map_stride};
    const auto from = images(input.const_data_ptr<scalar_t>(), s.in_channels, s.in_pixels(), last);
    at::parallel_for(
        0, s.batch * s.in_height, ceil_div(grain, s.in_channels * s.in_width),
        [&](int64_t begin, int64_t end) { kernels.lay_out_rows(s, to, from, begin, end); });
  }
  const int64_t outputs = s.out_channels / s.groups, padded = rounded_up(outputs, kernels.lanes);
  const Buffer<acc_t> start = zeros<acc_t>(s.groups * padded);
  for (int64_t o = 0; o < s.out_channels && bias.has_value(); ++o) {
    start.data()[o / outputs * padded + o % outputs] =
        static_cast<acc_t>(bias->const_data_ptr<scalar_t>()[o * bias->stride(0)]);
  }
  const Buffer<map_t> outside = zeros<map_t>(forward_channels);
  const std::vector<Block> blocks = blocks_of(s, forward_channels);
  const int64_t panels = ceil_div(outputs, kernels.panel), columns = s.in_channels * s.taps();
  const Buffer<factor_t> weights(columns * panels * kernels.panel / kernels.pair);
  const ForwardCall<scalar_t, map_t, acc_t, factor_t> call{
      s,
      blocks,
      map.const_data_ptr<map_t>(),
      map_stride,
      outside.data(),
      offset.const_data_ptr<acc_t>(),
      mask.defined() ? mask.const_data_ptr<acc_t>() : nullptr,
      start.data(),
      weight_of(weight, weight.const_data_ptr<scalar_t>()),
      weights.data(),
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

// What the tasks of the backward pass left, and how it is added up: in items that threads share out, each in the order
// of the tasks
template <typename scalar_t, typename acc_t>
struct Sums {
  const BackwardCall<scalar_t, acc_t>& call;
  const std::vector<Strip>& strips;
  const std::vector<Block>& blocks;
  std::vector<Leftovers<acc_t>> left;  // [strips, blocks]

  // The windows of the gradient of the input that lie on one image
  struct Piece {
    int64_t strip, window;
  };
  struct Shared {
    int64_t image;
    std::vector<Piece> pieces;
  };
  std::vector<Shared> shared;  // the images that several strips share

  Sums(const BackwardCall<scalar_t, acc_t>& call, const std::vector<Strip>& strips, const std::vector<Block>& blocks)
      : call(call), strips(strips), blocks(blocks), left(strips.size() * blocks.size()) {
    for (size_t i = 0; i < strips.size(); ++i) {
      int64_t window = 0;
      for (const Part& part : strips[i].parts) {
        if (part.whole) continue;
        if (shared.empty() || shared.back().image != part.image) shared.push_back({part.image, {}});
        shared.back().pieces.push_back({static_cast<int64_t>(i), window++});
      }
    }
  }

  int64_t rows() const { return call.by_input ? shared.size() * blocks.size() * call.s.in_height : 0; }
  int64_t outputs() const { return call.by_weight ? call.s.out_channels / call.s.groups * blocks.size() : 0; }
  int64_t planes() const { return call.by_sample ? strips.size() * call.s.taps() * (call.mask_grad ? 3 : 2) : 0; }
  void add(int64_t item) const {
    if (item < rows()) {
      add_windows(item);
    } else if (item < rows() + outputs()) {
      add_weight_grads(item - rows());
    } else {
      add_sample_grads(item - rows() - outputs());
    }
  }

  // One row of one image's gradient of the input, of one block
  void add_windows(int64_t item) const {
    const int64_t width = call.s.in_width, y = item % call.s.in_height, b = item / call.s.in_height % blocks.size();
    const Shared& image = shared[item / call.s.in_height / blocks.size()];
    const int64_t channels = blocks[b].channels;
    const Buffer<acc_t> sums = zeros<acc_t>(width * channels);
    for (const Piece& piece : image.pieces) {
      const auto& window = left[piece.strip * blocks.size() + b].windows[piece.window];
      if (y < window.begin || y >= window.end) continue;
      const acc_t* const row = window.rows.data() + (y - window.begin) * width * channels;
      for (int64_t j = 0; j < width * channels; ++j) sums.data()[j] += row[j];
    }
    plain::store_pixels(
        call.input_grad, image.image, blocks[b].channel, y * width, sums.data(), channels, width, channels);
  }

  // One output's gradient of the weight, of one block
  void add_weight_grads(int64_t item) const {
    const int64_t outputs = call.s.out_channels / call.s.groups, o = item % outputs, b = item / outputs;
    const Block& block = blocks[b];
    scalar_t* const to = call.weight_grad.data + (block.output + o) * call.weight_grad.output +
                         block.channel_in_group * call.weight_grad.channel;
    for (int64_t k = 0; k < call.s.taps(); ++k) {
      const int64_t row = k / chunk_taps * rounded_up(outputs, 2) + o;
      const int64_t first = row * backward_width + k % chunk_taps * block.channels;
      for (int64_t c = 0; c < block.channels; ++c) {
        acc_t sum = 0;
        for (size_t i = b; i < left.size(); i += blocks.size()) sum += left[i].weight_grad.data()[first + c];
        to[c * call.weight_grad.channel + k * call.weight_grad.tap] = static_cast<scalar_t>(sum);
      }
    }
  }

  // One plane of one strip's gradients of offset and mask: to what threads have put into the results, what others left
  void add_sample_grads(int64_t item) const {
    const int64_t taps = call.s.taps(), pixels = call.s.out_pixels(), width = call.s.out_width;
    const int64_t strip = item % strips.size(), plane = item / strips.size();
    for (size_t b = 0; b < blocks.size(); ++b) {
      const Buffer<acc_t>& buffer = left[strip * blocks.size() + b].sample_grads;
      if (!buffer.data()) continue;
      for (const Part& part : strips[strip].parts) {
        const int64_t group = part.image * call.s.offset_groups + blocks[b].offset_group;
        acc_t* const to = plane < 2 * taps ? call.offset_grad + (group * 2 * taps + plane) * pixels
                                           : call.mask_grad + (group * taps + plane - 2 * taps) * pixels;
        const acc_t* const from = buffer.data() + plane * strips[strip].pixels + part.before;
        for (int64_t p = 0; p < (part.end - part.begin) * width; ++p) to[part.begin * width + p] += from[p];
      }
    }
  }
};

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
  const at::Tensor offset_grad = by_sample ? at::empty_like(offset) : none;
  const at::Tensor mask_grad = wanted[3] ? at::empty_like(mask) : none;

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
      wanted[3] ? mask_grad.data_ptr<acc_t>() : nullptr,
      weight_of(weight, wanted[2] ? weight_grad.data_ptr<scalar_t>() : nullptr)};
  const std::vector<Block> blocks = blocks_of(s, backward_channels);
  const std::vector<Strip> strips = strips_of(s, blocks.size());
  Sums<scalar_t, acc_t> sums(call, strips, blocks);
  at::parallel_for(0, sums.left.size(), 1, [&](int64_t begin, int64_t end) {
    bool in_place = false;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item % blocks.size();
      // The blocks of a strip add to the same gradients of offset and mask: in the results as long as their order
      // allows it, which is where one thread has them all from the first on.
      const bool first = b == 0 || blocks[b].offset_group != blocks[b - 1].offset_group;
      in_place = in_place || first;
      const Place place = first ? Place::store : in_place ? Place::add : Place::leave;
      kernels.backward_strip(call, strips[item / blocks.size()], blocks[b], place, sums.left[item]);
    }
  });
  at::parallel_for(0, sums.rows() + sums.outputs() + sums.planes(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) sums.add(item);
  });
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
