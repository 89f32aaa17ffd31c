// The codes of packed rows on the CPU are the shaders' own text.
#pragma once

#include "shader_math.h"

// It needs bits_of and float_of.
#include "metal/packing.h"
