#include "moe_reference.h"
