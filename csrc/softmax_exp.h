// The softmax's exponential on the CPU: the shaders' own text.
#pragma once

#include "swiglu.h"

// After multiply_add of swiglu.h.
#include "metal/softmax_exp.h"
