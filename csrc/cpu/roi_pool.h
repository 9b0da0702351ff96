// What the RoI poolings share on the CPU.
//
// The samples of a bin form a grid, so their weights are products of one of the row and one of the column: a bin is a
// sum over the pixels that its samples touch, each once, however many samples touch it. Its rows and columns (the
// stencil) are found once for all channels that share their offsets, in parallel. The loops want a pixel as a
// contiguous vector of channels. A map that is so is used as it is: forward, threads share out the boxes. Of another, a
// thread lays out a block of channels of one image in memory that it uses again, and pools all boxes from it.
// Backward, a thread owns a block of channels of the input gradient in either case, so nothing is atomic. Blocks follow
// from the shape and what they have in common is added up in their order: equal inputs give equal bits, whatever the
// number of threads. The hot loops (roi_pool_loops.h) are compiled for several instruction sets (isa.h).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "roi_bins.h"

namespace dcnv2::cpu {

// One bin, for the channels of one class: how many rows and columns its samples touch, and where they lie in the
// entries (the columns follow the rows). Their `pixel` counts elements of the map. A bin without samples has none.
template <typename acc_t>
struct BinStencil {
  int64_t entries, rows, columns;
  acc_t scale, samples;  // of the sum: mask / samples
  int64_t offset_index;
  acc_t move_y, move_x;
};

template <typename acc_t>
struct BoxStencils {
  std::vector<BinStencil<acc_t>> bins;  // [classes, bins]
  std::vector<StencilEntry<acc_t>> entries;
};

// The functions of one instruction set, for one choice of types
template <typename scalar_t, typename acc_t>
struct RoIPoolKernels {
  void (*load_pixels)(
      acc_t* rows, int64_t stride, const Images<const scalar_t>& from, int64_t n, int64_t channel, int64_t pixel,
      int64_t pixels, int64_t channels);
  void (*store_pixels)(
      const Images<scalar_t>& to, int64_t n, int64_t channel, int64_t pixel, const acc_t* rows, int64_t stride,
      int64_t pixels, int64_t channels);
  void (*pool_bins)(
      acc_t* out, int64_t stride, const acc_t* map, const BinStencil<acc_t>* bins, const StencilEntry<acc_t>* entries,
      int64_t count, int64_t channels);
  void (*unpool_bins)(
      acc_t* map_grad, acc_t* dots, const acc_t* map, const acc_t* grad, int64_t stride, const BinStencil<acc_t>* bins,
      const StencilEntry<acc_t>* entries, int64_t count, int64_t channels);
};

}  // namespace dcnv2::cpu

#define DCNV2_ISA plain
#define DCNV2_VECTOR_BYTES 16
#define DCNV2_BFLOAT16_PAIRS 0
#include "cpu/vectors.h"
//
#include "cpu/roi_pool_loops.h"

#if defined(DCNV2_X86_ISAS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#undef DCNV2_ISA
#undef DCNV2_VECTOR_BYTES
#define DCNV2_ISA avx2
#define DCNV2_VECTOR_BYTES 32
#include "cpu/vectors.h"
//
#include "cpu/roi_pool_loops.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#undef DCNV2_ISA
#undef DCNV2_VECTOR_BYTES
#define DCNV2_ISA avx512
#define DCNV2_VECTOR_BYTES 64
#include "cpu/vectors.h"
//
#include "cpu/roi_pool_loops.h"
#pragma GCC pop_options
#endif

