#include "attention_rows.h"
