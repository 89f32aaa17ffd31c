// GGUF's block formats: each(family, block, name, bits). `block` is the type in
// metal/formats/gguf_blocks.h or gguf_codebooks.h; the name is ggml's, and
// MXFP4, whose blocks are not MLX's mxfp4, says whose it is.
#pragma once

#define GLM_GGUF_FORMATS(each)                                                \
  each(q8_0, Q8_0, "q8_0", 8) each(q4_0, Q4_0, "q4_0", 4)                     \
      each(q5_0, Q5_0, "q5_0", 5) each(iq4_nl, Iq4Nl, "iq4_nl", 4)            \
          each(ggml_mxfp4, Mxfp4, "ggml-mxfp4", 4) each(q2_k, Q2K, "q2_k", 2) \
              each(q3_k, Q3K, "q3_k", 3) each(q4_k, Q4K, "q4_k", 4)           \
                  each(q5_k, Q5K, "q5_k", 5) each(q6_k, Q6K, "q6_k", 6) each( \
                      iq1_s, Iq1S, "iq1_s", 1) each(iq1_m, Iq1M, "iq1_m", 1)  \
                      each(iq2_xxs, Iq2Xxs, "iq2_xxs", 2)                     \
                          each(iq2_xs, Iq2Xs, "iq2_xs", 2)                    \
                              each(iq2_s, Iq2S, "iq2_s", 2)                   \
                                  each(iq3_xxs, Iq3Xxs, "iq3_xxs", 3)         \
                                      each(iq3_s, Iq3S, "iq3_s", 3)           \
                                          each(iq4_xs, Iq4Xs, "iq4_xs", 4)
