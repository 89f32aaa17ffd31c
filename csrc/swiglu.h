// SwiGLU and the sigmoid on the CPU are the shaders' own text.
#pragma once

#include "shader_math.h"

// It needs multiply_add and what rounds.
#include "metal/swiglu.h"
