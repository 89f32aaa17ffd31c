#include "formats/families.h"
#include "grouped_experts.h"
