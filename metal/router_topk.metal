#include "router_topk.h"
