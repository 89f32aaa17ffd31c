#include "attention_queries.h"
#include "formats/families.h"