namespace dcnv2::cpu {

template <typename scalar_t, typename acc_t>
RoIPoolKernels<scalar_t, acc_t> roi_pool_kernels(bool by_input, bool by_sample) {
#if defined(DCNV2_X86_ISAS)
  if (isa() >= Isa::avx512) return avx512::roi_pool_kernels<scalar_t, acc_t>(by_input, by_sample);
  if (isa() == Isa::avx2) return avx2::roi_pool_kernels<scalar_t, acc_t>(by_input, by_sample);
#endif
  return plain::roi_pool_kernels<scalar_t, acc_t>(by_input, by_sample);
}

// Elements from the channels of one bin to those of the next, chosen against conflicts in the cache
inline int64_t spaced(int64_t channels) { return channels + 16; }

// The tensors of one call in the types and layouts that the loops want. `shape` is what locate_bin takes.
template <typename scalar_t, typename acc_t, typename shape_t>
struct PoolCall {
  const shape_t& shape;
  const PoolSizes s = shape.sizes();
  const bool with_map, with_map_grad;
  const RoIPoolKernels<scalar_t, acc_t> kernels;
  at::Tensor input;                            // dense
  at::Tensor boxes, offset, mask;              // contiguous, acc_t; offset and mask may be undefined
  std::vector<std::vector<int64_t>> boxes_of;  // by image
  bool channels_last, direct;                  // direct: whether the input is rows of acc_t already
  int64_t block, blocks, stride;               // channels of a block, and from one pixel to the next

  PoolCall(
      const shape_t& shape_, const at::Tensor& input_, const at::Tensor& boxes_,
      const std::optional<at::Tensor>& offset_, const std::optional<at::Tensor>& mask_, bool with_map_,
      bool with_map_grad_)
      : shape(shape_),
        with_map(with_map_),
        with_map_grad(with_map_grad_),
        kernels(roi_pool_kernels<scalar_t, acc_t>(with_map_grad, with_map)),
        input(input_.contiguous(input_.suggest_memory_format())),
        boxes_of(s.batch) {
    const auto as_acc = [](const at::Tensor& t) { return t.to(c10::CppTypeToScalarType<acc_t>::value).contiguous(); };
    boxes = as_acc(boxes_);
    if (offset_.has_value()) offset = as_acc(*offset_);
    if (mask_.has_value()) mask = as_acc(*mask_);
    for (int64_t k = 0; k < s.boxes; ++k) {
      const acc_t index = boxes.const_data_ptr<acc_t>()[k * 5];
      TORCH_CHECK_VALUE(
          index >= 0 && index < acc_t(s.batch), s.op, ": boxes must have a batch index from 0 to ", s.batch - 1,
          " in their first column, got ", index, " in row ", k);
      boxes_of[static_cast<int64_t>(index)].push_back(k);
    }
    channels_last = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    direct = input.stride(1) == 1 && s.groups == 1 && std::is_same_v<scalar_t, acc_t>;
    // Small enough for 16 threads to have work, and for 15 MB a thread (memory that is fresh costs more than what is
    // done with it, and an allocator keeps no larger pieces); but a cache line at least.
    const bool narrow = !direct && 32 * s.groups * s.pixels() * int64_t(sizeof(acc_t)) > 15 << 20;
    block = std::min<int64_t>(direct ? 64 : narrow ? 16 : 32, rounded_up(std::max<int64_t>(s.channels, 1), 16));
    blocks = ceil_div(s.channels, block);
    stride = direct ? s.channels : block;
  }

  int64_t class_of(int64_t channel) const { return channel / (s.channels / s.classes); }

