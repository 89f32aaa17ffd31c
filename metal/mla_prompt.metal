#include "mla_prompt.h"
