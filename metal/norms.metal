#include "norms.h"
