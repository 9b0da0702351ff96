// Bilinear sampling, for host and device: the only place where the arithmetic of a sample is written.
#pragma once

#if defined(__CUDACC__)
#define DCNV2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DCNV2_HOST_DEVICE inline
#endif

namespace dcnv2 {

// Where one sample falls on a map of `height` x `width`. Neighbours are ordered
// (y low, x low), (y low, x high), (y high, x low), (y high, x high).
template <typename scalar_t, typename index_t>
struct BilinearSample {
  // Row-major position of each neighbour; `height * width` stands for a neighbour that counts as zero.
  index_t index[4];
  scalar_t ly, lx;  // distance to the low neighbour, in [0, 1)

  DCNV2_HOST_DEVICE void weights(scalar_t (&w)[4]) const {
    const scalar_t hy = 1 - ly, hx = 1 - lx;
    w[0] = hy * hx;
    w[1] = hy * lx;
    w[2] = ly * hx;
    w[3] = ly * lx;
  }
  // Derivatives of the interpolated value by y and by x, given the values of the four neighbours (or dot products of
  // them).
  DCNV2_HOST_DEVICE scalar_t derivative_y(const scalar_t (&v)[4]) const {
    return (1 - lx) * (v[2] - v[0]) + lx * (v[3] - v[1]);
  }
  DCNV2_HOST_DEVICE scalar_t derivative_x(const scalar_t (&v)[4]) const {
    return (1 - ly) * (v[1] - v[0]) + ly * (v[3] - v[2]);
  }
};

// Without a call of the library's floor. Not truncation of y + 1: that sum rounds up just below an integer.
template <typename index_t, typename scalar_t>
DCNV2_HOST_DEVICE index_t floor_to_index(scalar_t value) {
  const index_t truncated = static_cast<index_t>(value);
  return truncated - (scalar_t(truncated) > value);
}

// The rule of deformable convolution: zero at y <= -1, x <= -1, y >= height or x >= width, with zero derivative; in
// between each neighbour outside the map counts as zero. NaN and infinite coordinates are outside: they are replaced
// before any conversion to an integer. Without branches, so that a loop over samples can be vectorised.
template <typename scalar_t, typename index_t>
DCNV2_HOST_DEVICE BilinearSample<scalar_t, index_t> sample_zero_padded(
    scalar_t y, scalar_t x, index_t height, index_t width) {
  const bool inside = (y > -1) & (y < scalar_t(height)) & (x > -1) & (x < scalar_t(width));
  const scalar_t y_in = inside ? y : scalar_t(0), x_in = inside ? x : scalar_t(0);
  const index_t y_low = floor_to_index<index_t>(y_in), x_low = floor_to_index<index_t>(x_in);
  const bool top = inside & (y_low >= 0), bottom = inside & (y_low + 1 < height);
  const bool left = x_low >= 0, right = x_low + 1 < width;
  const index_t outside = height * width, first = y_low * width + x_low;
  return {
      {top & left ? first : outside, top & right ? first + 1 : outside, bottom & left ? first + width : outside,
       bottom & right ? first + width + 1 : outside},
      y_in - scalar_t(y_low),
      x_in - scalar_t(x_low)};
}

// One axis of a sample that is clamped into the map. In a clamped direction the two neighbours coincide, which makes
// the derivative zero there.
template <typename scalar_t, typename index_t>
struct AxisSample {
  index_t low, high;
  scalar_t distance;  // to the low neighbour, in [0, 1)
};

// The rule of RoIAlign, with a reach of 1, and of position-sensitive pooling, with one of 1/2: false, for nothing to
// add, more than `reach` pixels before the first or after the last pixel and for NaN; otherwise the position is clamped
// into the map.
template <typename scalar_t, typename index_t>
DCNV2_HOST_DEVICE bool clamp_to_axis(
    scalar_t position, index_t size, scalar_t reach, AxisSample<scalar_t, index_t>& axis) {
  if (!(position >= -reach && position <= scalar_t(size - 1) + reach)) return false;
  axis.low = position <= 0 ? 0 : position >= scalar_t(size - 1) ? size - 1 : static_cast<index_t>(position);
  axis.high = position > 0 && axis.low < size - 1 ? axis.low + 1 : axis.low;
  axis.distance = axis.high > axis.low ? position - scalar_t(axis.low) : scalar_t(0);
  return true;
}

}  // namespace dcnv2
