#include "index_scores.h"
#include "index_select.h"
