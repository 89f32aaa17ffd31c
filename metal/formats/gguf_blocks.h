// The blocks of GGUF, one text for the shaders and the CPU. The includer brings
// GLM_CONST, GLM_BLOCK for a function, and gguf::half_value(bits) and
// gguf::float_of(bits).
//
// A lane of a block owns 16 columns, lane l those from 16 l on. `codes` gives
// them as signed bytes; a value is scale * code, or scale * code + bias where
// the block is `biased`. Codes are integers: what ggml multiplies into the
// values of a codebook (1/8, 1/4, 1/2) is a part of the scale here, and exact.
#pragma once

namespace gguf {

GLM_CONST int kLaneColumns = 16;

template <typename P>
GLM_BLOCK uint32_t two_bytes(P at) {
  return uint32_t(at[0]) | uint32_t(at[1]) << 8;
}
template <typename P>
GLM_BLOCK uint32_t four_bytes(P at) {
  return two_bytes(at) | two_bytes(at + 2) << 16;
}
template <typename P>
GLM_BLOCK float half_at(P at) {
  return half_value(two_bytes(at));
}

// Blocks without a bias.
template <int count, int size>
struct Scaled {
  GLM_CONST int columns = count;
  GLM_CONST int bytes = size;
  GLM_CONST bool biased = false;

  template <typename P>
  static GLM_BLOCK float bias(P, int) {
    return 0;
  }
};

// ---- Blocks of 32 columns.

struct Q8_0 : Scaled<32, 34> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = int8_t(block[2 + 16 * lane + i]);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int) {
    return half_at(block);
  }
};

// The low nibbles of 16 bytes, then the high ones.
template <typename P>
GLM_BLOCK int nibble(P bytes, int lane, int i) {
  return bytes[i] >> 4 * lane & 15;
}

struct Q4_0 : Scaled<32, 18> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = int8_t(nibble(block + 2, lane, i) - 8);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int) {
    return half_at(block);
  }
};

struct Q5_0 : Scaled<32, 22> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    const uint32_t high = two_bytes(block + 2 + 2 * lane);
    for (int i = 0; i < kLaneColumns; i++) {
      const int top = int(high >> i & 1) << 4;
      q[i] = int8_t((nibble(block + 6, lane, i) | top) - 16);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int) {
    return half_at(block);
  }
};

GLM_CONST int8_t kIq4Values[16] =
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Iq4Nl : Scaled<32, 18> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = kIq4Values[nibble(block + 2, lane, i)];
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int) {
    return half_at(block);
  }
};

// Twice the values of e2m1; ggml has no -0.
GLM_CONST int8_t kMxfp4Values[16] =
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct Mxfp4 : Scaled<32, 17> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = kMxfp4Values[nibble(block + 1, lane, i)];
    }
  }
  // 2^(e - 128), of which the two least are subnormal.
  template <typename P>
  static GLM_BLOCK float scale(P block, int) {
    const uint32_t e = block[0];
    return float_of(e < 2 ? 0x200000u << e : (e - 1) << 23);
  }
};

// ---- Super-blocks of 256 columns: the K family.

// 64 bytes of two bits: 32 bytes hold 128 columns, 32 after each other.
template <typename P>
GLM_BLOCK int two_bits(P bytes, int lane, int i) {
  const int at = lane / 8 * 32 + lane % 2 * 16 + i;
  return bytes[at] >> lane % 8 / 2 * 2 & 3;
}
// 128 bytes of nibbles: 32 bytes hold 64 columns.
template <typename P>
GLM_BLOCK int paired_nibble(P bytes, int lane, int i) {
  const int at = lane / 4 * 32 + lane % 2 * 16 + i;
  return bytes[at] >> lane / 2 % 2 * 4 & 15;
}
// 32 bytes, of which bit b belongs to columns 32 b to 32 b + 31.
template <typename P>
GLM_BLOCK int plane_bit(P bytes, int lane, int i) {
  return bytes[lane % 2 * 16 + i] >> lane / 2 & 1;
}

struct Q2K {
  GLM_CONST int columns = 256;
  GLM_CONST int bytes = 84;
  GLM_CONST bool biased = true;

  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = int8_t(two_bits(block + 16, lane, i));
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    return half_at(block + 80) * float(block[lane] & 15);
  }
  template <typename P>
  static GLM_BLOCK float bias(P block, int lane) {
    return -(half_at(block + 82) * float(block[lane] >> 4));
  }
};

struct Q3K : Scaled<256, 110> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      const int below = 4 - 4 * plane_bit(block, lane, i);
      q[i] = int8_t(two_bits(block + 32, lane, i) - below);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const int low = block[96 + lane % 8] >> lane / 8 * 4 & 15;
    const int high = block[104 + lane % 4] >> lane / 4 * 2 & 3;
    return half_at(block + 108) * float((low | high << 4) - 32);
  }
};

// Scale and minimum of a pair of lanes, six bits each, of the 12 bytes that
// follow d and dmin.
template <int size>
struct Paired {
  GLM_CONST int columns = 256;
  GLM_CONST int bytes = size;
  GLM_CONST bool biased = true;

  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const int g = lane / 2;
    const int bits =
        g < 4 ? block[4 + g] & 63 : (block[8 + g] & 15) | (block[g] >> 2 & 48);
    return half_at(block) * float(bits);
  }
  template <typename P>
  static GLM_BLOCK float bias(P block, int lane) {
    const int g = lane / 2;
    const int bits = g < 4 ? block[8 + g] & 63
                           : block[8 + g] >> 4 | (block[4 + g] >> 2 & 48);
    return -(half_at(block + 2) * float(bits));
  }
};

struct Q4K : Paired<144> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = int8_t(paired_nibble(block + 16, lane, i));
    }
  }
};

struct Q5K : Paired<176> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      const int top = plane_bit(block + 16, lane, i) << 4;
      q[i] = int8_t(paired_nibble(block + 48, lane, i) | top);
    }
  }
};

struct Q6K : Scaled<256, 210> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    // 64 bytes hold the low bits of 128 columns.
    const int at = lane / 8 * 64 + lane % 4 * 16, shift = lane / 4 % 2 * 4;
    for (int i = 0; i < kLaneColumns; i++) {
      const int low = block[at + i] >> shift & 15;
      q[i] = int8_t((low | two_bits(block + 128, lane, i) << 4) - 32);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    return half_at(block + 208) * float(int8_t(block[192 + lane]));
  }
};

}  // namespace gguf
