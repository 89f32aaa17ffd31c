#include "expert_sum.h"
