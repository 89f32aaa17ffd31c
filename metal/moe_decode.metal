#include "formats/families.h"
#include "moe_decode.h"
