// What the RoI poolings share on the CPU.
//
// The samples of a bin form a grid, so their weights are products of one of the row and one of the column: a bin is a
// sum over the pixels that its samples touch, each once, however many samples touch it. The map is laid out channels
// last, so that a pixel is a contiguous vector. Forward, threads share out the boxes; backward, each owns a block of
// channels of the input gradient, so nothing is atomic and every run gives the same bits.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/channels_last.h"
#include "roi_bins.h"

namespace dcnv2 {

// The pixels of one bin, by their place in the map (in elements), and their weights.
template <typename acc_t>
struct BinStencil {
  AxisStencil<acc_t, std::vector<StencilEntry<acc_t>>> rows, columns;
  std::vector<int64_t> places;
  std::vector<acc_t> weights;
  acc_t samples = 0;

  // False for a bin without samples, which is zero. `factor` goes into the weights.
  bool locate(const PoolBin<acc_t>& bin, const PoolSizes& s, acc_t factor, int64_t first_channel) {
    rows.locate(bin.y, bin.y.first, bin.y.last, s.height, static_cast<acc_t>(s.reach));
    columns.locate(bin.x, bin.x.first, bin.x.last, s.width, static_cast<acc_t>(s.reach));
    places.clear();
    weights.clear();
    if (rows.samples == 0 || columns.samples == 0) return false;
    samples = bin.samples > 0 ? bin.samples : acc_t(rows.samples * columns.samples);
    for (const auto& row : rows.entries) {
      const acc_t weight = factor / samples * row.weight;
      for (const auto& column : columns.entries) {
        places.push_back((bin.plane * s.pixels() + row.pixel * s.width + column.pixel) * s.channels + first_channel);
        weights.push_back(weight * column.weight);
      }
    }
    return true;
  }
};

// out [channels] = sum of weights * pixels
template <typename acc_t>
DCNV2_MULTIVERSION void add_up_pixels(
    acc_t* out, const acc_t* map, const int64_t* places, const acc_t* weights, int64_t count, int64_t channels) {
  std::fill(out, out + channels, acc_t(0));
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const acc_t *v0 = map + places[i], *v1 = map + places[i + 1], *v2 = map + places[i + 2], *v3 = map + places[i + 3];
    const acc_t w0 = weights[i], w1 = weights[i + 1], w2 = weights[i + 2], w3 = weights[i + 3];
    DCNV2_SIMD
    for (int64_t c = 0; c < channels; ++c) out[c] += w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c];
  }
  for (; i < count; ++i) {
    const acc_t* v = map + places[i];
    const acc_t w = weights[i];
    DCNV2_SIMD
    for (int64_t c = 0; c < channels; ++c) out[c] += w * v[c];
  }
}

// pixels += weights * grad [channels]
template <typename acc_t>
DCNV2_MULTIVERSION void scatter_to_pixels(
    acc_t* map, const acc_t* grad, const int64_t* places, const acc_t* weights, int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; ++i) {
    acc_t* v = map + places[i];
    const acc_t w = weights[i];
    DCNV2_SIMD
    for (int64_t c = 0; c < channels; ++c) v[c] += w * grad[c];
  }
}

// dots [count] = products of grad [channels] with each pixel
template <typename acc_t>
DCNV2_MULTIVERSION void dot_with_pixels(
    acc_t* dots, const acc_t* map, const acc_t* grad, const int64_t* places, int64_t count, int64_t channels) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const acc_t *v0 = map + places[i], *v1 = map + places[i + 1], *v2 = map + places[i + 2], *v3 = map + places[i + 3];
    acc_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    DCNV2_SIMD_SUM(s0, s1, s2, s3)
    for (int64_t c = 0; c < channels; ++c) {
      s0 += grad[c] * v0[c];
      s1 += grad[c] * v1[c];
      s2 += grad[c] * v2[c];
      s3 += grad[c] * v3[c];
    }
    dots[i] = s0, dots[i + 1] = s1, dots[i + 2] = s2, dots[i + 3] = s3;
  }
  for (; i < count; ++i) {
    const acc_t* v = map + places[i];
    acc_t sum = 0;
    DCNV2_SIMD_SUM(sum)
    for (int64_t c = 0; c < channels; ++c) sum += grad[c] * v[c];
    dots[i] = sum;
  }
}

// Elements from one row of so many channels to the next, chosen against conflicts in the cache
inline int64_t spaced(int64_t channels) { return channels + 16; }

// The tensors of one call in the types and layouts that the loops want.
template <typename scalar_t, typename acc_t>
struct PoolCall {
  const PoolSizes& s;
  at::Tensor map;                  // [N, groups, H * W, channels], acc_t
  at::Tensor boxes, offset, mask;  // contiguous, acc_t; offset and mask may be undefined
  at::TensorOptions options = at::TensorOptions().dtype(c10::CppTypeToScalarType<acc_t>::value);

