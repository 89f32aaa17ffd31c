#include "indexer_topk.h"
