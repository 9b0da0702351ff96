// What the RoI poolings share on the CPU.
//
// The samples of a bin form a grid, so their weights are products of one of the row and one of the column: a bin is a
// sum over the pixels that its samples touch, each once, however many samples touch it. The map is laid out channels
// last, so that a pixel is a contiguous vector: where the input is not, a block of channels of one image at a time, in
// memory that is used again and stays in the cache. Forward, threads share out the boxes; backward, each owns a block
// of channels of the input gradient, so nothing is atomic and every run gives the same bits.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/channels_last.h"
#include "roi_bins.h"

namespace dcnv2::cpu {

// Channels of one image, pixel by pixel: [groups * H * W] rows of channels, which begin `stride` elements apart.
template <typename value_t>
struct Rows {
  value_t* data;
  int64_t stride;
};

// The pixels of one bin, by the place of their rows (in elements), and their weights.
template <typename acc_t>
struct BinStencil {
  AxisStencil<acc_t, std::vector<StencilEntry<acc_t>>> rows, columns;
  std::vector<int64_t> places;
  std::vector<acc_t> weights;
  acc_t samples = 0;

  // False for a bin without samples, which is zero. `factor` goes into the weights, `stride` is that of the rows.
  bool locate(const PoolBin<acc_t>& bin, const PoolSizes& s, acc_t factor, int64_t stride) {
    rows.locate(bin.y, bin.y.first, bin.y.last, s.height, static_cast<acc_t>(s.reach));
    columns.locate(bin.x, bin.x.first, bin.x.last, s.width, static_cast<acc_t>(s.reach));
    places.clear();
    weights.clear();
    if (rows.samples == 0 || columns.samples == 0) return false;
    samples = bin.samples > 0 ? bin.samples : acc_t(rows.samples * columns.samples);
    const int64_t first = bin.plane % s.groups * s.pixels();
    for (const auto& row : rows.entries) {
      const acc_t weight = factor / samples * row.weight;
      for (const auto& column : columns.entries) {
        places.push_back((first + row.pixel * s.width + column.pixel) * stride);
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

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Channels of a block: an equal part of `channels`, of which the rows of one image take up no more than 15 MB (fresh
// memory costs more than what is done with it, and an allocator does not keep large pieces); a cache line at least.
template <typename acc_t>
int64_t block_of_channels(const PoolSizes& s, int64_t channels) {
  constexpr int64_t most = (15 << 20) / sizeof(acc_t), least = 16;
  const int64_t fit = std::max(most / std::max<int64_t>(s.groups * s.pixels(), 1) / least * least, least);
  const int64_t parts = std::max<int64_t>((channels + fit - 1) / fit, 1);
  return std::max(rounded_up((channels + parts - 1) / parts, least), least);
}

// The tensors of one call in the types and layouts that the loops want.
template <typename scalar_t, typename acc_t>
struct PoolCall {
  const PoolSizes& s;
  at::Tensor input;                            // dense
  at::Tensor boxes, offset, mask;              // contiguous, acc_t; offset and mask may be undefined
  std::vector<std::vector<int64_t>> boxes_of;  // by image
  bool direct;                                 // whether the input is rows of acc_t already
  at::TensorOptions options = at::TensorOptions().dtype(c10::CppTypeToScalarType<acc_t>::value);

  PoolCall(
      const PoolSizes& sizes, const at::Tensor& input_, const at::Tensor& boxes_,
      const std::optional<at::Tensor>& offset_, const std::optional<at::Tensor>& mask_)
      : s(sizes), input(input_.contiguous(input_.suggest_memory_format())), boxes_of(sizes.batch) {
    boxes = boxes_.to(options).contiguous();
    if (offset_.has_value()) offset = offset_->to(options).contiguous();
    if (mask_.has_value()) mask = mask_->to(options).contiguous();
    for (int64_t k = 0; k < s.boxes; ++k) {
      const acc_t index = boxes.const_data_ptr<acc_t>()[k * 5];
      TORCH_CHECK_VALUE(
          index >= 0 && index < acc_t(s.batch), s.op, ": boxes must have a batch index from 0 to ", s.batch - 1,
          " in their first column, got ", index, " in row ", k);
      boxes_of[static_cast<int64_t>(index)].push_back(k);
    }
    direct = input.stride(1) == 1 && s.groups == 1 && std::is_same_v<scalar_t, acc_t>;
  }

  PoolArguments<acc_t> arguments() const {
    return {boxes.const_data_ptr<acc_t>(), offset.defined() ? offset.const_data_ptr<acc_t>() : nullptr};
  }
  acc_t mask_of(int64_t bin) const { return mask.defined() ? mask.const_data_ptr<acc_t>()[bin] : acc_t(1); }

  int64_t elements_of(int64_t channels) const { return direct ? 0 : s.groups * s.pixels() * channels; }

  // The channels first .. last - 1 of image n of the input; copied into `buffer`, if they are no rows.
  Rows<const acc_t> rows(int64_t n, int64_t first, int64_t last, acc_t* buffer) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (direct) return {input.const_data_ptr<acc_t>() + n * s.pixels() * s.channels + first, s.channels};
    }
    for_each_plane(n, first, last, [&](int64_t at, int64_t place, int64_t channel_stride, int64_t pixel_stride) {
      to_channels_last(
          buffer + place, input.const_data_ptr<scalar_t>() + at, s.pixels(), last - first, channel_stride,
          pixel_stride);
    });
    return {buffer, last - first};
  }
  // The rows of a result that is laid out as the input, to be added to, and their way back
  Rows<acc_t> result_rows(const at::Tensor& tensor, int64_t n, int64_t first, int64_t last, acc_t* buffer) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (direct) return {tensor.data_ptr<acc_t>() + n * s.pixels() * s.channels + first, s.channels};
    }
    std::fill(buffer, buffer + elements_of(last - first), acc_t(0));
    return {buffer, last - first};
  }
  void store_rows(const at::Tensor& tensor, int64_t n, int64_t first, int64_t last, const acc_t* buffer) const {
    if (direct) return;
    for_each_plane(n, first, last, [&](int64_t at, int64_t place, int64_t channel_stride, int64_t pixel_stride) {
      from_channels_last(
          tensor.data_ptr<scalar_t>() + at, buffer + place, s.pixels(), last - first, channel_stride, pixel_stride);
    });
  }

 private:
  // visit(where a plane of image n begins in a dense tensor [N, channels * groups, H, W], where in the rows, strides of
  // the former)
  template <typename visit_t>
  void for_each_plane(int64_t n, int64_t first, int64_t last, const visit_t& visit) const {
    const int64_t channel = input.stride(1), pixel = channel == 1 ? s.groups * s.channels : 1;
    for (int64_t g = 0; g < s.groups; ++g) {
      visit(
          n * s.groups * s.channels * s.pixels() + (first * s.groups + g) * channel, g * s.pixels() * (last - first),
          s.groups * channel, pixel);
    }
  }
};

// Calls visit(image, first channel, last channel + 1) for each block of channels of each image.
template <typename visit_t>
void for_each_block(const PoolSizes& s, int64_t block, const visit_t& visit) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t c = 0; c < s.channels; c += block) visit(n, c, std::min(c + block, s.channels));
}