  PoolCall(
      const PoolSizes& sizes, const at::Tensor& input, const at::Tensor& boxes_,
      const std::optional<at::Tensor>& offset_, const std::optional<at::Tensor>& mask_)
      : s(sizes) {
    boxes = boxes_.to(options).contiguous();
    if (offset_.has_value()) offset = offset_->to(options).contiguous();
    if (mask_.has_value()) mask = mask_->to(options).contiguous();
    for (int64_t k = 0; k < s.boxes; ++k) {
      const acc_t index = boxes.const_data_ptr<acc_t>()[k * 5];
      TORCH_CHECK_VALUE(
          index >= 0 && index < acc_t(s.batch), s.op, ": boxes must have a batch index from 0 to ", s.batch - 1,
          " in their first column, got ", index, " in row ", k);
    }
    const at::Tensor dense = input.contiguous(input.suggest_memory_format());
    const bool last = dense.stride(1) == 1;
    if (last && s.groups == 1 && std::is_same_v<scalar_t, acc_t>) {
      map = dense.permute({0, 2, 3, 1});
      return;
    }
    map = at::empty({s.batch, s.groups, s.pixels(), s.channels}, options);
    advise_large_pages(map);
    for_each_plane(dense, [&](int64_t at, int64_t place, int64_t channel_stride, int64_t pixel_stride) {
      to_channels_last(
          map.data_ptr<acc_t>() + place, dense.const_data_ptr<scalar_t>() + at, s.pixels(), s.channels, channel_stride,
          pixel_stride);
    });
  }

  PoolArguments<acc_t> arguments() const {
    return {boxes.const_data_ptr<acc_t>(), offset.defined() ? offset.const_data_ptr<acc_t>() : nullptr};
  }
  acc_t mask_of(int64_t bin) const { return mask.defined() ? mask.const_data_ptr<acc_t>()[bin] : acc_t(1); }

  // The gradient of the map as a tensor of the size and layout of `input`
  at::Tensor input_grad(const at::Tensor& map_grad, const at::Tensor& input) const {
    const at::MemoryFormat layout = input.suggest_memory_format();
    if (s.groups == 1 && layout == at::MemoryFormat::ChannelsLast) {
      return map_grad.view({s.batch, s.height, s.width, s.channels}).permute({0, 3, 1, 2}).to(input.scalar_type());
    }
    const at::Tensor grad = at::empty(input.sizes(), input.options().memory_format(layout));
    advise_large_pages(grad);
    for_each_plane(grad, [&](int64_t at, int64_t place, int64_t channel_stride, int64_t pixel_stride) {
      from_channels_last(
          grad.data_ptr<scalar_t>() + at, map_grad.const_data_ptr<acc_t>() + place, s.pixels(), s.channels,
          channel_stride, pixel_stride);
    });
    return grad;
  }

 private:
  // visit(where a plane begins in the dense tensor [N, channels * groups, H, W], where in the map, strides of the
  // former)
  template <typename visit_t>
  void for_each_plane(const at::Tensor& dense, const visit_t& visit) const {
    const bool last = dense.stride(1) == 1;
    for (int64_t p = 0; p < s.batch * s.groups; ++p) {
      visit(
          p / s.groups * dense.stride(0) + p % s.groups * dense.stride(1), p * s.pixels() * s.channels,
          s.groups * dense.stride(1), last ? s.groups * s.channels : 1);
    }
  }
};

// `shape` is what locate_bin takes.
template <typename scalar_t, typename acc_t, typename shape_t>
at::Tensor pool_forward(
    const shape_t& shape, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  const PoolSizes s = shape.sizes();
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  const at::MemoryFormat layout = input.suggest_memory_format();
  const bool last = layout == at::MemoryFormat::ChannelsLast, direct = last && std::is_same_v<scalar_t, acc_t>;
  const at::Tensor pooled =
      at::empty({s.boxes, s.channels, s.pooled_h, s.pooled_w}, input.options().memory_format(layout));
  advise_large_pages(pooled);
  const acc_t* map = call.map.template const_data_ptr<acc_t>();
  const PoolArguments<acc_t> arguments = call.arguments();
  scalar_t* const data = pooled.data_ptr<scalar_t>();
  const int64_t class_channels = s.channels / s.classes;
  at::parallel_for(0, s.boxes, 1, [&](int64_t begin, int64_t end) {
    BinStencil<acc_t> stencil;
    const int64_t stride = direct ? s.channels : spaced(s.channels);
    std::vector<acc_t> buffer(direct ? 0 : s.bins() * stride);  // the bins of one box as rows of channels
    for (int64_t k = begin; k < end; ++k) {
      scalar_t* box_data = data + k * s.bins() * s.channels;
      acc_t* rows = buffer.data();
      if constexpr (std::is_same_v<scalar_t, acc_t>) rows = direct ? box_data : rows;
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        for (int64_t c = 0; c < s.channels; c += class_channels) {
          stencil.locate(
              locate_bin(shape, arguments, k, bin, c / class_channels), s, call.mask_of(k * s.bins() + bin), c);
          add_up_pixels(
              rows + bin * stride + c, map, stencil.places.data(), stencil.weights.data(), stencil.places.size(),
              class_channels);
        }
      }
      if (!direct) {
        from_channels_last(box_data, rows, s.bins(), s.channels, last ? 1 : s.bins(), last ? s.channels : 1, stride);
      }
    }
  });
  return pooled;
}

using PoolGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <typename scalar_t, typename acc_t, typename shape_t>
PoolGradients pool_backward(
    const shape_t& shape, const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes,
    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& mask, std::array<bool, 3> wanted) {
  const PoolSizes s = shape.sizes();
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  wanted[1] = wanted[1] && offset.has_value();
  wanted[2] = wanted[2] && mask.has_value();
  const bool last_format = grad.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const at::Tensor grads = grad.contiguous(grad.suggest_memory_format());
  const int64_t class_channels = s.channels / s.classes, threads = at::get_num_threads();
  const int64_t block = std::max<int64_t>(((s.channels + threads - 1) / threads + 15) / 16 * 16, 16);
  const int64_t blocks = (s.channels + block - 1) / block;
  const at::Tensor map_grad = at::empty({wanted[0] ? call.map.numel() : 0}, call.options);
  advise_large_pages(map_grad);
  map_grad.zero_();
  // A block of channels adds to sums of its own, which are added up in the order of the blocks.
  const at::Tensor offset_sums = at::zeros({blocks, wanted[1] ? offset->numel() : 0}, call.options);
  const at::Tensor mask_sums = at::zeros({blocks, wanted[2] ? mask->numel() : 0}, call.options);
  const acc_t* map = call.map.template const_data_ptr<acc_t>();
  const PoolArguments<acc_t> arguments = call.arguments();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    BinStencil<acc_t> stencil;
    std::vector<acc_t> rows(s.bins() * spaced(block)), dots;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, last = std::min(first + block, s.channels);
      acc_t* offset_sum = offset_sums.data_ptr<acc_t>() + b * offset_sums.size(1);
      acc_t* mask_sum = mask_sums.data_ptr<acc_t>() + b * mask_sums.size(1);
      for (int64_t k = 0; k < s.boxes; ++k) {
        to_channels_last(
            rows.data(),
            grads.const_data_ptr<scalar_t>() + k * s.bins() * s.channels + first * (last_format ? 1 : s.bins()),
            s.bins(), last - first, last_format ? 1 : s.bins(), last_format ? s.channels : 1, spaced(block));
        for (int64_t bin = 0; bin < s.bins(); ++bin) {
          const acc_t mask_value = call.mask_of(k * s.bins() + bin);
          for (int64_t c = first, c_end; c < last; c = c_end) {
            c_end = std::min(last, (c / class_channels + 1) * class_channels);
            const PoolBin<acc_t> at = locate_bin(shape, arguments, k, bin, c / class_channels);
            if (!stencil.locate(at, s, mask_value, c)) continue;
            const acc_t* g = rows.data() + bin * spaced(block) + c - first;
            const int64_t count = stencil.places.size();
            if (wanted[0]) {
              scatter_to_pixels(
                  map_grad.data_ptr<acc_t>(), g, stencil.places.data(), stencil.weights.data(), count, c_end - c);
            }
            if (!wanted[1] && !wanted[2]) continue;
            dots.resize(count);
            dot_with_pixels(dots.data(), map, g, stencil.places.data(), count, c_end - c);
            acc_t by_y = 0, by_x = 0, by_mask = 0;
            const acc_t* dot = dots.data();
            for (const auto& row : stencil.rows.entries) {
              acc_t value = 0, slope = 0;
              for (const auto& column : stencil.columns.entries) {
                value += column.weight * *dot;
                slope += column.slope * *dot++;
              }
              by_y += row.slope * value;
              by_x += row.weight * slope;
              by_mask += row.weight * value;
            }
            if (wanted[1]) {
              offset_sum[at.offset_index] += mask_value / stencil.samples * at.move_x * by_x;
              offset_sum[at.offset_index + s.offset_stride] += mask_value / stencil.samples * at.move_y * by_y;
            }
            if (wanted[2]) mask_sum[k * s.bins() + bin] += by_mask / stencil.samples;
          }
        }
      }
    }
  });
  const at::Tensor none = at::empty({0}, input.options());
  return {
      wanted[0] ? call.input_grad(map_grad, input) : none,
      wanted[1] ? offset_sums.sum(0).view(offset->sizes()).to(offset->scalar_type()) : none,
      wanted[2] ? mask_sums.sum(0).view(mask->sizes()).to(mask->scalar_type()) : none};
}

// Calls fn(scalar, accumulator) with a zero of each type.
template <typename fn_t>
auto dispatch_pool(const char* op, at::ScalarType type, const fn_t& fn) {
  switch (type) {
    case at::kDouble:
      return fn(double(), double());
    case at::kFloat:
      return fn(float(), float());
    case at::kBFloat16:
      return fn(at::BFloat16(), float());
    case at::kHalf:
      return fn(at::Half(), float());
    default:
      TORCH_CHECK_TYPE(false, op, ": input must be float64, float32, bfloat16 or float16, got ", type);
  }
}

}  // namespace dcnv2
