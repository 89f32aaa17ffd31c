#include "formats/affine.h"
#include "formats/dense.h"
#include "formats/fp.h"
#include "moe_decode.h"