  void locate(BoxStencils<acc_t>& box, int64_t k, int64_t first_class, int64_t last_class) const {
    AxisStencil<acc_t, std::vector<StencilEntry<acc_t>>> rows, columns;
    const PoolArguments<acc_t> arguments{
        boxes.const_data_ptr<acc_t>(), offset.defined() ? offset.const_data_ptr<acc_t>() : nullptr};
    box.bins.clear();
    box.entries.clear();
    for (int64_t c = first_class; c <= last_class; ++c) {
      for (int64_t i = 0; i < s.bins(); ++i) {
        const PoolBin<acc_t> bin = locate_bin(shape, arguments, k, i, c);
        rows.locate(bin.y, bin.y.first, bin.y.last, s.height, static_cast<acc_t>(s.reach));
        columns.locate(bin.x, bin.x.first, bin.x.last, s.width, static_cast<acc_t>(s.reach));
        if (rows.samples == 0 || columns.samples == 0) rows.entries.clear(), columns.entries.clear();
        const int64_t first = bin.plane % s.groups * s.pixels(), begin = box.entries.size();
        for (auto& row : rows.entries) row.pixel = (first + row.pixel * s.width) * stride;
        for (auto& column : columns.entries) column.pixel *= stride;
        box.entries.insert(box.entries.end(), rows.entries.begin(), rows.entries.end());
        box.entries.insert(box.entries.end(), columns.entries.begin(), columns.entries.end());
        const acc_t samples = bin.samples > 0 ? bin.samples : acc_t(rows.samples * columns.samples);
        const acc_t factor = mask.defined() ? mask.const_data_ptr<acc_t>()[k * s.bins() + i] : acc_t(1);
        box.bins.push_back(
            {begin, int64_t(rows.entries.size()), int64_t(columns.entries.size()), factor / samples, samples,
             bin.offset_index, bin.move_y, bin.move_x});
      }
    }
  }

  // Of all boxes; none where classes have offsets of their own, so that blocks share little.
  std::vector<BoxStencils<acc_t>> shared_stencils() const {
    std::vector<BoxStencils<acc_t>> all(s.classes == 1 ? s.boxes : 0);
    at::parallel_for(0, all.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) locate(all[k], k, 0, 0);
    });
    return all;
  }

  // visit(first bin stencil, entries, first channel, channels) for each class among the channels first .. last - 1
  template <typename visit_t>
  void for_each_class(
      const std::vector<BoxStencils<acc_t>>& shared, BoxStencils<acc_t>& own, int64_t k, int64_t first, int64_t last,
      const visit_t& visit) const {
    const int64_t first_class = class_of(first), each = s.channels / s.classes;
    if (shared.empty()) locate(own, k, first_class, class_of(last - 1));
    const BoxStencils<acc_t>& box = shared.empty() ? own : shared[k];
    for (int64_t c = first, end; c < last; c = end) {
      end = std::min(last, (class_of(c) + 1) * each);
      visit(box.bins.data() + (class_of(c) - first_class) * s.bins(), box.entries.data(), c, end - c);
    }
  }

  // Calls visit(buffers, image, first channel, channels) for each block of each image, with two buffers of a thread,
  // for the rows of a block of the map and of its gradient.
  template <typename visit_t>
  void for_each_block(const visit_t& visit) const {
    const int64_t size = direct ? 0 : s.groups * s.pixels() * block, tasks = s.batch * blocks;
    std::vector<at::Tensor> buffers;
    for (int64_t i = 0; i < 2 * std::min<int64_t>(at::get_num_threads(), tasks); ++i) {
      buffers.push_back(at::empty({(i % 2 == 0 ? with_map : with_map_grad) ? size : 0}, boxes.options()));
      advise_large_pages(buffers.back());
    }
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t thread = at::get_thread_num();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * block;
        visit(
            buffers[2 * thread].template data_ptr<acc_t>(), buffers[2 * thread + 1].template data_ptr<acc_t>(),
            i / blocks, first, std::min(block, s.channels - first));
      }
    });
  }

  // The channels of an image of the input, or of another tensor that is laid out as it: visit(their images, where the
  // plane begins in the rows) for each plane
  template <typename value_t, typename visit_t>
  void for_each_plane(value_t* data, const visit_t& visit) const {
    Images<value_t> plane = images(data, s.groups * s.channels, s.pixels(), input.stride(1) == 1);
    const int64_t channel = plane.channel;
    plane.channel *= s.groups;
    for (int64_t g = 0; g < s.groups; ++g, plane.data += channel) visit(plane, g * s.pixels() * stride);
  }
  // The first channel of an image; copied into `buffer`, if the input is no rows.
  const acc_t* rows(acc_t* buffer, int64_t n, int64_t first, int64_t channels) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (direct) return input.const_data_ptr<acc_t>() + n * s.pixels() * s.channels + first;
    }
    for_each_plane(input.const_data_ptr<scalar_t>(), [&](const auto& plane, int64_t at) {
      kernels.load_pixels(buffer + at, stride, plane, n, first, 0, s.pixels(), channels);
    });
    return buffer;
  }
};

