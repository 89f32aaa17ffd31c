#include "index_prompt.h"
