// The softmax's exponential on the CPU is the shaders' own text.
#pragma once

#include "swiglu.h"

// It needs multiply_add, which swiglu.h brings.
#include "metal/softmax_exp.h"
