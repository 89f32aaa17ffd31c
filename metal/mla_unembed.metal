#include "formats/families.h"
#include "mla_unembed.h"
