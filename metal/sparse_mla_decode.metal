#include "sparse_mla_decode.h"