template <typename scalar_t, typename acc_t, typename shape_t>
at::Tensor pool_forward(
    const shape_t& shape, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  const PoolCall<scalar_t, acc_t, shape_t> call(shape, input, boxes, offset, mask, true, false);
  const PoolSizes& s = call.s;
  const at::Tensor pooled = at::empty(
      {s.boxes, s.channels, s.pooled_h, s.pooled_w}, input.options().memory_format(input.suggest_memory_format()));
  if (pooled.numel() == 0) return pooled;
  advise_large_pages(pooled);
  const Images<scalar_t> out = images(pooled.data_ptr<scalar_t>(), s.channels, s.bins(), call.channels_last);
  std::vector<BoxStencils<acc_t>> shared;
  // The box k, for channels of the image that `map` begins with; `bins` has room for them.
  const auto pool = [&](int64_t k, const acc_t* map, int64_t first, int64_t channels, BoxStencils<acc_t>& own,
                        const Buffer<acc_t>& bins) {
    acc_t* rows = bins.data();
    int64_t stride = spaced(channels);
    bool in_place = false;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      in_place = call.channels_last;
      if (in_place) rows = out.at(k, first, 0), stride = s.channels;
    }
    call.for_each_class(
        shared, own, k, first, first + channels, [&](auto* stencils, auto* entries, int64_t c, int64_t count) {
          call.kernels.pool_bins(rows + c - first, stride, map + c - first, stencils, entries, s.bins(), count);
        });
    if (!in_place) call.kernels.store_pixels(out, k, first, 0, rows, stride, s.bins(), channels);
  };
  if (call.direct) {
    at::parallel_for(0, s.boxes, 1, [&](int64_t begin, int64_t end) {
      BoxStencils<acc_t> own;
      const Buffer<acc_t> bins(s.bins() * spaced(s.channels));
      for (int64_t k = begin; k < end; ++k) {
        const auto n = static_cast<int64_t>(call.boxes.template const_data_ptr<acc_t>()[k * 5]);
        pool(k, call.rows(nullptr, n, 0, s.channels), 0, s.channels, own, bins);
      }
    });
    return pooled;
  }
  shared = call.shared_stencils();
  call.for_each_block([&](acc_t* buffer, acc_t*, int64_t n, int64_t first, int64_t channels) {
    if (call.boxes_of[n].empty()) return;
    const acc_t* const map = call.rows(buffer, n, first, channels);
    BoxStencils<acc_t> own;
    const Buffer<acc_t> bins(s.bins() * spaced(channels));
    for (const int64_t k : call.boxes_of[n]) pool(k, map, first, channels, own, bins);
  });
  return pooled;
}

using PoolGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <typename scalar_t, typename acc_t, typename shape_t>
PoolGradients pool_backward(
    const shape_t& shape, const at::Tensor& grad_, const at::Tensor& input, const at::Tensor& boxes,
    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& mask, std::array<bool, 3> wanted) {
  wanted[1] = wanted[1] && offset.has_value();
  wanted[2] = wanted[2] && mask.has_value();
  const bool by_sample = wanted[1] || wanted[2];
  const at::Tensor none = at::empty({0}, input.options());
  if (!wanted[0] && !by_sample) return {none, none, none};
  const PoolCall<scalar_t, acc_t, shape_t> call(shape, input, boxes, offset, mask, by_sample, wanted[0]);
  const PoolSizes& s = call.s;
  const at::Tensor grad = grad_.contiguous(grad_.suggest_memory_format());
  const at::Tensor input_grad = wanted[0] ? at::empty_like(call.input) : none;
  advise_large_pages(input_grad);
  if (call.direct) input_grad.zero_();
  const Images<const scalar_t> grads = images(
      grad.const_data_ptr<scalar_t>(), s.channels, s.bins(),
      grad.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
  // Each block of channels has sums of its own: [boxes, per_offset], then [boxes, bins] of the mask.
  const int64_t per_offset = wanted[1] && s.boxes > 0 ? offset->numel() / s.boxes : 0;
  const int64_t offsets = s.boxes * per_offset, total = offsets + (wanted[2] ? s.boxes * s.bins() : 0);
  const at::Tensor sums = at::empty({call.blocks, total}, call.boxes.options());
  const std::vector<BoxStencils<acc_t>> shared = call.shared_stencils();

  call.for_each_block([&](acc_t* buffer, acc_t* grad_buffer, int64_t n, int64_t first, int64_t channels) {
    const acc_t* map = nullptr;
    acc_t* map_grad = grad_buffer;
    if (by_sample && !call.boxes_of[n].empty()) map = call.rows(buffer, n, first, channels);
    if (wanted[0] && !call.direct) std::fill_n(map_grad, s.groups * s.pixels() * call.stride, acc_t(0));
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (wanted[0] && call.direct) map_grad = input_grad.data_ptr<acc_t>() + n * s.pixels() * s.channels + first;
    }
    acc_t* const offset_sum = sums.data_ptr<acc_t>() + first / call.block * total;
    acc_t* const mask_sum = offset_sum + offsets;
    BoxStencils<acc_t> own;
    const int64_t stride = spaced(channels);
    const Buffer<acc_t> rows(s.bins() * stride), dots(s.bins() * 3);
    for (const int64_t k : call.boxes_of[n]) {
      call.kernels.load_pixels(rows.data(), stride, grads, k, first, 0, s.bins(), channels);
      std::fill_n(offset_sum + k * per_offset, per_offset, acc_t(0));
      if (wanted[2]) std::fill_n(mask_sum + k * s.bins(), s.bins(), acc_t(0));
      call.for_each_class(
          shared, own, k, first, first + channels, [&](auto* stencils, auto* entries, int64_t c, int64_t count) {
            const int64_t at = c - first;
            std::fill_n(dots.data(), s.bins() * 3, acc_t(0));
            call.kernels.unpool_bins(
                wanted[0] ? map_grad + at : nullptr, dots.data(), map ? map + at : nullptr, rows.data() + at, stride,
                stencils, entries, s.bins(), count);
            for (int64_t i = 0; i < s.bins() && by_sample; ++i) {
              const BinStencil<acc_t>& bin = stencils[i];
              const acc_t* const dot = dots.data() + 3 * i;
              if (bin.rows == 0) continue;
              if (wanted[1]) {
                offset_sum[bin.offset_index] += bin.scale * bin.move_x * dot[1];
                offset_sum[bin.offset_index + s.offset_stride] += bin.scale * bin.move_y * dot[0];
              }
              if (wanted[2]) mask_sum[k * s.bins() + i] += dot[2] / bin.samples;
            }
          });
    }
    if (wanted[0] && !call.direct) {
      call.for_each_plane(input_grad.data_ptr<scalar_t>(), [&](const auto& plane, int64_t at) {
        call.kernels.store_pixels(plane, n, first, 0, map_grad + at, call.stride, s.pixels(), channels);
      });
    }
  });

  const at::Tensor result = at::zeros({total}, sums.options());
  at::parallel_for(0, total, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < call.blocks; ++b)
      for (int64_t i = begin; i < end; ++i) result.data_ptr<acc_t>()[i] += sums.const_data_ptr<acc_t>()[b * total + i];
  });
  const auto part = [&](bool wanted, int64_t from, int64_t to, const std::optional<at::Tensor>& like) {
    return wanted ? result.slice(0, from, to).clone().view(like->sizes()).to(like->scalar_type()) : none;
  };
  return {input_grad, part(wanted[1], 0, offsets, offset), part(wanted[2], offsets, total, mask)};
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
