// The norms' arithmetic on the CPU is the shaders' own text.
#pragma once

#include "shader_math.h"

// It needs product, square_root and what rounds.
#include "metal/norm.h"
