#include <cmath>

#include "reference/reference.h"
#include "rounding.h"

namespace glm_fused::reference {

namespace {

constexpr int kLanes = 32;

float read_float(const uint8_t* p, size_t index, FloatType type) {
  if (type == FloatType::float32) {
    float f;
    memcpy(&f, p + 4 * index, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, p + 2 * index, 2);
  return type == FloatType::float16 ? from_float16(h) : from_bfloat16(h);
}

float e4m3(uint8_t byte) {
  const uint16_t v = byte & 127, sign = (byte & 128) << 8;
  const uint16_t nan = ((v + 1) >> 7) << 14;
  return from_float16(static_cast<uint16_t>(v << 7 | nan | sign)) * 256.0f;
}

float e8m0(uint8_t byte) {
  return float_of(byte == 0 ? 0x400000u : static_cast<uint32_t>(byte) << 23);
}

float e2m1(int code) {
  static const float magnitude[] = {
      0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return code & 8 ? -magnitude[code & 7] : magnitude[code & 7];
}

// How one lane walks a row: `values` consecutive columns of each block.
int values_per_lane(const Format& f, bool fast) {
  if (f.mode == Mode::dense) {
    return 4;
  }
  const int pack = f.bits == 3 || f.bits == 5 ? 8
      : f.bits == 6                           ? 4
                                              : 32 / f.bits;
  return fast && f.bits > 2 ? 2 * pack : pack;
}

// MLX's load_vector: the sum that multiplies the bias.
float sum_of(const float* x, int values, int bits) {
  const int step = bits == 8 ? 1 : bits % 2 ? 8 : 4;
  float sum = 0;
  for (int i = 0; i < values; i += step) {
    float part = x[i];
    for (int j = 1; j < step; j++) {
      part = part + x[i + j];
    }
    sum = sum + part;
  }
  return sum;
}

// Four products, contracted as clang does: the first term's multiply is fused
// with the second's product, the later ones with the running sum.
float four(const float* x, const float* w) {
  const float t = std::fma(x[0], w[0], x[1] * w[1]);
  return std::fma(x[3], w[3], std::fma(x[2], w[2], t));
}

// 3, 5 and 6 bits: every byte a column touches adds its own product; x is
// divided by the place of the column's first bit in its byte.
float straddling(const uint8_t* w, const float* x, int values, int bits) {
  float accum = 0;
  for (int v = 0; v < values; v++) {
    const int bit = v * bits, byte = bit / 8, place = bit % 8;
    const float scaled = x[v] / static_cast<float>(1 << place);
    const int mask = ((1 << bits) - 1) << place;
    accum = std::fma(static_cast<float>(w[byte] & mask), scaled, accum);
    if (mask > 255) {
      const auto carry = static_cast<float>(w[byte + 1] & mask >> 8);
      accum = std::fma(carry, scaled * 256.0f, accum);
    }
  }
  return accum;
}

float affine(const uint8_t* w, const float* x, int values, int bits) {
  float accum = 0;
  if (bits == 8) {
    for (int v = 0; v < values; v++) {
      accum = std::fma(x[v], static_cast<float>(w[v]), accum);
    }
    return accum;
  }
  if (bits != 2 && bits != 4) {
    return straddling(w, x, values, bits);
  }
  for (int v = 0; v < values; v += 4) {
    const int bytes =
        w[v * bits / 8] | (bits == 4 ? w[v * bits / 8 + 1] << 8 : 0);
    float xs[4], ws[4];
    for (int j = 0; j < 4; j++) {
      const int place = bits * j;
      xs[j] = x[v + j] / static_cast<float>(1 << place);
      ws[j] = static_cast<float>(bytes & ((1 << bits) - 1) << place);
    }
    accum = accum + four(xs, ws);
  }
  return accum;
}

float fp4(const uint8_t* w, const float* x, int values) {
  float accum = 0;
  for (int v = 0; v < values; v += 4) {
    float ws[4];
    for (int j = 0; j < 4; j++) {
      ws[j] = e2m1(w[(v + j) / 2] >> 4 * (j % 2) & 15);
    }
    accum = accum + four(x + v, ws);
  }
  return accum;
}

float fp8(const uint8_t* w, const float* x, int values) {
  float accum = 0;
  for (int v = 0; v < values; v++) {
    accum = std::fma(x[v], e4m3(w[v]), accum);
  }
  return accum;
}

struct Row {
  const Format& f;
  const uint8_t* weight;
  const uint8_t* scales;
  const uint8_t* biases;

  // What columns [column, column + values) add to a lane's result.
  float lane(const float* x, int column, int values) const {
    const uint8_t* w = weight + static_cast<size_t>(column) * f.bits / 8;
    const int group = column / f.group_size;
    if (f.mode == Mode::affine) {
      const float scale = read_float(scales, group, f.float_type);
      const float bias = read_float(biases, group, f.float_type);
      const float sum = sum_of(x + column, values, f.bits);
      const float accum = affine(w, x + column, values, f.bits);
      return std::fma(scale, accum, sum * bias);
    }
    const float scale =
        f.mode == Mode::nvfp4 ? e4m3(scales[group]) : e8m0(scales[group]);
    return scale *
        (f.bits == 4 ? fp4(w, x + column, values) : fp8(w, x + column, values));
  }
};

}  // namespace

float dot(const cpu::Matrix& m, int slot, int row, const float* x) {
  const size_t at = static_cast<size_t>(slot) * m.n + row;
  const size_t scale = at * m.format.groups(m.k) * m.format.scale_bytes();
  const Row r{
      m.format,
      m.weight + at * m.format.row_bytes(m.k),
      m.scales + scale,
      m.biases + scale};
  const int values = values_per_lane(m.format, m.fast_order);
  float result[kLanes] = {};
  for (int block = 0; block < m.k; block += kLanes * values) {
    for (int lane = 0; lane < kLanes; lane++) {
      const int column = block + lane * values;
      if (m.format.mode == Mode::dense) {
        for (int v = column; v < column + values && v < m.k; v++) {
          const float w = read_float(r.weight, v, m.format.float_type);
          result[lane] = std::fma(w, x[v], result[lane]);
        }
      } else if (column < m.k) {
        result[lane] = result[lane] + r.lane(x, column, values);
      }
    }
  }
  for (int step = kLanes / 2; step >= 1; step /= 2) {
    for (int lane = 0; lane < step; lane++) {
      result[lane] = result[lane] + result[lane + step];
    }
  }
  return result[0];
}

}  // namespace glm_fused::reference