// `shape` is what locate_bin takes.
template <typename scalar_t, typename acc_t, typename shape_t>
at::Tensor pool_forward(
    const shape_t& shape, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  const PoolSizes s = shape.sizes();
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  const at::MemoryFormat layout = input.suggest_memory_format();
  const bool last_format = layout == at::MemoryFormat::ChannelsLast, straight = call.direct && last_format;
  const at::Tensor pooled =
      at::empty({s.boxes, s.channels, s.pooled_h, s.pooled_w}, input.options().memory_format(layout));
  advise_large_pages(pooled);
  const PoolArguments<acc_t> arguments = call.arguments();
  scalar_t* const data = pooled.data_ptr<scalar_t>();
  const int64_t class_channels = s.channels / s.classes;
  const int64_t block = call.direct ? s.channels : block_of_channels<acc_t>(s, s.channels);
  const at::Tensor buffer = at::empty({call.elements_of(block)}, call.options);
  advise_large_pages(buffer);
  for_each_block(s, block, [&](int64_t n, int64_t first, int64_t last) {
    const std::vector<int64_t>& chosen = call.boxes_of[n];
    if (chosen.empty()) return;
    const Rows<const acc_t> map = call.rows(n, first, last, buffer.data_ptr<acc_t>());
    at::parallel_for(0, chosen.size(), 1, [&](int64_t begin, int64_t end) {
      BinStencil<acc_t> stencil;
      const int64_t stride = straight ? s.channels : spaced(last - first);
      std::vector<acc_t> bins(straight ? 0 : s.bins() * stride);  // of one box, as rows of channels
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = chosen[i];
        scalar_t* box_data = data + k * s.bins() * s.channels + first * (last_format ? 1 : s.bins());
        acc_t* rows = bins.data();
        if constexpr (std::is_same_v<scalar_t, acc_t>) rows = straight ? box_data : rows;
        for (int64_t bin = 0; bin < s.bins(); ++bin) {
          for (int64_t c = first, c_end; c < last; c = c_end) {
            c_end = std::min(last, (c / class_channels + 1) * class_channels);
            stencil.locate(
                locate_bin(shape, arguments, k, bin, c / class_channels), s, call.mask_of(k * s.bins() + bin),
                map.stride);
            add_up_pixels(
                rows + bin * stride + c - first, map.data + c - first, stencil.places.data(), stencil.weights.data(),
                stencil.places.size(), c_end - c);
          }
        }
        if (!straight) {
          from_channels_last(
              box_data, rows, s.bins(), last - first, last_format ? 1 : s.bins(), last_format ? s.channels : 1, stride);
        }
      }
    });
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
  const bool with_map = wanted[1] || wanted[2];  // the gradient of the input needs none
  const bool last_format = grad.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const at::Tensor grads = grad.contiguous(grad.suggest_memory_format()), none = at::empty({0}, input.options());
  const at::Tensor input_grad =
      wanted[0] ? at::empty(input.sizes(), input.options().memory_format(input.suggest_memory_format())) : none;
  advise_large_pages(input_grad);
  if (call.direct) input_grad.zero_();
  const int64_t class_channels = s.channels / s.classes, threads = at::get_num_threads();
  const int64_t share = std::max<int64_t>(rounded_up((s.channels + threads - 1) / threads, 16), 16);
  const int64_t block = call.direct ? share : block_of_channels<acc_t>(s, share);
  const int64_t blocks = (s.channels + block - 1) / block;
  // A block of channels adds to sums of its own, which are added up in the order of the blocks.
  const at::Tensor offset_sums = at::zeros({blocks, wanted[1] ? offset->numel() : 0}, call.options);
  const at::Tensor mask_sums = at::zeros({blocks, wanted[2] ? mask->numel() : 0}, call.options);
  std::vector<at::Tensor> buffers;  // two for each thread
  for (int64_t i = 0; i < 2 * threads; ++i) {
    buffers.push_back(at::empty({(i % 2 == 0 ? with_map : wanted[0]) ? call.elements_of(block) : 0}, call.options));
    advise_large_pages(buffers.back());
  }
  const PoolArguments<acc_t> arguments = call.arguments();
  at::parallel_for(0, s.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    BinStencil<acc_t> stencil;
    std::vector<acc_t> rows(s.bins() * spaced(block)), dots;
    acc_t* const map_buffer = buffers[2 * at::get_thread_num()].template data_ptr<acc_t>();
    acc_t* const grad_buffer = buffers[2 * at::get_thread_num() + 1].template data_ptr<acc_t>();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / blocks, b = item % blocks, first = b * block, last = std::min(first + block, s.channels);
      Rows<const acc_t> map{nullptr, 0};
      Rows<acc_t> map_grad{nullptr, 0};
      if (with_map && !call.boxes_of[n].empty()) map = call.rows(n, first, last, map_buffer);
      if (wanted[0]) map_grad = call.result_rows(input_grad, n, first, last, grad_buffer);
      const int64_t stride = with_map ? map.stride : map_grad.stride;
      acc_t* offset_sum = offset_sums.data_ptr<acc_t>() + b * offset_sums.size(1);
      acc_t* mask_sum = mask_sums.data_ptr<acc_t>() + b * mask_sums.size(1);
      for (const int64_t k : call.boxes_of[n]) {
        to_channels_last(
            rows.data(),
            grads.const_data_ptr<scalar_t>() + k * s.bins() * s.channels + first * (last_format ? 1 : s.bins()),
            s.bins(), last - first, last_format ? 1 : s.bins(), last_format ? s.channels : 1, spaced(block));
        for (int64_t bin = 0; bin < s.bins(); ++bin) {
          const acc_t mask_value = call.mask_of(k * s.bins() + bin);
          for (int64_t c = first, c_end; c < last; c = c_end) {
            c_end = std::min(last, (c / class_channels + 1) * class_channels);
            const PoolBin<acc_t> at = locate_bin(shape, arguments, k, bin, c / class_channels);
            if (!stencil.locate(at, s, mask_value, stride)) continue;
            const acc_t* g = rows.data() + bin * spaced(block) + c - first;
            const int64_t count = stencil.places.size();
            if (wanted[0]) {
              scatter_to_pixels(
                  map_grad.data + c - first, g, stencil.places.data(), stencil.weights.data(), count, c_end - c);
            }
            if (!with_map) continue;
            dots.resize(count);
            dot_with_pixels(dots.data(), map.data + c - first, g, stencil.places.data(), count, c_end - c);
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
      if (wanted[0]) call.store_rows(input_grad, n, first, last, grad_buffer);
    }
  });
  return {
      input_grad, wanted[1] ? offset_sums.sum(0).view(offset->sizes()).to(offset->scalar_type()) : none,
      wanted[2] ? mask_sums.sum(0).view(mask->sizes()).to(mask->scalar_type()) : none};
}

// For RoIPoolOperators
struct Pooling {
  template <typename scalar_t, typename acc_t, typename... arguments_t>
  static auto forward(const arguments_t&... arguments) {
    return pool_forward<scalar_t, acc_t>(arguments...);
  }
  template <typename scalar_t, typename acc_t, typename... arguments_t>
  static auto backward(const arguments_t&... arguments) {
    return pool_backward<scalar_t, acc_t>(arguments...);
  }
  static void sums_in_any_order(const char* /* name */) {}  // nothing is atomic
};

}  // namespace dcnv2::cpu
