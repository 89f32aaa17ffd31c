// The softmax's exponential on the CPU is the shaders' own text.
#pragma once

#include "shader_math.h"

// It needs multiply_add.
#include "metal/softmax_exp.h"
