// Every family of weight formats; kernels of all of them include this.
#pragma once

#include "formats/affine.h"
#include "formats/dense.h"
#include "formats/fp.h"
#include "formats/fp8.h"
#include "formats/gguf.h"
