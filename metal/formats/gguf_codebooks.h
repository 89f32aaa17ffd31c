// The super-blocks of GGUF whose codes come from a codebook, one text for the
// shaders and the CPU, as gguf_blocks.h, which stands before it with
// gguf_codebook_grids.h. A lane has two groups of eight columns,
// which are the block's groups 2 * lane and 2 * lane + 1.
#pragma once

namespace gguf {

// Seven signs; the eighth makes their number even.
GLM_BLOCK uint32_t eight_signs(uint32_t seven) {
  uint32_t odd = seven ^ seven >> 4;
  odd ^= odd >> 2;
  return seven | ((odd ^ odd >> 1) & 1) << 7;
}

template <typename Q>
GLM_BLOCK void add_iq1(uint32_t index, bool below, Q q) {
  const uint32_t codes = kIq1Grid[index];
  for (int i = 0; i < 8; i++) {
    q[i] = int8_t(8 * (int(codes >> 2 * i & 3) - 1) + (below ? -1 : 1));
  }
}
template <typename Q>
GLM_BLOCK void add_iq2(uint32_t codes, uint32_t signs, Q q) {
  for (int i = 0; i < 8; i++) {
    const int code = int(codes >> 2 * i & 3);
    const int value = 17 * code + 8 + (code >> 1);  // 8, 25 and 43
    q[i] = int8_t(signs >> i & 1 ? -value : value);
  }
}
template <typename Q>
GLM_BLOCK void add_iq3_xxs(uint32_t codes, uint32_t signs, Q q) {
  for (int i = 0; i < 4; i++) {
    const int code = int(codes >> 3 * i & 7);
    const int value = code == 7 ? 62 : 8 * code + 4;
    q[i] = int8_t(signs >> i & 1 ? -value : value);
  }
}
template <typename Q>
GLM_BLOCK void add_iq3_s(uint32_t codes, uint32_t signs, Q q) {
  for (int i = 0; i < 4; i++) {
    const int value = 2 * int(codes >> 3 * i & 7) + 1;
    q[i] = int8_t(signs >> i & 1 ? -value : value);
  }
}

struct Iq1S : Scaled<256, 50> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    const uint32_t head = two_bytes(block + 34 + lane / 2 * 2);
    for (int j = 0; j < 2; j++) {
      const int g = 2 * lane + j;
      const uint32_t high = head >> g % 4 * 3 & 7;
      add_iq1(block[2 + g] | high << 8, head >> 15, q + 8 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const uint32_t bits = two_bytes(block + 34 + lane / 2 * 2) >> 12 & 7;
    return half_at(block) * float(2 * bits + 1) * 0.125f;
  }
};

struct Iq1M : Scaled<256, 56> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int j = 0; j < 2; j++) {
      const uint32_t head = block[32 + lane] >> 4 * j;
      const uint32_t index = block[2 * lane + j] | (head & 7) << 8;
      add_iq1(index, (head & 8) != 0, q + 8 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    // The half is the top nibbles of the four words with the lanes' scales.
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
      d |= two_bytes(block + 48 + 2 * i) >> 12 << 4 * i;
    }
    const uint32_t word = two_bytes(block + 48 + lane / 4 * 2);
    const uint32_t bits = word >> lane % 4 * 3 & 7;
    return half_value(d) * float(2 * bits + 1) * 0.125f;
  }
};

struct Iq2Xxs : Scaled<256, 66> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    P words = block + 2 + lane / 2 * 8;
    for (int j = 0; j < 2; j++) {
      const int g = lane % 2 * 2 + j;
      const uint32_t signs = eight_signs(four_bytes(words + 4) >> 7 * g & 127);
      add_iq2(kIq2XxsGrid[words[g]], signs, q + 8 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const uint32_t bits = four_bytes(block + 6 + lane / 2 * 8) >> 28;
    return half_at(block) * (float(bits) + 0.5f) * 0.25f;
  }
};

// A scale of four bits for each lane.
template <typename P>
GLM_BLOCK float four_bit_scale(P scales, int lane) {
  return float(scales[lane / 2] >> lane % 2 * 4 & 15);
}

struct Iq2Xs : Scaled<256, 74> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int j = 0; j < 2; j++) {
      const uint32_t word = two_bytes(block + 2 + 4 * lane + 2 * j);
      add_iq2(kIq2XsGrid[word & 511], eight_signs(word >> 9), q + 8 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    return half_at(block) * (four_bit_scale(block + 66, lane) + 0.5f) * 0.25f;
  }
};

struct Iq2S : Scaled<256, 82> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int j = 0; j < 2; j++) {
      const int g = 2 * lane + j;
      const uint32_t high = block[66 + g / 4] >> g % 4 * 2 & 3;
      add_iq2(kIq2SGrid[block[2 + g] | high << 8], block[34 + g], q + 8 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    return half_at(block) * (four_bit_scale(block + 74, lane) + 0.5f) * 0.25f;
  }
};

struct Iq3Xxs : Scaled<256, 98> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    const uint32_t word = four_bytes(block + 66 + lane / 2 * 4);
    for (int j = 0; j < 4; j++) {
      const int g = lane % 2 * 2 + j / 2;
      const uint32_t signs = eight_signs(word >> 7 * g & 127) >> j % 2 * 4;
      add_iq3_xxs(kIq3XxsGrid[block[2 + 4 * lane + j]], signs, q + 4 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const uint32_t bits = four_bytes(block + 66 + lane / 2 * 4) >> 28;
    return half_at(block) * (float(bits) + 0.5f) * 0.5f;
  }
};

struct Iq3S : Scaled<256, 110> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int j = 0; j < 4; j++) {
      const int g = 4 * lane + j;
      const uint32_t high = block[66 + g / 8] >> g % 8 & 1;
      const uint32_t signs = block[74 + g / 2] >> j % 2 * 4;
      add_iq3_s(kIq3SGrid[block[2 + g] | high << 8], signs, q + 4 * j);
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const int bits = block[106 + lane / 4] >> lane / 2 % 2 * 4 & 15;
    return half_at(block) * float(2 * bits + 1);
  }
};

struct Iq4Xs : Scaled<256, 136> {
  template <typename P, typename Q>
  static GLM_BLOCK void codes(P block, int lane, Q q) {
    for (int i = 0; i < kLaneColumns; i++) {
      q[i] = kIq4Values[nibble(block + 8 + lane / 2 * 16, lane % 2, i)];
    }
  }
  template <typename P>
  static GLM_BLOCK float scale(P block, int lane) {
    const int g = lane / 2;
    const int low = block[4 + g / 2] >> g % 2 * 4 & 15;
    const int high = int(two_bytes(block + 2) >> 2 * g & 3);
    return half_at(block) * float((low | high << 4) - 32);
  }
};

}  // namespace gguf
