#include "append_rows.h"
