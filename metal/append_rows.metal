#include "append_rows.h"
#include "pack_rows.h"
